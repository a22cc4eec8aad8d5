"""Stochastic samplers. The noise is an argument of the call, never the global generator."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.interpolant import expand
from models.sampler.base import Sampler, Trajectory


class EulerMaruyama(Sampler):
    """Weak order 1: `x - h u + h w score + sqrt(2 w h) z`.

    It has the same marginals for any w(t) >= 0 (Albergo et al. 2023, arXiv 2303.08797; Ma et al.
    2024, arXiv 2401.08740).

    Args:
        steps: number of steps, at least 1.
        times: a falling grid of steps + 1 values in [0, 1]; uniform from 1 to 0 by default.
        w: rate at which noise is exchanged, as a function of t, never negative. t^2 by default,
            which is no stiffer than u near the data. 0 is Euler.
    """

    is_stochastic = True

    def __init__(
        self,
        steps: int,
        times: Sequence[float] | None = None,
        w: Callable[[Tensor], Tensor] = torch.square,
    ):
        super().__init__(steps, times)
        self.w = w
        values = w(torch.tensor(self.times, dtype=torch.float64))
        if not (values.isfinite() & (values >= 0)).all():
            raise ValueError(
                f"EulerMaruyama: w is {values.tolist()} at {self.times}; "
                "it must be finite and not negative"
            )

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_hat, eps_hat = trajectory(x_t, t)
        # coefficients at t
        alpha_rate, sigma_rate = trajectory.interpolant.derivatives(t)
        _, sigma = trajectory.interpolant(t)
        sigma = expand(sigma, x_t)
        h = expand(t - s, x_t)
        w = expand(self.w(t), x_t)
        # drift and noise
        u = expand(alpha_rate, x_t) * x_hat + expand(sigma_rate, x_t) * eps_hat
        score = -eps_hat / sigma
        return x_t - h * u + h * w * score + (2 * w * h).sqrt() * trajectory.step_noise(x_t)


class Renoising(Sampler):
    """Jumps below s, then fresh noise up to s: gamma-sampling.

    Kim et al. 2023 (arXiv 2310.02279), section 4.

    For denoisers whose jumps follow the trajectory, as consistency distillation trains them. The
    jumps of a plain denoiser, DDIM steps, leave too little variance. With gamma = 1 every jump ends
    at data: the multistep sampling of consistency models (Song et al. 2023, arXiv 2303.01469,
    algorithm 1).

    Args:
        steps: number of steps, at least 1.
        times: a falling grid of steps + 1 values in [0, 1]; uniform from 1 to 0 by default.
        gamma: how much of the noise at s is drawn anew, in (0, 1]: all but sqrt(1 - gamma^2) of it.
            DDIM draws none.
    """

    is_stochastic = True

    def __init__(self, steps: int, times: Sequence[float] | None = None, gamma: float = 1.0):
        super().__init__(steps, times)
        if not 0 < gamma <= 1:
            raise ValueError(
                f"Renoising: gamma is {gamma}; it must lie in (0, 1]; DDIM jumps without noise"
            )
        self.gamma = gamma

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        interpolant = trajectory.interpolant
        alpha, sigma = interpolant(s)
        # the time below s from which fresh noise leads to s
        kept = math.sqrt(1 - self.gamma**2)
        below = torch.zeros_like(s)
        if kept:  # the search is not free
            below = interpolant.time_of_snr(alpha, kept * sigma)
        # jump there, and add noise
        alpha_below, sigma_below = interpolant(below)
        fresh = (sigma**2 - (alpha / alpha_below * sigma_below) ** 2).clamp(min=0).sqrt()
        jump = expand(alpha / alpha_below, x_t) * trajectory.ddim(x_t, t, below)
        return jump + expand(fresh, x_t) * trajectory.step_noise(x_t)
