"""Closed forms: the exact denoiser of a Gaussian mixture (models.exact), of a single Gaussian, and of a single point."""

import torch
from torch import Tensor

from models.exact import Mixture
from models.interpolant import Interpolant, expand

__all__ = ["Flow", "Mixture", "Point", "single"]


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


class Flow:
    """The exact denoiser of N(mean, std^2) that jumps: `mix(x_hat, eps_hat, s)` is the ODE's own map from t to s.

    alpha_s m + S_s / S_t (x_t - alpha_t m), S^2 = alpha^2 std^2 + sigma^2.
    """

    jumps = True

    def __init__(self, interpolant: Interpolant, mean: float = 0.5, std: float = 0.7):
        self.interpolant, self.mean, self.std, self.still = interpolant, mean, std, single(interpolant, mean, std)

    def map(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s of the trajectory through x_t at t; t and s of shape (B,)."""
        (a, b), (c, d) = ([expand(v, x_t) for v in self.interpolant(time)] for time in (t, s))
        ratio = torch.hypot(c * self.std, d) / torch.hypot(a * self.std, b)
        return c * self.mean + ratio * (x_t - a * self.mean)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        now = self.still(x_t, t, cond)
        if s is None:
            return now
        x, eps = self.interpolant.unmix(x_t, t, self.map(x_t, t, s), s)
        same = expand((t - s).abs() < 1e-6, x_t)
        return x.where(~same, now[0]), eps.where(~same, now[1])
