"""Normalizing flows, trained by maximum likelihood (from zuko, extra `flows`)."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import newest_checkpoint, read_checkpoint
from models.description import build

# Solver tolerance where a continuous flow's density is measured: log p to about 1e-3, also in
# float32.
EXACT_TOLERANCE = 1e-5


class Flow(nn.Module, ABC):
    """A distribution of samples (C, H, W) with a density.

    Constructor arguments are kept as attributes.
    """

    channels: int
    size: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the samples that the flow was built for."""
        return self.channels, self.size, self.size

    @abstractmethod
    def log_prob(self, x: Tensor, exact: bool = False) -> Tensor:
        """Return the natural logarithm of the density, (B,), of x (B, C, H, W).

        Args:
            x: samples, (B, C, H, W).
            exact: exact instead of as fast as training needs, where the two differ. Estimates draw
                from torch's global generator.
        """


def import_zuko() -> Any:
    """Return the module zuko.

    Raises:
        ValueError: it is not installed; the message says how to install it.
    """
    try:
        import zuko
    except ImportError as error:
        raise ValueError(
            f"models.normalizing_flow: zuko is missing ({error}); pip install 'rectify[flows]'"
        ) from None
    return zuko


class SplineFlow(Flow):
    """A normalizing flow of autoregressive rational-quadratic splines.

    Neural Spline Flows (Durkan et al. 2019, arXiv 1906.04032). The splines act on [-5, 5] and leave
    other values unchanged: the data should have about unit variance.

    Args:
        channels: channels of a sample; 2, with size 1, for points of the plane.
        size: height and width of a sample; the flow has channels x size x size dimensions, at least
            2.
        transforms: number of spline layers; the order of the dimensions alternates.
        bins: pieces of each spline.
        width: units of each hidden layer of the networks that output the splines.
        depth: number of their hidden layers.
    """

    def __init__(
        self,
        channels: int = 2,
        size: int = 1,
        transforms: int = 3,
        bins: int = 8,
        width: int = 64,
        depth: int = 2,
    ):
        super().__init__()
        if min(transforms, width, depth) < 1 or bins < 2 or channels * size**2 < 2:
            raise ValueError(
                f"SplineFlow: transforms ({transforms}), width ({width}) and depth ({depth}) must "
                f"be at least 1, bins ({bins}) and the dimensions ({channels} x {size} x {size}) "
                "at least 2"
            )
        self.channels = channels
        self.size = size
        self.transforms = transforms
        self.bins = bins
        self.width = width
        self.depth = depth
        self.flow = import_zuko().flows.NSF(
            channels * size**2,
            bins=bins,
            transforms=transforms,
            hidden_features=(width,) * depth,
        )

    def log_prob(self, x: Tensor, exact: bool = False) -> Tensor:
        return self.flow().log_prob(x.flatten(1))


class ContinuousFlow(Flow):
    """A continuous normalizing flow: an ODE from data to noise, with the trace of its Jacobian.

    FFJORD (Grathwohl et al. 2018, arXiv 1810.01367). The ODE is solved by the adaptive
    Dormand-Prince method, with gradients by the adjoint method.

    Args:
        channels: channels of a sample; 2, with size 1, for points of the plane.
        size: height and width of a sample.
        width: units of each hidden layer of the velocity's network.
        depth: number of its hidden layers; with 0 the flow is affine.
        frequencies: number of sines and cosines of the time that the network receives.
        estimate: train with Hutchinson's estimate of the trace, from one normal probe for the whole
            solve, instead of the trace itself, which takes one backward pass per dimension.
        tolerance: absolute and relative tolerance of the solver in training; where the density is
            measured it is at most 1e-5.
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
                f"ContinuousFlow: channels ({channels}), size ({size}) and width ({width}) must be "
                f"at least 1, depth ({depth}) and frequencies ({frequencies}) not negative, "
                f"tolerance ({tolerance}) positive"
            )
        self.channels = channels
        self.size = size
        self.width = width
        self.depth = depth
        self.frequencies = frequencies
        self.estimate = estimate
        self.tolerance = tolerance
        self.flow = import_zuko().flows.CNF(
            channels * size**2,
            freqs=frequencies,
            hidden_features=(width,) * depth,
            atol=tolerance,
            rtol=tolerance,
        )

    def log_prob(self, x: Tensor, exact: bool = False) -> Tensor:
        transform = self.flow.transform
        transform.exact = exact or not self.estimate
        tolerance = min(self.tolerance, EXACT_TOLERANCE) if exact else self.tolerance
        transform.atol = tolerance
        transform.rtol = tolerance
        # The solver differentiates, which inference tensors do not allow.
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            return self.flow().log_prob(x.flatten(1).clone())


def load_flow(path: str | Path) -> Flow:
    """Load a flow from a run folder or a checkpoint.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: the file is damaged, or not the checkpoint of a flow.
    """
    file = newest_checkpoint(path)
    checkpoint = read_checkpoint(file)
    if "flow" not in checkpoint["rectify"]:
        raise ValueError(f"{file}: it has no normalizing flow")
    try:
        flow = build(checkpoint["rectify"]["flow"])
        if not isinstance(flow, Flow):
            raise ValueError(f"it describes {type(flow)}")
        weights = {}
        for key, value in checkpoint["state_dict"].items():
            weights[key.removeprefix("flow.")] = value
        flow.load_state_dict(weights)
    except Exception as error:  # constructors and torch raise many kinds of errors
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{file}: its description and weights do not make a flow ({reason})"
        ) from error
    return flow.eval().requires_grad_(False)
