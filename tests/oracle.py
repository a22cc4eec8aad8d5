"""Exact denoisers: a Gaussian mixture (models.exact), a Gaussian, one point; and a call counter."""

import torch
from torch import Tensor

from models.exact import Mixture
from models.interpolant import Interpolant, expand

__all__ = ["CountingDenoiser", "Flow", "Mixture", "Point", "single"]


def single(interpolant: Interpolant, mean: float = 0.5, std: float = 0.7) -> Mixture:
    """Return the exact denoiser of N(mean, std^2)."""
    return Mixture(interpolant, [mean], [std], [1.0])


class Point:
    """The exact denoiser of a data set that holds one point."""

    def __init__(self, interpolant: Interpolant, point: Tensor):
        self.interpolant = interpolant
        self.point = point

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha, sigma = (expand(value, x_t) for value in self.interpolant(t))
        return self.point.expand_as(x_t), (x_t - alpha * self.point) / sigma


class Flow:
    """The exact two-time denoiser of N(mean, std^2).

    `mix(x_hat, eps_hat, s)` is the exact map of the probability-flow ODE from t to s,
    alpha_s m + S_s / S_t (x_t - alpha_t m), with S^2 = alpha^2 std^2 + sigma^2.
    """

    two_time = True

    def __init__(self, interpolant: Interpolant, mean: float = 0.5, std: float = 0.7):
        self.interpolant = interpolant
        self.mean = mean
        self.std = std
        self.one_time = single(interpolant, mean, std)

    def map(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s of the trajectory through x_t at t; t and s of shape (B,)."""
        alpha_t, sigma_t = (expand(value, x_t) for value in self.interpolant(t))
        alpha_s, sigma_s = (expand(value, x_t) for value in self.interpolant(s))
        deviation_t = torch.hypot(alpha_t * self.std, sigma_t)
        deviation_s = torch.hypot(alpha_s * self.std, sigma_s)
        ratio = deviation_s / deviation_t
        return alpha_s * self.mean + ratio * (x_t - alpha_t * self.mean)

    def __call__(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x_now, eps_now = self.one_time(x_t, t, cond)
        if s is None:
            return x_now, eps_now
        # Two states determine (x, eps), unless they are the same state.
        x, eps = self.interpolant.solve_pair(x_t, t, self.map(x_t, t, s), s)
        same = expand((t - s).abs() < 1e-6, x_t)
        return x.where(~same, x_now), eps.where(~same, eps_now)


class CountingDenoiser:
    """Counts the calls of a denoiser, and fails at t = 0, unless `at_zero`."""

    def __init__(self, denoiser, at_zero: bool = False):
        self.denoiser = denoiser
        self.at_zero = at_zero
        self.interpolant = denoiser.interpolant
        self.calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert t.shape == (len(x_t),)
        assert self.at_zero or (t > 0).all()
        self.calls += 1
        return self.denoiser(x_t, t, cond)
