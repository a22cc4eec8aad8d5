"""A network's own clock: what it is told of the time, apart from t. Only the denoiser and the network know it."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from models.interpolant import Interpolant


class Clock(ABC):
    """A one-to-one map from t in [0, 1] to the number that a network was trained to read."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Tensor:
        """Return the network's reading at t, of t's shape and dtype."""


class Scaled(Clock):
    """Reads factor * t; DiT and Stable Diffusion 3 read 1000 t.

    Args:
        factor: the reading at t = 1.
    """

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, t: Tensor) -> Tensor:
        return self.factor * t

    def time(self, reading: Tensor) -> Tensor:
        """Return the t of a reading."""
        return reading / self.factor


class Index(Clock):
    """Reads the index 0 to n - 1 of a chain (DDPM, 2006.11239), where index i stands at t = (i + 1) / n, as in `Discrete`.

    Args:
        n: length of the chain.
        rounded: read the nearest index (half to even), as networks were trained; else the fraction between two.
    """

    def __init__(self, n: int = 1000, rounded: bool = True):
        if n < 1:
            raise ValueError(f"Index: n is {n}, it must be at least 1")
        self.n, self.rounded = n, rounded

    def __call__(self, t: Tensor) -> Tensor:
        place = (t * self.n - 1).clamp(0, self.n - 1)
        return place.round() if self.rounded else place

    def time(self, reading: Tensor) -> Tensor:
        """Return the t of an index."""
        return (reading + 1) / self.n


class NoiseLevel(Clock):
    """Reads c_noise = ln(sigma / alpha) / 4 (EDM, 2206.00364, table 1): infinite where the interpolant is all data or all noise.

    Args:
        interpolant: the denoiser's own.
    """

    def __init__(self, interpolant: Interpolant):
        self.interpolant = interpolant

    def __call__(self, t: Tensor) -> Tensor:
        alpha, sigma = self.interpolant(t)
        return (sigma / alpha).log() / 4

    def time(self, reading: Tensor) -> Tensor:
        """Return the t of a reading."""
        return self.interpolant.time(torch.ones_like(reading), (4 * reading).exp())


class Tabulated(Clock):
    """Reads the number listed beside the nearest t: a scheduler's rounded timesteps beside its sigmas.

    Args:
        times: values of t.
        readings: the network's reading at each of them.
    """

    def __init__(self, times: list[float], readings: list[float]):
        if len(times) != len(readings) or not times:
            raise ValueError(f"Tabulated: {len(times)} times for {len(readings)} readings, needs as many and at least one")
        self.times, self.readings = times, readings

    def __call__(self, t: Tensor) -> Tensor:
        nearest = (t[..., None] - t.new_tensor(self.times)).abs().argmin(-1)
        return torch.as_tensor(self.readings, dtype=t.dtype, device=t.device)[nearest]
