"""A network's own clock: what it is told of the time, apart from t. Only the denoiser and the network know it."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


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
