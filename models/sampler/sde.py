"""Samplers that may draw noise on the way. The noise is an argument of the call, never the global generator."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.interpolant import expand
from models.sampler.base import Sampler, Walk


def ancestral(walk: Walk, x_t: Tensor, t: Tensor, s: Tensor, eta: float) -> Tensor:
    """Return the state at s of a DDIM step of which a part is drawn anew (2010.02502, eq. 12 and 16).

    The part is eta^2 (1 - SNR_t / SNR_s) of the noise's variance: with eta = 1 the posterior q(x_s | x_t, x_hat).
    """
    x_hat, eps_hat = walk(x_t, t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = walk.interpolant(t), walk.interpolant(s)
    part = eta**2 * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
    noise = expand((1 - part).sqrt(), x_t) * eps_hat + expand(part.sqrt(), x_t) * walk.z(x_t)
    return walk.interpolant.mix(x_hat, noise, s)


class DDIM(Sampler):
    """First order (2010.02502): Euler in x_t / alpha against sigma / alpha, and Euler on the velocity for Linear.

    Args:
        steps: number of steps, at least 1.
        times: an explicit falling grid of steps + 1 values in [0, 1]; uniform from 1 to 0 by default.
        eta: how much of the ancestral noise is drawn in a step, in [0, 1]; 0 draws none.
    """

    def __init__(self, steps: int, times: Sequence[float] | None = None, eta: float = 0.0):
        super().__init__(steps, times)
        if not 0 <= eta <= 1:
            raise ValueError(f"DDIM: eta is {eta}, it must lie in [0, 1]")
        self.eta, self.draws = eta, eta > 0

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return ancestral(walk, x_t, t, s, self.eta) if self.draws else walk.ddim(x_t, t, s)


class Ancestral(Sampler):
    """The ancestral sampler of DDPM (2006.11239, eq. 7 and algorithm 2), of any interpolant: DDIM with eta = 1."""

    draws = True

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return ancestral(walk, x_t, t, s, 1.0)


class EulerMaruyama(Sampler):
    """Weak order 1: `x - h u + h w score + sqrt(2 w h) z` has the same marginals for any w(t) >= 0 (2303.08797, 2401.08740).

    Args:
        steps: number of steps, at least 1.
        times: an explicit falling grid of steps + 1 values in [0, 1]; uniform from 1 to 0 by default.
        w: how fast noise is exchanged, as a function of t, never negative; t^2 by default, which is no stiffer than u near
            the data. 0 is Euler.
    """

    draws = True

    def __init__(self, steps: int, times: Sequence[float] | None = None, w: Callable[[Tensor], Tensor] = torch.square):
        super().__init__(steps, times)
        self.w = w
        found = w(torch.tensor(self.times, dtype=torch.float64))
        if not (found.isfinite() & (found >= 0)).all():
            raise ValueError(f"EulerMaruyama: w is {found.tolist()} at {self.times}; it must be finite and not negative")

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_hat, eps_hat = walk(x_t, t)
        alpha_rate, sigma_rate = (expand(v, x_t) for v in walk.interpolant.rates(t))
        h, w, sigma = (expand(v, x_t) for v in (t - s, self.w(t), walk.interpolant(t)[1]))
        u, score = alpha_rate * x_hat + sigma_rate * eps_hat, -eps_hat / sigma
        return x_t - h * u + h * w * score + (2 * w * h).sqrt() * walk.z(x_t)


class Renoising(Sampler):
    """Jumps below s, and noise drawn anew up to s: gamma-sampling (CTM, 2310.02279, section 4).

    For denoisers whose jumps are the trajectory's own, as consistency distillation makes them; those of a plain denoiser, DDIM
    steps, leave too little variance. With gamma 1 every jump ends at data: the multistep sampling of consistency models
    (2303.01469, algorithm 1).

    Args:
        steps: number of steps, at least 1.
        times: an explicit falling grid of steps + 1 values in [0, 1]; uniform from 1 to 0 by default.
        gamma: how much of the noise at s is drawn anew, in (0, 1]: all but sqrt(1 - gamma^2) of it; DDIM draws none.
    """

    draws = True

    def __init__(self, steps: int, times: Sequence[float] | None = None, gamma: float = 1.0):
        super().__init__(steps, times)
        if not 0 < gamma <= 1:
            raise ValueError(f"Renoising: gamma is {gamma}, it must lie in (0, 1]; DDIM jumps without noise")
        self.gamma = gamma

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        alpha, sigma = walk.interpolant(s)
        old = math.sqrt(1 - self.gamma**2)
        below = walk.interpolant.time(alpha, old * sigma) if old else torch.zeros_like(s)  # the search is not free
        a, b = walk.interpolant(below)
        fresh = (sigma**2 - (alpha / a * b) ** 2).clamp(min=0).sqrt()
        return expand(alpha / a, x_t) * walk.ddim(x_t, t, below) + expand(fresh, x_t) * walk.z(x_t)
