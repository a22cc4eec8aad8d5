"""Solvers of the probability-flow ODE `dx/dt = u(x_t, t)` (Score SDE, 2011.13456, eq. 13): nothing is drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.interpolant import expand
from models.sampler.base import DenoiserLike, Sampler, Walk

TINY = 1e-4  # an alpha below it stands for 0, which cos(pi / 2) does not reach


class Euler(Sampler):
    """First order: Euler's rule on u; on Linear it is DDIM."""

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x_t + expand(s - t, x_t) * walk.velocity(x_t, t)


class Midpoint(Sampler):
    """Second order: the midpoint rule on u, two evaluations a step."""

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(s - t, x_t)
        return x_t + h * walk.velocity(x_t + h / 2 * walk.velocity(x_t, t), (t + s) / 2)


class Heun(Sampler):
    """Second order: Heun's rule on u, two evaluations a step (2206.00364, algorithm 1, in t)."""

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(s - t, x_t)
        u = walk.velocity(x_t, t)
        return x_t + h / 2 * (u + walk.velocity(x_t + h * u, s))


class EDMHeun(Sampler):
    """Second order: Heun's rule in x_t / alpha against sigma / alpha, the last step Euler (2206.00364, algorithm 1).

    Two evaluations a step. EDM's own grid is `karras`. A step that touches alpha = 0, where sigma / alpha is infinite, is a
    DDIM step (at the same two evaluations): start Linear below t = 1, as `karras` does.
    """

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_hat, eps_t = walk(x_t, t)
        x_s = walk.interpolant.mix(x_hat, eps_t, s)  # Euler in these variables is DDIM
        _, eps_s = walk(x_s, s)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = walk.interpolant(t), walk.interpolant(s)
        half = (sigma_s - alpha_s / alpha_t * sigma_t) / 2  # alpha_s (sigma_s / alpha_s - sigma_t / alpha_t) / 2
        half = half.where((alpha_t > TINY) & (alpha_s > TINY), 0.0)
        return x_s + expand(half, x_t) * (eps_s - eps_t)


class RungeKutta4(Sampler):
    """Fourth order: the classical Runge-Kutta rule on u, four evaluations a step."""

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h, middle = expand(s - t, x_t), (t + s) / 2
        k_1 = walk.velocity(x_t, t)
        k_2 = walk.velocity(x_t + h / 2 * k_1, middle)
        k_3 = walk.velocity(x_t + h / 2 * k_2, middle)
        k_4 = walk.velocity(x_t + h * k_3, s)
        return x_t + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


class DPMSolver2M(Sampler):
    """Second order, one evaluation a step: DPM-Solver++(2M), data prediction (2211.01095, algorithm 2).

    It remembers the last step's x_hat. The first step, which has none to remember, the last, and one that touches alpha = 0
    are first order, that is DDIM.
    """

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_hat, _ = walk(x_t, t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = walk.interpolant(t), walk.interpolant(s)
        lambda_t, lambda_s = (alpha_t / sigma_t).clamp(min=0).log(), (alpha_s / sigma_s).clamp(min=0).log()
        d = x_hat
        if walk.memory is not None:
            last, x_last = walk.memory
            ratio = (lambda_s - lambda_t) / (lambda_t - last)  # 1 / r
            d = x_hat + expand(ratio.where((alpha_t > TINY) & (alpha_s > TINY), 0.0), x_t) / 2 * (x_hat - x_last)
        walk.memory = lambda_t, x_hat
        # alpha_s (1 - e^-h), h = lambda_s - lambda_t, in a form that survives alpha = 0
        return expand(sigma_s / sigma_t, x_t) * x_t + expand(alpha_s - alpha_t * sigma_s / sigma_t, x_t) * d


class Adaptive(Sampler):
    """Fifth order with steps of its own choice: Dormand and Prince's rule on u, by torchdiffeq.

    `nfe` is what the last walk cost. The error is measured over the batch, so that a sample depends, within the tolerances,
    on the others.

    Args:
        steps: number of legs, at whose ends `walk` returns the state.
        times: their ends.
        rtol: relative tolerance of a step, positive.
        atol: absolute tolerance of a step, positive.
        end: where the solver hands over to the one DDIM step that ends at t = 0, in (0, 1).
    """

    def __init__(
        self, steps: int = 1, times: Sequence[float] | None = None, rtol: float = 1e-5, atol: float = 1e-5, end: float = 1e-3
    ):
        super().__init__(steps, times)
        if not (rtol > 0 and atol > 0):
            raise ValueError(f"Adaptive: rtol and atol must be positive, got {rtol} and {atol}")
        last = min(t for t in self.times if t > 0)
        if not 0 < end < last:
            raise ValueError(f"Adaptive: end is {end}, it must lie in (0, {last:.6g}), before the last positive time")
        self.rtol, self.atol, self.end = rtol, atol, end
        self._walked: Walk | None = None

    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        from torchdiffeq import odeint  # slow to import, by scipy

        self._walked = walk
        if not x_t.isfinite().all():
            return x_t  # torchdiffeq would fail with an assertion; the sampler names it
        low, high = torch.minimum(t, s)[0], torch.maximum(t, s)[0]

        def velocity(at: Tensor, x: Tensor) -> Tensor:
            return walk.velocity(x, at.clamp(low, high).to(t).expand(len(x)))  # the first trial step may overshoot

        ends = torch.stack([t[0], s[0]]).double()
        options = {"step_t": ends[1:]}  # stop there: without it, it oversteps and interpolates
        try:
            return odeint(velocity, x_t, ends, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)[-1]
        except AssertionError as error:
            wanted = f"rtol {self.rtol}, atol {self.atol}"
            raise ValueError(f"Adaptive: no step after t = {t[0]:.6g} meets {wanted}; raise them ({error})") from None

    def land(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        end = torch.full_like(t, self.end)
        return walk.ddim(self.step(walk, x_t, t, end), end, s)

    def lift(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        end = torch.full_like(t, self.end)
        return self.step(walk, super().lift(walk, x, t, end), end, s)

    def nfe(self, denoiser: DenoiserLike | None = None) -> int:
        """Return the network evaluations that the last walk cost, guidance included."""
        if self._walked is None:
            raise ValueError("Adaptive: nfe depends on the denoiser and the noise; walk first, then ask")
        return self._walked.nfe
