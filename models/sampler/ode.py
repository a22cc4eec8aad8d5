"""Solvers of the probability-flow ODE `dx/dt = u(x_t, t)`.

Song et al. 2020 (arXiv 2011.13456), eq. 13.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from models.interpolant import expand
from models.sampler.base import DenoiserLike, Sampler, Trajectory

State = TypeVar("State", Tensor, tuple[Tensor, Tensor])
ALPHA_TOLERANCE = 1e-4  # alphas below it count as 0, which cos(pi / 2) is not exactly


class Euler(Sampler):
    """First order: Euler's method on u; for Linear it is DDIM."""

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x_t + expand(s - t, x_t) * trajectory.velocity(x_t, t)


class Midpoint(Sampler):
    """Second order: the midpoint method on u, two evaluations per step."""

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(s - t, x_t)
        x_middle = x_t + h / 2 * trajectory.velocity(x_t, t)
        return x_t + h * trajectory.velocity(x_middle, (t + s) / 2)


class Heun(Sampler):
    """Second order: Heun's method on u, two evaluations per step.

    Karras et al. 2022 (arXiv 2206.00364), algorithm 1, in t.
    """

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(s - t, x_t)
        u = trajectory.velocity(x_t, t)
        return x_t + h / 2 * (u + trajectory.velocity(x_t + h * u, s))


class EDMHeun(Sampler):
    """Second order: Heun's method in x_t / alpha against sigma / alpha, the last step Euler.

    Karras et al. 2022 (arXiv 2206.00364), algorithm 1. Two evaluations per step. EDM's own grid is
    `karras`. A step that touches alpha = 0, where sigma / alpha is infinite, is a DDIM step (with
    the same two evaluations): start Linear below t = 1, as `karras` does.
    """

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        interpolant = trajectory.interpolant
        # Euler in these variables is DDIM.
        x_hat, eps_t = trajectory(x_t, t)
        x_s = interpolant.mix(x_hat, eps_t, s)
        # Correct by half of alpha_s (sigma_s / alpha_s - sigma_t / alpha_t) (eps_s - eps_t).
        _, eps_s = trajectory(x_s, s)
        alpha_t, sigma_t = interpolant(t)
        alpha_s, sigma_s = interpolant(s)
        half = (sigma_s - alpha_s / alpha_t * sigma_t) / 2
        half = half.where((alpha_t > ALPHA_TOLERANCE) & (alpha_s > ALPHA_TOLERANCE), 0.0)
        return x_s + expand(half, x_t) * (eps_s - eps_t)


class RungeKutta4(Sampler):
    """Fourth order: the classical Runge-Kutta method on u, four evaluations per step."""

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(s - t, x_t)
        middle = (t + s) / 2
        k_1 = trajectory.velocity(x_t, t)
        k_2 = trajectory.velocity(x_t + h / 2 * k_1, middle)
        k_3 = trajectory.velocity(x_t + h / 2 * k_2, middle)
        k_4 = trajectory.velocity(x_t + h * k_3, s)
        return x_t + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)


class DPMSolver2M(Sampler):
    """Second order, one evaluation per step: DPM-Solver++(2M), data prediction.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 2. It uses the previous step's x_hat. The first
    step, the last step, and a step that touches alpha = 0 are first order, that is DDIM.
    """

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_hat, _ = trajectory(x_t, t)
        alpha_t, sigma_t = trajectory.interpolant(t)
        alpha_s, sigma_s = trajectory.interpolant(s)
        lambda_t = (alpha_t / sigma_t).clamp(min=0).log()
        lambda_s = (alpha_s / sigma_s).clamp(min=0).log()
        # extrapolate x_hat from the previous step's
        d = x_hat
        if trajectory.memory is not None:
            lambda_before, x_before = trajectory.memory
            ratio = (lambda_s - lambda_t) / (lambda_t - lambda_before)  # 1 / r
            ratio = ratio.where((alpha_t > ALPHA_TOLERANCE) & (alpha_s > ALPHA_TOLERANCE), 0.0)
            d = x_hat + expand(ratio, x_t) / 2 * (x_hat - x_before)
        trajectory.memory = lambda_t, x_hat
        # alpha_s (1 - e^-h) with h = lambda_s - lambda_t, in a form that is valid for alpha = 0
        weight = alpha_s - alpha_t * sigma_s / sigma_t
        return expand(sigma_s / sigma_t, x_t) * x_t + expand(weight, x_t) * d


def dormand_prince(
    f: Callable[[Tensor, State], State],
    y: State,
    times: Tensor,
    rtol: float,
    atol: float,
    failure: str,
    max_steps: int = 2**31 - 1,
) -> State:
    """Solve dy/dt = f(t, y) by torchdiffeq's dopri5, with one step size for the whole batch.

    Args:
        f: the derivative; it is evaluated only between both times.
        y: the state at the first time, a tensor or a tuple of tensors.
        times: first and last, in either order, (2,).
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        failure: message of the error if there is no solution.
        max_steps: number of steps after which it gives up.

    Returns:
        The states at both times, stacked.

    Raises:
        ValueError: no step meets the tolerances, or too many are needed.
    """
    from torchdiffeq import odeint  # slow to import: it imports scipy

    low = times.min()
    high = times.max()

    def derivative(t: Tensor, y: State) -> State:
        return f(t.clamp(low, high), y)  # the first trial step may overshoot

    # step_t: stop exactly at the end; otherwise it oversteps and interpolates
    options = {"max_num_steps": max_steps, "step_t": times[1:]}
    try:
        return odeint(derivative, y, times, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:  # torchdiffeq's way to give up
        raise ValueError(f"{failure} ({error})") from None


class DormandPrince(Sampler):
    """Fifth order with adaptive steps: the Dormand-Prince method on u, by torchdiffeq.

    `nfe` is the cost of the last call. The error is measured over the whole batch, so that a
    sample depends, within the tolerances, on the others.

    Args:
        steps: number of intervals, at whose ends `integrate` returns the state.
        times: their ends.
        rtol: relative tolerance of a step, positive.
        atol: absolute tolerance of a step, positive.
        end: time, in (0, 1), from which one DDIM step leads to t = 0.
    """

    def __init__(
        self,
        steps: int = 1,
        times: Sequence[float] | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        end: float = 1e-3,
    ):
        super().__init__(steps, times)
        if not (rtol > 0 and atol > 0):
            raise ValueError(
                f"DormandPrince: rtol is {rtol} and atol is {atol}; they must be positive"
            )
        last = min(t for t in self.times if t > 0)
        if not 0 < end < last:
            raise ValueError(
                f"DormandPrince: end is {end}; it must lie in (0, {last:.6g}), "
                "before the last positive time"
            )
        self.rtol = rtol
        self.atol = atol
        self.end = end
        self._last: Trajectory | None = None

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        self._last = trajectory
        if not x_t.isfinite().all():
            return x_t  # torchdiffeq would fail with an assertion; `integrate` names the state

        def velocity(time: Tensor, x: Tensor) -> Tensor:
            return trajectory.velocity(x, time.to(t).expand(len(x)))

        ends = torch.stack([t[0], s[0]]).double()
        failure = (
            f"DormandPrince: no step after t = {t[0]:.6g} meets rtol {self.rtol}, "
            f"atol {self.atol}; raise them"
        )
        return dormand_prince(velocity, x_t, ends, self.rtol, self.atol, failure)[-1]

    def final_step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        end = torch.full_like(t, self.end)
        return trajectory.ddim(self.step(trajectory, x_t, t, end), end, s)

    def first_inverse_step(self, trajectory: Trajectory, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        end = torch.full_like(t, self.end)
        x_end = super().first_inverse_step(trajectory, x, t, end)
        return self.step(trajectory, x_end, end, s)

    def nfe(self, denoiser: DenoiserLike | None = None, inverse: bool = False) -> int:
        """Return the network evaluations of the last call, guidance included."""
        if self._last is None:
            raise ValueError(
                "DormandPrince: nfe depends on the denoiser and the noise; sample first"
            )
        return self._last.nfe
