"""Closed forms: the exact denoiser of a Gaussian mixture, and of a single point (shared/formulas)."""

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand


class Mixture:
    """The exact denoiser of sum_k w_k N(m_k, s_k^2), the same law in every dimension but coupled by the mode.

    Args:
        interpolant: of the states.
        means: (K,), standing for m_k in every dimension.
        stds: (K,).
        weights: (K,).
    """

    def __init__(self, interpolant: Interpolant, means: list[float], stds: list[float], weights: list[float]):
        self.interpolant = interpolant
        self.m, self.s, self.w = (torch.tensor(v, dtype=torch.float64) for v in (means, stds, weights))

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        alpha, sigma = (expand(v.double(), x_t)[None] for v in self.interpolant(t))
        m, s, w = (v.view(-1, *(1,) * x_t.ndim) for v in (self.m, self.s, self.w))
        gap, v = x_t.double() - alpha * m, alpha**2 * s**2 + sigma**2  # (K, B, ...)
        log_r = (-(gap**2) / v / 2 - v.log() / 2).flatten(2).sum(2).view(*gap.shape[:2], *(1,) * (x_t.ndim - 1)) + w.log()
        r = log_r.softmax(0)
        x_hat = (r * (m + alpha * s**2 / v * gap)).sum(0)
        return x_hat.to(x_t.dtype), (r * sigma / v * gap).sum(0).to(x_t.dtype)

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return log p_t(x_t), (B,), float64, at t of shape (), of states (B, ...)."""
        alpha, sigma = self.interpolant(t.double())
        v = (alpha**2 * self.s**2 + sigma**2)[:, None, None]
        gap = x_t.double().flatten(1) - (alpha * self.m)[:, None, None]
        return (-(gap**2 / v + (2 * torch.pi * v).log()) / 2).sum(2).add(self.w.log()[:, None]).logsumexp(0)


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
