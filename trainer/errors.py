"""Errors: how far one thing is from another."""

import math
from abc import ABC, abstractmethod

from torch import Tensor


class Error(ABC):
    """A distance of zero, whose mean over the batch is the loss."""

    @abstractmethod
    def __call__(self, gap: Tensor) -> Tensor:
        """Return errors (B, ...), not negative, of gaps (B, C, H, W); a sample's error is the mean of its own."""


class Squared(Error):
    """e^2, per dimension."""

    def __call__(self, gap: Tensor) -> Tensor:
        return gap.square()


class PseudoHuber(Error):
    """sqrt(|e|^2 + c^2) - c, per sample, c = scale x its dimensions (2405.20320, section 4.2): |e|^2 / 2c near 0, then |e|.

    Args:
        scale: c of a sample of one dimension, positive.
        power: of the number d of dimensions in c = scale d^power; improved consistency training has 1/2 (2310.14189,
            section 3.3).
    """

    def __init__(self, scale: float = 0.00054, power: float = 1.0):
        if not 0 < scale < math.inf:
            raise ValueError(f"PseudoHuber: scale is {scale}, it must be positive")
        if not 0 <= power <= 1:
            raise ValueError(f"PseudoHuber: power is {power}, it must lie in [0, 1]")
        self.scale, self.power = scale, power

    def __call__(self, gap: Tensor) -> Tensor:
        squares, c = gap.square().flatten(1).sum(1, keepdim=True), self.scale * gap[0].numel() ** self.power
        return squares / ((squares + c**2).sqrt() + c)  # the difference itself loses its digits near 0


class Adaptive(Error):
    """|e|^2 / sg(|e|^2 + c)^p, per sample: its gradient is that of |e|^(2 (1 - p)) (MeanFlow, 2505.13447, eq. 22).

    Args:
        power: p, not negative: 0 is the squared error, near .5 pseudo-Huber's gradient, and with 1 every sample counts alike.
        floor: c, positive.
    """

    def __init__(self, power: float = 1.0, floor: float = 1e-3):
        if not 0 <= power < math.inf:
            raise ValueError(f"Adaptive: power is {power}, it must not be negative")
        if not 0 < floor < math.inf:
            raise ValueError(f"Adaptive: floor is {floor}, it must be positive")
        self.power, self.floor = power, floor

    def __call__(self, gap: Tensor) -> Tensor:
        squares = gap.square().flatten(1).sum(1, keepdim=True)
        return squares / (squares.detach() + self.floor) ** self.power
