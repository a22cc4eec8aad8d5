"""Distances: how a difference of two tensors becomes the error that training minimises."""

import math
from abc import ABC, abstractmethod

from torch import Tensor


class Distance(ABC):
    """A non-negative function of a difference; its mean over the batch is the loss."""

    @abstractmethod
    def __call__(self, gap: Tensor) -> Tensor:
        """Return the errors (B, ...) of differences (B, C, H, W).

        Errors are not negative, and zero where the difference is. The error of a sample is the
        mean over all axes but the first.
        """


def mean_per_sample(errors: Tensor) -> Tensor:
    """Return each sample's mean error, (B,), of errors (B, ...), without gradient."""
    return errors.detach().flatten(1).mean(1)


class Squared(Distance):
    """e^2, per dimension."""

    def __call__(self, gap: Tensor) -> Tensor:
        return gap.square()


class PseudoHuber(Distance):
    """sqrt(|e|^2 + c^2) - c, per sample (Lee et al. 2024, arXiv 2405.20320, section 4.2).

    It is |e|^2 / 2c near 0 and |e| far from it. c = scale * d^power for samples of d dimensions.

    Args:
        scale: c for a sample of one dimension, positive.
        power: exponent of d, in [0, 1]. Improved consistency training takes 1/2
            (Song & Dhariwal 2023, arXiv 2310.14189, section 3.3).
    """

    def __init__(self, scale: float = 0.00054, power: float = 1.0):
        if not 0 < scale < math.inf:
            raise ValueError(f"PseudoHuber: scale is {scale}; it must be positive")
        if not 0 <= power <= 1:
            raise ValueError(f"PseudoHuber: power is {power}; it must lie in [0, 1]")
        self.scale = scale
        self.power = power

    def __call__(self, gap: Tensor) -> Tensor:
        squares = gap.square().flatten(1).sum(1, keepdim=True)
        c = self.scale * gap[0].numel() ** self.power
        # sqrt(squares + c^2) - c itself would cancel near 0.
        root = (squares + c**2).sqrt()
        return squares / (root + c)


class AdaptiveDistance(Distance):
    """|e|^2 / sg(|e|^2 + c)^p, per sample (MeanFlow, Geng et al. 2025, arXiv 2505.13447, eq. 22).

    sg stops the gradient, so that the gradient is that of |e|^(2 (1 - p)), up to a factor.

    Args:
        power: p, not negative. 0 is the squared error, 1/2 is close to pseudo-Huber, and at 1
            every sample counts the same.
        floor: c, positive.
    """

    def __init__(self, power: float = 1.0, floor: float = 1e-3):
        if not 0 <= power < math.inf:
            raise ValueError(f"AdaptiveDistance: power is {power}; it must be at least 0")
        if not 0 < floor < math.inf:
            raise ValueError(f"AdaptiveDistance: floor is {floor}; it must be positive")
        self.power = power
        self.floor = floor

    def __call__(self, gap: Tensor) -> Tensor:
        squares = gap.square().flatten(1).sum(1, keepdim=True)
        return squares / (squares.detach() + self.floor) ** self.power
