"""The denoiser: network + interpolant + prediction.

Samplers and objectives need nothing else of a model.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from models.interpolant import Interpolant, is_inspectable
from models.nets import (
    WithEndTime,
    WithGuidance,
    WithNullCondition,
    WithShape,
    WithTimeInput,
)
from models.prediction import Prediction, Velocity
from models.time_input import ScaledTime, TimeInput


@runtime_checkable
class DenoiserLike(Protocol):
    """What samplers and objectives need: a denoiser, a guided one, or an analytic one."""

    @property
    def interpolant(self) -> Interpolant:
        """The interpolant of the states."""

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W), at t of shape (B,) or ()."""


@runtime_checkable
class TwoTimeDenoiser(Protocol):
    """A denoiser that takes a second time s, if `two_time`: a jump from t to s."""

    @property
    def interpolant(self) -> Interpolant:
        """The interpolant of the states."""

    @property
    def two_time(self) -> bool:
        """Whether it takes a second time."""

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat) of the jump from t to s."""


@runtime_checkable
class Predicting(Protocol):
    """A denoiser with a network, whose output is a prediction."""

    @property
    def prediction(self) -> Prediction:
        """What the network predicts."""


class NetworkDenoiser(Predicting, TwoTimeDenoiser, Protocol):
    """A `Denoiser`, or another with its inputs, such as its moving average."""

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        s: Tensor | None = None,
        w: Tensor | None = None,
        /,
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat) of the jump from t to s at the guidance scale w."""


@runtime_checkable
class Costed(Protocol):
    """A denoiser whose cost depends on t, as guidance in an interval does."""

    def evaluations(self, t: Tensor) -> int:
        """Return the network evaluations of one call at t, per sample."""


@runtime_checkable
class WithFirstLevel(Protocol):
    """A denoiser whose network is trained on other times than its interpolant says."""

    @property
    def first_level(self) -> float:
        """The least t that the network is trained on; 0 if it is trained on every t > 0."""


def is_two_time(denoiser: DenoiserLike) -> TypeGuard[TwoTimeDenoiser]:
    """Whether a denoiser takes a second time, the end of a step."""
    return isinstance(denoiser, TwoTimeDenoiser) and denoiser.two_time


def jump(
    denoiser: DenoiserLike, x_t: Tensor, t: Tensor, cond: Tensor | None, s: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return a denoiser's (x_hat, eps_hat), with the second time s if there is one.

    Raises:
        ValueError: it takes no second time.
    """
    if s is None:
        return denoiser(x_t, t, cond)
    if not is_two_time(denoiser):
        raise ValueError("s: the denoiser takes no second time")
    return denoiser(x_t, t, cond, s)


def first_level(denoiser: DenoiserLike) -> float:
    """Return the least t that a denoiser's network is trained on; 0 for every t > 0."""
    if isinstance(denoiser, WithFirstLevel):
        return denoiser.first_level
    return denoiser.interpolant.first_level


def null_condition(denoiser: DenoiserLike, cond: Tensor | None) -> Tensor | None:
    """Return conditions of the shape of `cond` that mean none; None if that is not known."""
    if cond is None or not isinstance(denoiser, WithNullCondition):
        return None
    return denoiser.null_condition(cond)


def prediction_of(denoiser: DenoiserLike) -> Prediction:
    """Return what a denoiser's network predicts; Velocity for an analytic denoiser."""
    return denoiser.prediction if isinstance(denoiser, Predicting) else Velocity()


def cost(denoiser: object, t: Tensor) -> int:
    """Return the network evaluations per sample of one call of a denoiser at t, by default 1."""
    return denoiser.evaluations(t) if isinstance(denoiser, Costed) else 1


class EvaluationCounter:
    """Counts network evaluations, one of one sample each."""

    count = 0


_counters: list[EvaluationCounter] = []


@contextmanager
def count_evaluations() -> Iterator[EvaluationCounter]:
    """Count the network evaluations that all denoisers of this process make inside the block."""
    counter = EvaluationCounter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def add_evaluations(count: int) -> None:
    """Add evaluations, of networks that are no denoiser too, to the blocks that count them."""
    for counter in _counters:
        counter.count += count


class Denoiser(nn.Module):
    """Estimates data and noise from a state: `denoiser(x_t, t, cond) -> (x_hat, eps_hat)`.

    A network may take more inputs:

    - A second time s (`two_time`). Then `mix(x_hat, eps_hat, s)` is its jump from t to s; on Linear
      with Velocity the output is the mean velocity between the two times.
    - A guidance scale w (`guidance_embedded`). Then the output is what guidance at w would give.

    Args:
        net: the network, called as net(x_t, time_input(t), cond) -> y, shapes (B, C, H, W), (B,)
            and what the condition returns.
        interpolant: alpha(t) and sigma(t) of the states.
        prediction: what the network's output y is.
        time_input: what the network receives for t; by default the network's own `time_input`, else
            t itself.
    """

    # Whether its objective taught jumps to a second time: samplers use no others.
    jumps = True
    # What the network computes in, if it is not the type of its inputs.
    network_dtype: torch.dtype | None = None
    # Guidance scale, or [low, high] scales, of the pairs that it was trained on, if known.
    guidance: float | list[float] | None = None
    # Averages of its weights, by the names of its state_dict, in a run that keeps them (EMA).
    averages: dict[str, Tensor] | None = None

    def __init__(
        self,
        net: nn.Module,
        interpolant: Interpolant,
        prediction: Prediction,
        time_input: TimeInput | None = None,
    ):
        super().__init__()
        self.net = net
        self.interpolant = interpolant
        self.prediction = prediction
        if time_input is None and isinstance(net, WithTimeInput):
            time_input = net.time_input
        self.time_input = time_input or ScaledTime(1.0)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the states that the network was built for."""
        assert isinstance(self.net, WithShape)
        return self.net.channels, self.net.size, self.net.size

    @property
    def two_time(self) -> bool:
        """Whether it takes a second time: the network does, and its objective taught jumps."""
        return self.jumps and isinstance(self.net, WithEndTime) and self.net.two_time

    def null_condition(self, cond: Tensor) -> Tensor | None:
        """Return conditions of the shape of `cond` that mean none; None if there are no such."""
        return self.net.null_condition(cond) if isinstance(self.net, WithNullCondition) else None

    @property
    def reads_guidance(self) -> bool:
        """Whether the network takes a guidance scale."""
        return isinstance(self.net, WithGuidance) and self.net.guidance_embedded

    def convert_network(self, dtype: torch.dtype) -> None:
        """Let the network hold its weights, and compute, in a type of half precision."""
        self.net.to(dtype)
        self.network_dtype = dtype

    def _network_precision(self, device: str) -> AbstractContextManager[Any]:
        """Return what the network is evaluated in."""
        if self.network_dtype is None:
            return nullcontext()
        return torch.autocast(device, self.network_dtype)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        s: Tensor | None = None,
        w: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W), at least float32.

        Args:
            x_t: states, (B, C, H, W).
            t: their times in [0, 1], (B,) or ().
            cond: the network's condition.
            s: times to jump to, (B,) or (), for networks with `two_time`; t itself by default.
            w: guidance scales, (B,) or (), for networks with `guidance_embedded`; 1 by default.

        Raises:
            ValueError: t lies outside [0, 1], or the prediction is singular there (checked only
                where t is on the CPU); s or w is given to a network that does not take it.
        """
        # All arithmetic on t is at least float32.
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        x_t = x_t.to(dtype)
        t = t.to(dtype).expand(len(x_t))
        if is_inspectable(t) and not ((t >= 0) & (t <= 1)).all():
            low = t.min().item()
            high = t.max().item()
            raise ValueError(
                f"t is {low:.6g} to {high:.6g}; it must lie in [0, 1] (0 is data, 1 is noise)"
            )
        if s is not None and not self.two_time:
            raise ValueError(
                "s: the network takes no second time, or its objective taught no jumps; build it "
                "with two_time true, and train it with an objective of jumps, such as MeanFlow"
            )
        if w is not None and not self.reads_guidance:
            raise ValueError(
                "w: the network takes no guidance scale; build it with guidance_embedded true"
            )
        # The network's optional inputs
        optional = {}
        if s is not None:
            optional["t_end"] = self.time_input(s.to(dtype).expand(len(x_t)))
        if w is not None:
            optional["guidance"] = w.to(dtype).expand(len(x_t))
        # One evaluation, and the 2x2 solve
        add_evaluations(len(x_t))
        scaled = self.prediction.scale_input(self.interpolant, x_t, t)
        with self._network_precision(x_t.device.type):
            y = self.net(scaled, self.time_input(t), cond, **optional).to(dtype)
        return self.prediction.solve(self.interpolant, y, x_t, t)
