"""Solvers of the probability-flow ODE `dx/dt = u(x_t, t)`.

Song et al. 2020 (arXiv 2011.13456), eq. 13.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.denoiser import first_level
from models.interpolant import Interpolant, expand
from models.sampler.base import DenoiserLike, Sampler, Trajectory

State = TypeVar("State", Tensor, tuple[Tensor, Tensor])
ALPHA_TOLERANCE = 1e-4  # alphas below it count as 0, which cos(pi / 2) is not exactly
EDM_RHO = 7  # EDM's noise levels are even in sigma^(1 / rho)


class RungeKuttaRule(NamedTuple):
    """An explicit Runge-Kutta rule, in a step of length 1.

    Attributes:
        nodes: where it evaluates the slope.
        matrix: for each node, the weights of the slopes before it in its state.
        weights: of all slopes, in the result.
    """

    nodes: list[float]
    matrix: list[list[float]]
    weights: list[float]


def _low_storage_rule(nodes: list[float], carry: list[float], gain: list[float]) -> RungeKuttaRule:
    """Return the rule `d = carry_i d + slope_i; x = x + gain_i d`, which keeps only x and d."""
    count = len(nodes)
    x = [0.0] * count  # weights of the slopes in x, and in d
    d = [0.0] * count
    matrix = []
    for i in range(count):
        matrix.append(x[:i])
        d = [carry[i] * weight for weight in d]
        d[i] = 1.0
        x = [weight + gain[i] * more for weight, more in zip(x, d)]
    return RungeKuttaRule(nodes, matrix, x)


# Rules for the step that ends at t = 0, where nothing can be evaluated: their nodes are below 1.
# The second: Carpenter & Kennedy 1994 (NASA TM 109112), of order 4.
TO_DATA_2 = RungeKuttaRule([0.0, 1 / 2], [[], [1 / 2]], [0.0, 1.0])
TO_DATA_4 = _low_storage_rule(
    [
        0.0,
        1432997174477 / 9575080441755,
        2526269341429 / 6820363962896,
        2006345519317 / 3224310063776,
        2802321613138 / 2924317926251,
    ],
    [
        0.0,
        -567301805773 / 1357537059087,
        -2404267990393 / 2016746695238,
        -3550918686646 / 2091501179385,
        -1275806237668 / 842570457699,
    ],
    [
        1432997174477 / 9575080441755,
        5161836677717 / 13612068292357,
        1720146321549 / 2090206949498,
        3134564353537 / 4481467310338,
        2277821191437 / 14882151754819,
    ],
)
# Rules for the step that begins at t = 0: the first slope there is replaced by a later one of the
# same state, which changes nothing up to order 2, or 3. One step loses no order of the whole.
FROM_DATA_2 = RungeKuttaRule([1 / 2, 1 / 2], [[], [1 / 2]], [0.0, 1.0])
FROM_DATA_3 = RungeKuttaRule([1 / 3, 1 / 3, 1.0], [[], [1 / 3], [-1.0, 2.0]], [0.0, 3 / 4, 1 / 4])


def linear_step(
    trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor, rule: RungeKuttaRule
) -> Tensor:
    """Return the state at s by a Runge-Kutta rule in the variables of Linear.

    `X = x_t / (alpha + sigma)` against `T = sigma / (alpha + sigma)` has the slope eps_hat - x_hat.
    On Linear this is u in t. On every interpolant, data of one point give straight lines, and the
    slope stays finite at t = 0, where sigma' may not (VariancePreserving).
    """
    interpolant = trajectory.interpolant
    first, scale = _linear_time(interpolant, t)
    last, last_scale = _linear_time(interpolant, s)
    start = x_t / expand(scale, x_t)
    h = expand(last - first, x_t)

    def move(weights: list[float], slopes: list[Tensor]) -> Tensor:
        state = start
        for weight, slope in zip(weights, slopes):
            state = state + weight * h * slope
        return state

    # the slopes at the nodes
    slopes: list[Tensor] = []
    for node, row in zip(rule.nodes, rule.matrix):
        time = t if node == 0 else s
        if 0 < node < 1:  # the search is not free
            inner = torch.lerp(first, last, node)
            time = interpolant.time_of_snr(1 - inner, inner)
        _, scale = _linear_time(interpolant, time)
        x_hat, eps_hat = trajectory(expand(scale, x_t) * move(row, slopes), time)
        slopes.append(eps_hat - x_hat)
    return expand(last_scale, x_t) * move(rule.weights, slopes)


def step_to_data(
    trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor, rule: RungeKuttaRule
) -> Tensor:
    """Return the state at s = 0 by a rule that evaluates nothing there.

    Where sigma grows like the root of t (VariancePreserving), the step is as long as the root of
    its times' difference h: its own error, h^1.5 or h^2.5, is the largest in many steps.

    A network of a discrete chain cannot be evaluated below the chain's first level: on a chain the
    rule leads to that level, and a DDIM step from it to 0.
    """
    level = torch.full_like(t, first_level(trajectory.denoiser))
    if not level[0] > 0:
        return linear_step(trajectory, x_t, t, s, rule)
    if t[0] > level[0]:
        x_t = linear_step(trajectory, x_t, t, level, rule)
        t = level
    return trajectory.ddim(x_t, t, s)


def step_from_data(
    sampler: Sampler, trajectory: Trajectory, x: Tensor, t: Tensor, s: Tensor, rule: RungeKuttaRule
) -> Tensor:
    """Return the state at s of data x at t = 0: `step_to_data` backwards."""
    level = torch.full_like(t, first_level(trajectory.denoiser))
    if not level[0] > 0:
        return linear_step(trajectory, x, t, s, rule)
    if not s[0] > level[0]:
        return Sampler.first_inverse_step(sampler, trajectory, x, t, s)
    x_level = Sampler.first_inverse_step(sampler, trajectory, x, t, level)
    return linear_step(trajectory, x_level, level, s, rule)


def _linear_time(interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return Linear's time of equal SNR, and the scale of the states relative to Linear's, (B,)."""
    alpha, sigma = interpolant(t)
    scale = alpha + sigma
    return sigma / scale, scale


class Euler(Sampler):
    """First order: Euler's method on u; for Linear it is DDIM."""

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x_t + expand(s - t, x_t) * trajectory.velocity(x_t, t)


class Midpoint(Sampler):
    """Second order: the midpoint method on u, two evaluations per step.

    The step to t = 0 is the same in Linear's variables (see `linear_step`). It evaluates the
    denoiser at t and between t and 0, never at 0.
    """

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(s - t, x_t)
        x_middle = x_t + h / 2 * trajectory.velocity(x_t, t)
        return x_t + h * trajectory.velocity(x_middle, (t + s) / 2)

    def final_step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return step_to_data(trajectory, x_t, t, s, TO_DATA_2)

    def first_inverse_step(self, trajectory: Trajectory, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return step_from_data(self, trajectory, x, t, s, FROM_DATA_2)


class Heun(Sampler):
    """Second order: Heun's method on u, two evaluations per step.

    Karras et al. 2022 (arXiv 2206.00364), algorithm 1, in t. Heun's second evaluation of the step
    to t = 0 would be at 0: that step is Midpoint's, which is of second order too.
    """

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(s - t, x_t)
        u = trajectory.velocity(x_t, t)
        return x_t + h / 2 * (u + trajectory.velocity(x_t + h * u, s))

    def final_step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return step_to_data(trajectory, x_t, t, s, TO_DATA_2)

    def first_inverse_step(self, trajectory: Trajectory, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return step_from_data(self, trajectory, x, t, s, FROM_DATA_2)


class EDMHeun(Sampler):
    """Second order: Heun's method in x_t / alpha against sigma / alpha, the last step Euler.

    Karras et al. 2022 (arXiv 2206.00364), algorithm 1: `steps` noise levels, and after the last
    one evaluation, which returns x_hat without noise; the other steps make two. EDM's grid is
    `karras`, which on EDMPath is the default; on uniform times of VariancePreserving the last step
    leaves first order only. A step that touches alpha = 0, where sigma / alpha
    is infinite, is a DDIM step (with the same two evaluations): start Linear below t = 1, as
    `karras` does.

    Args:
        steps: number of noise levels, at least 1.
        times: a falling grid of steps + 1 values in [0, 1]; uniform from 1 to 0 by default. Where
            noise is left at t = 0 (EDMPath, VarianceExploding), t = 0 is the last level, so that a
            grid holds one level too many: the levels are then spread over it, evenly in t by
            default, and else evenly in (sigma / alpha)^(1/7), as `karras` spreads them.
    """

    def __init__(self, steps: int, times: Sequence[float] | None = None):
        super().__init__(steps, times)
        self.is_uniform = times is None

    def grid(self, interpolant: Interpolant) -> list[float]:
        _, sigma = interpolant(torch.zeros((), dtype=torch.float64))
        if sigma == 0 or self.times[-1] > 0:
            return self.times
        if self.is_uniform:
            return [*np.linspace(1, 0, self.steps).tolist(), 0.0]
        # one level less, at both ends of the grid and between
        alpha, sigma = interpolant(torch.tensor(self.times, dtype=torch.float64))
        roots = (sigma / alpha).clamp(max=1 / ALPHA_TOLERANCE) ** (1 / EDM_RHO)
        positions = np.linspace(0, self.steps, self.steps)[1:-1]
        inner = torch.from_numpy(np.interp(positions, np.arange(self.steps + 1), roots))
        times = interpolant.time_of_snr(torch.ones_like(inner), inner**EDM_RHO).tolist()
        return [*[self.times[0], *times, 0.0][: self.steps], 0.0]

    def final_step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x_hat, _ = trajectory(x_t, t, s)
        return trajectory.interpolant.mix(x_hat, torch.zeros_like(x_hat), s)

    def first_inverse_step(self, trajectory: Trajectory, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        clean = trajectory.interpolant.mix(x, torch.zeros_like(x), s)
        _, eps_hat = trajectory(clean, s)
        return trajectory.interpolant.mix(x, eps_hat, s)

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
    """Fourth order: the classical Runge-Kutta method on u, four evaluations per step.

    Its last evaluation of the step to t = 0 would be at 0: that step is one of five evaluations
    before it, of fourth order in Linear's variables (see `linear_step`). Inverted, the step from
    t = 0 makes three, of third order.
    """

    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = expand(s - t, x_t)
        middle = (t + s) / 2
        k_1 = trajectory.velocity(x_t, t)
        k_2 = trajectory.velocity(x_t + h / 2 * k_1, middle)
        k_3 = trajectory.velocity(x_t + h / 2 * k_2, middle)
        k_4 = trajectory.velocity(x_t + h * k_3, s)
        return x_t + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)

    def final_step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return step_to_data(trajectory, x_t, t, s, TO_DATA_4)

    def first_inverse_step(self, trajectory: Trajectory, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return step_from_data(self, trajectory, x, t, s, FROM_DATA_3)


class DPMSolver2M(Sampler):
    """Second order, one evaluation per step: DPM-Solver++(2M), data prediction.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 2. It uses the previous step's x_hat. The first
    step, the last step, and a step that touches alpha = 0 are first order, that is DDIM. On uniform
    times of VariancePreserving the last step leaves first order in many steps.
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
