"""DDIM, and its stochastic forms: ancestral sampling."""

from collections.abc import Sequence

from torch import Tensor

from models.interpolant import expand
from models.sampler.base import Sampler, Trajectory


class DDIM(Sampler):
    """First order: Euler in x_t / alpha against sigma / alpha; for Linear, Euler on the velocity.

    Song et al. 2020 (arXiv 2010.02502).

    Args:
        steps: number of steps, at least 1.
        times: a falling grid of steps + 1 values in [0, 1]; uniform from 1 to 0 by default.
        eta: how much of the ancestral noise is drawn in a step, in [0, 1]; 0 draws none.
    """

    def __init__(self, steps: int, times: Sequence[float] | None = None, eta: float = 0.0):
        super().__init__(steps, times)
        if not 0 <= eta <= 1:
            raise ValueError(f"DDIM: eta is {eta}; it must lie in [0, 1]")
        self.eta = eta
        self.is_stochastic = eta > 0

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if self.is_stochastic:
            return ancestral_step(trajectory, x_t, t, s, self.eta)
        return trajectory.ddim(x_t, t, s)


class Ancestral(Sampler):
    """DDPM's ancestral sampler for any interpolant: DDIM with eta = 1.

    Ho et al. 2020 (arXiv 2006.11239), eq. 7 and algorithm 2.
    """

    is_stochastic = True

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return ancestral_step(trajectory, x_t, t, s, 1.0)


def ancestral_step(trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor, eta: float) -> Tensor:
    """Return the state at s of a DDIM step that draws part of the noise anew.

    The part is eta^2 (1 - SNR_t / SNR_s) of the noise's variance (arXiv 2010.02502, eq. 12 and 16).
    With eta = 1 the step samples the posterior q(x_s | x_t, x_hat).
    """
    x_hat, eps_hat = trajectory(x_t, t)
    alpha_t, sigma_t = trajectory.interpolant(t)
    alpha_s, sigma_s = trajectory.interpolant(s)
    part = eta**2 * (1 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2)
    kept = expand((1 - part).sqrt(), x_t) * eps_hat
    noise = kept + expand(part.sqrt(), x_t) * trajectory.step_noise(x_t)
    return trajectory.interpolant.mix(x_hat, noise, s)
