"""The older family: flows, which know their density, and are trained by maximum likelihood (zuko's, extra `flows`)."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import teacher

EXACT = 1e-5  # tolerance of a continuous flow where its density is measured: log p to about 1e-3, in float32 as well


class Flow(nn.Module, ABC):
    """A law of samples (C, H, W) with a density. Constructor arguments are kept as attributes."""

    channels: int
    size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the samples that the flow was built for."""
        return self.channels, self.size, self.size

    @abstractmethod
    def log_prob(self, x: Tensor, exact: bool = False) -> Tensor:
        """Return the natural logarithm of the density, (B,), of x (B, C, H, W).

        exact: rather than as quickly as training wants it, where that differs. Estimates draw from torch's own generator.
        """


def library() -> Any:
    """Return zuko, or say how to get it."""
    try:
        import zuko
    except ImportError as error:
        raise ValueError(f"models.flow: zuko is missing ({error}); pip install 'rectify[flows]'") from None
    return zuko


class SplineFlow(Flow):
    """A normalising flow of autoregressive rational-quadratic splines (Neural Spline Flows, 1906.04032).

    Splines act on [-5, 5], and leave what lies outside as it is: data should have about unit variance.

    Args:
        channels: channels of a sample; 2, with size 1, for points of the plane.
        size: height and width of a sample; the flow has channels x size x size dimensions, at least 2.
        transforms: how many layers of splines, in turn from the first dimension to the last and back.
        bins: pieces of each spline.
        width: units of each hidden layer of the networks that give the splines.
        depth: their hidden layers.
    """

    def __init__(self, channels: int = 2, size: int = 1, transforms: int = 3, bins: int = 8, width: int = 64, depth: int = 2):
        super().__init__()
        if min(transforms, width, depth) < 1 or bins < 2 or channels * size**2 < 2:
            raise ValueError(
                f"SplineFlow: transforms ({transforms}), width ({width}) and depth ({depth}) must be at least 1, "
                f"bins ({bins}) and the dimensions ({channels} x {size} x {size}) at least 2"
            )
        self.channels, self.size, self.transforms, self.bins = channels, size, transforms, bins
        self.width, self.depth = width, depth
        hidden = (width,) * depth
        self.flow = library().flows.NSF(channels * size**2, bins=bins, transforms=transforms, hidden_features=hidden)

    def log_prob(self, x: Tensor, exact: bool = False) -> Tensor:
        return self.flow().log_prob(x.flatten(1))


class ContinuousFlow(Flow):
    """A continuous normalising flow: an ODE's map from data to noise, with the trace of its Jacobian (FFJORD, 1810.01367).

    The ODE is solved by adaptive Dormand-Prince, with gradients by the adjoint method.

    Args:
        channels: channels of a sample; 2, with size 1, for points of the plane.
        size: height and width of a sample.
        width: units of each hidden layer of the velocity's network.
        depth: its hidden layers; without any the flow is affine.
        frequencies: of the sines and cosines by which the network reads the time.
        estimate: train with Hutchinson's estimate of the trace, from one normal probe for the whole solve, instead of the trace
            itself, which takes as many backward passes as there are dimensions.
        tolerance: absolute and relative, of the solver in training; 1e-5 or less where the density is measured.
    """

    def __init__(
        self,
        channels: int = 2,
        size: int = 1,
        width: int = 64,
        depth: int = 3,
        frequencies: int = 3,
        estimate: bool = False,
        tolerance: float = 1e-5,
    ):
        super().__init__()
        if min(channels, size, width) < 1 or min(depth, frequencies) < 0 or not tolerance > 0:
            raise ValueError(
                f"ContinuousFlow: channels ({channels}), size ({size}) and width ({width}) must be at least 1, "
                f"depth ({depth}) and frequencies ({frequencies}) not negative, tolerance ({tolerance}) positive"
            )
        self.channels, self.size, self.width, self.depth = channels, size, width, depth
        self.frequencies, self.estimate, self.tolerance = frequencies, estimate, tolerance
        self.flow = library().flows.CNF(
            channels * size**2, freqs=frequencies, hidden_features=(width,) * depth, atol=tolerance, rtol=tolerance
        )

    def log_prob(self, x: Tensor, exact: bool = False) -> Tensor:
        solve, grad = self.flow.transform, torch.is_grad_enabled()
        solve.exact = exact or not self.estimate
        solve.atol = solve.rtol = min(self.tolerance, EXACT) if exact else self.tolerance
        with torch.inference_mode(False), torch.set_grad_enabled(grad):  # no inference tensor is differentiated
            return self.flow().log_prob(x.flatten(1).clone())


def load(path: str | Path) -> Flow:
    """Load a flow from a run folder or a checkpoint.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: the file is torn, or no checkpoint of a flow.
    """
    file = teacher.newest(path)
    checkpoint = teacher.read(file)
    if "flow" not in checkpoint["rectify"]:
        raise ValueError(f"{file}: holds no flow")
    try:
        flow = teacher.build(checkpoint["rectify"]["flow"])
        if not isinstance(flow, Flow):
            raise ValueError(f"it describes {type(flow)}")
        flow.load_state_dict({key.removeprefix("flow."): value for key, value in checkpoint["state_dict"].items()})
    except Exception as error:  # as in models.teacher.load
        why = str(error) or type(error).__name__
        raise ValueError(f"{file}: its description and weights do not make a flow here ({why})") from error
    return flow.eval().requires_grad_(False)
