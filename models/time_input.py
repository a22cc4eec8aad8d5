"""Time inputs: what a network receives for t. Only the denoiser and the network know it."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from models.interpolant import Interpolant


class TimeInput(ABC):
    """A one-to-one map from t in [0, 1] to the number that a network was trained on."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """Return the network's time input at t, with t's shape and dtype."""


class ScaledTime(TimeInput):
    """factor * t; DiT and Stable Diffusion 3 receive 1000 t.

    Args:
        factor: the input at t = 1.
    """

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, t: Tensor) -> Tensor:
        return self.factor * t


class TimestepIndex(TimeInput):
    """The index 0 to n - 1 of a chain, where index i stands for t = (i + 1) / n, as in `Discrete`.

    DDPM (Ho et al. 2020, arXiv 2006.11239).

    Args:
        n: length of the chain.
        rounded: round to the nearest index (half to even), as networks were trained; otherwise the
            input is a fraction between two indices.
    """

    def __init__(self, n: int = 1000, rounded: bool = True):
        if n < 1:
            raise ValueError(f"TimestepIndex: n is {n}; it must be at least 1")
        self.n = n
        self.rounded = rounded

    def __call__(self, t: Tensor) -> Tensor:
        index = (t * self.n - 1).clamp(0, self.n - 1)
        return index.round() if self.rounded else index


class NoiseLevel(TimeInput):
    """c_noise = ln(sigma / alpha) / 4 (Karras et al. 2022, arXiv 2206.00364, table 1).

    It is infinite where the state is all data or all noise.

    Args:
        interpolant: the denoiser's own.
    """

    def __init__(self, interpolant: Interpolant):
        self.interpolant = interpolant

    def __call__(self, t: Tensor) -> Tensor:
        alpha, sigma = self.interpolant(t)
        return (sigma / alpha).log() / 4


class BoundedNoiseLevel(TimeInput):
    """c_noise = ln(sigma / alpha) / 4 inside the noise levels that a network was trained on.

    Beyond them it is that of the nearest.

    Args:
        interpolant: the denoiser's own.
        low: least sigma / alpha, positive.
        high: largest sigma / alpha.
    """

    def __init__(self, interpolant: Interpolant, low: float = 0.002, high: float = 80.0):
        if not 0 < low < high:
            raise ValueError(
                f"BoundedNoiseLevel: low is {low} and high is {high}; they must be positive and "
                "rise"
            )
        self.interpolant = interpolant
        self.low = low
        self.high = high

    def __call__(self, t: Tensor) -> Tensor:
        alpha, sigma = self.interpolant(t)
        return (sigma / alpha).clamp(self.low, self.high).log() / 4


class TabulatedTime(TimeInput):
    """The value listed for the nearest t: for example a scheduler's timesteps beside its sigmas.

    Args:
        times: values of t.
        values: the network's input at each of them.
    """

    def __init__(self, times: list[float], values: list[float]):
        if len(times) != len(values) or not times:
            raise ValueError(
                f"TabulatedTime: got {len(times)} times and {len(values)} values; "
                "pass equally many, at least one"
            )
        self.times = times
        self.values = values

    def __call__(self, t: Tensor) -> Tensor:
        nearest = (t[..., None] - t.new_tensor(self.times)).abs().argmin(-1)
        return torch.as_tensor(self.values, dtype=t.dtype, device=t.device)[nearest]


class InterpolatedTime(TimeInput):
    """The values listed for some t, and linear between them: a scheduler's timesteps.

    Args:
        times: falling values of t, at least one. Beyond them the nearest value is taken.
        values: the network's input at each of them.
    """

    def __init__(self, times: list[float], values: list[float]):
        if len(times) != len(values) or not times:
            raise ValueError(
                f"InterpolatedTime: got {len(times)} times and {len(values)} values; "
                "pass equally many, at least one"
            )
        self.times = times
        self.values = values

    def __call__(self, t: Tensor) -> Tensor:
        times = t.new_tensor(self.times[::-1])
        values = t.new_tensor(self.values[::-1])
        if len(times) == 1:
            return values.expand_as(t).clone()
        after = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        low = times[after - 1]
        high = times[after]
        part = ((t - low) / (high - low)).clamp(0, 1)
        return torch.lerp(values[after - 1], values[after], part)
