"""Closed forms: the exact denoiser of a Gaussian mixture (models.exact), of a single Gaussian, and of a single point."""

from torch import Tensor

from models.exact import Mixture
from models.interpolant import Interpolant, expand

__all__ = ["Mixture", "Point", "single"]


def single(interpolant: Interpolant, mean: float = 0.5, std: float = 0.7) -> Mixture:
    """Return the exact denoiser of N(mean, std^2)."""
    return Mixture(interpolant, [mean], [std], [1.0])


class Point:
    """The exact denoiser of one data point."""

    def __init__(self, interpolant: Interpolant, point: Tensor):
        self.interpolant, self.point = interpolant, point

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha, sigma = (expand(v, x_t) for v in self.interpolant(t))
        return self.point.expand_as(x_t), (x_t - alpha * self.point) / sigma
