"""Log-likelihood under a denoiser, by the change of variables along its probability-flow ODE."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.denoiser import DenoiserLike, cost
from models.interpolant import expand
from models.prediction import Velocity
from models.sampler.ode import dormand_prince

State = tuple[Tensor, Tensor]  # x_t (B, C, H, W), and the divergence integrated so far (B,)
Field = Callable[[Tensor, Tensor], State]  # (x_t, t) -> (velocity, divergence), t of shape ()


class Trace(ABC):
    """Vectors v with E sum_k v_k v_k^T = 1: the divergence is `sum_k v_k . J v_k`."""

    @abstractmethod
    def probes(self, x: Tensor) -> Tensor:
        """Return vectors (K, B or 1, C, H, W) for x (B, C, H, W), used for a whole solve."""


class Exact(Trace):
    """Every dimension in turn: C H W backward passes in each evaluation."""

    def probes(self, x: Tensor) -> Tensor:
        size = x[0].numel()
        return torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])


class Hutchinson(Trace):
    """Random signs (Rademacher): unbiased, and exact where the Jacobian is diagonal.

    FFJORD (Grathwohl et al. 2018, arXiv 1810.01367), eq. 7.

    Args:
        generator: draws the signs, different ones for every sample.
        count: number of vectors, and of backward passes in each evaluation.
    """

    def __init__(self, generator: torch.Generator, count: int = 1):
        if count < 1:
            raise ValueError(f"Hutchinson: count is {count}; it must be at least 1")
        self.generator = generator
        self.count = count

    def probes(self, x: Tensor) -> Tensor:
        shape = (self.count, *x.shape)
        device = self.generator.device
        signs = torch.randint(0, 2, shape, generator=self.generator, device=device)
        return (2 * signs - 1).to(x) / math.sqrt(self.count)


class Solver(ABC):
    """Solves dy/dt = f(y, t) from t = first to t = last."""

    @abstractmethod
    def __call__(self, f: Field, y: State, first: float, last: float, rough: bool = False) -> State:
        """Return the state at t = last; rough: with less work, to estimate the error."""


class FixedSolver(Solver):
    """The classical Runge-Kutta method of order 4, on equal steps of sqrt(t).

    sigma may grow like sqrt(t). A rough solve takes half as many steps.

    Args:
        steps: even, at least 2; each evaluates the denoiser 4 times.
    """

    def __init__(self, steps: int = 100):
        if steps < 2 or steps % 2:
            raise ValueError(
                f"FixedSolver: steps is {steps}; it must be even and at least 2, "
                "because half as many steps estimate the error"
            )
        self.steps = steps

    def __call__(self, f: Field, y: State, first: float, last: float, rough: bool = False) -> State:
        steps = self.steps // 2 if rough else self.steps
        x, total = y
        # equal steps of sqrt(t)
        roots = torch.linspace(
            math.sqrt(first), math.sqrt(last), steps + 1, dtype=torch.float64, device=x.device
        )
        grid = roots.square().clamp(first, last).to(x.dtype)
        # The classical method, for the state and the integral of the divergence. The sampler
        # RungeKutta4 rounds the middle of a step differently, to (t + s) / 2.
        for t, s in zip(grid[:-1], grid[1:]):
            h = s - t
            u1, d1 = f(x, t)
            u2, d2 = f(x + h / 2 * u1, t + h / 2)
            u3, d3 = f(x + h / 2 * u2, t + h / 2)
            u4, d4 = f(x + h * u3, s)
            x = x + h / 6 * (u1 + 2 * u2 + 2 * u3 + u4)
            total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        return x, total


class AdaptiveSolver(Solver):
    """torchdiffeq's dopri5, with one step size for the whole batch.

    A rough solve multiplies both tolerances by 10.

    Args:
        rtol: relative tolerance of a step, positive.
        atol: absolute tolerance of a step, positive.
        max_steps: number of steps after which it gives up.
    """

    def __init__(self, rtol: float = 1e-6, atol: float = 1e-6, max_steps: int = 10_000):
        if not (rtol > 0 and atol > 0 and max_steps > 0):
            raise ValueError(
                f"AdaptiveSolver: rtol ({rtol}), atol ({atol}) and max_steps ({max_steps}) "
                "must be positive"
            )
        self.rtol = rtol
        self.atol = atol
        self.max_steps = max_steps

    def __call__(self, f: Field, y: State, first: float, last: float, rough: bool = False) -> State:
        factor = 10 if rough else 1
        x, total = dormand_prince(
            lambda t, state: f(state[0], t),
            y,
            times=y[0].new_tensor([first, last]),
            rtol=factor * self.rtol,
            atol=factor * self.atol,
            failure="log_prob: AdaptiveSolver found no solution; raise rtol, atol or t_min",
            max_steps=self.max_steps,
        )
        return x[-1], total[-1]


class LogProb(NamedTuple):
    """The result of `log_prob`."""

    log_p: Tensor  # natural logarithm of the density of each sample, (B,)
    nfe: int  # network evaluations per sample


def log_prob(
    denoiser: DenoiserLike,
    x: Tensor,
    cond: Tensor | None = None,
    trace: Trace | None = None,
    solver: Solver | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    t_min: float = 1e-4,
    t_max: float = 1.0,
    tolerance: float = 1e-3,
) -> LogProb:
    """Return the natural logarithm of the density of x, and its cost in network evaluations.

    `log p(x_0) = log p(x_1) + int div u dt` along dx/dt = u = alpha' x_hat + sigma' eps_hat, from
    data to noise (Song et al. 2020, arXiv 2011.13456, eq. 39). The derivatives may be infinite at
    t = 0, so the solve starts from alpha x at t_min: the result is the density of data +
    (sigma / alpha) noise at t_min. Where sigma(0) > 0 this is the interpolant's own data
    distribution. The cost counts both solves, but not the backward passes.

    Args:
        denoiser: called as denoiser(x_t, t, cond). Its output for one sample must not depend on the
            others.
        x: data (B, C, H, W), finite; float64 is solved in float64, everything else in float32.
        cond: its condition.
        trace: of the velocity's Jacobian; Exact by default.
        solver: FixedSolver by default.
        prior: log-density, (B,), of states at t_max; by default of N(0, sigma^2), which VP and VE
            reach only approximately.
        t_min: where the solve starts, in (0, t_max). For a chain of N noise levels, which has a
            kink at 1 / N, raise it to 2 / N.
        t_max: where the solve ends, at most 1; below 1 for predictions that are singular at 1.
        tolerance: largest estimated error of the solver, in nats per dimension. The estimate is the
            distance to a rougher solve, which is mostly that solve's error: a safe estimate.

    Raises:
        ValueError: x or a state on the way is not finite; the times are out of range; the solve is
            under-resolved.
    """
    if not (x.ndim > 1 and len(x) and x.isfinite().all()):
        raise ValueError(
            f"log_prob: x, shape {tuple(x.shape)}, must have at least one sample and be finite"
        )
    if not 0 < t_min < t_max <= 1:
        raise ValueError(
            f"log_prob: t_min is {t_min}, t_max is {t_max}; it needs 0 < t_min < t_max <= 1"
        )
    trace = trace or Exact()
    solver = solver or FixedSolver()
    with torch.inference_mode(False), torch.no_grad():
        # Start from alpha x, by the change of variables from x to alpha x.
        x = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        alpha, sigma = denoiser.interpolant(x.new_tensor([t_min, t_max]))
        start = alpha[0] * x, x[0].numel() * alpha[0].log().expand(len(x))
        # Solve twice; no inference tensor is differentiated.
        cond = None if cond is None else cond.clone()
        field = VelocityAndDivergence(denoiser, cond, trace.probes(x))
        end, total = solver(field, start, t_min, t_max)
        rough_end, rough_total = solver(field, start, t_min, t_max, rough=True)
        # Add the prior; the difference of both estimates the error.
        prior = prior or (lambda state: normal(state, sigma[1]))
        log_p = total + prior(end)
        rough_log_p = rough_total + prior(rough_end)
        error = ((log_p - rough_log_p).abs().max() / x[0].numel()).item()
    if not math.isfinite(error):
        raise ValueError(
            f"log_prob: a state is not finite between t_min {t_min} and t_max {t_max}; "
            "avoid times where the prediction is singular"
        )
    if error > tolerance:
        raise ValueError(
            f"log_prob: under-resolved: the solver's error is about {error:.1e} nats per "
            f"dimension, tolerance is {tolerance:g}; use more steps (FixedSolver), lower "
            "tolerances (AdaptiveSolver), or a larger t_min"
        )
    return LogProb(log_p, field.nfe)


class VelocityAndDivergence:
    """The velocity of a denoiser and its divergence; it counts network evaluations.

    Args:
        denoiser: its velocity is integrated.
        cond: its condition.
        probes: of the trace, (K, B or 1, C, H, W).
    """

    def __init__(self, denoiser: DenoiserLike, cond: Tensor | None, probes: Tensor):
        self.denoiser = denoiser
        self.cond = cond
        self.probes = probes
        self.nfe = 0

    def __call__(self, x: Tensor, t: Tensor) -> State:
        """Return (u, div u), shapes (B, C, H, W) and (B,), at t of shape ().

        The divergence takes backward passes, because attention kernels have no forward-mode
        derivative.
        """
        self.nfe += cost(self.denoiser, t)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            times = t.expand(len(x))
            x_hat, eps_hat = self.denoiser(x, times, self.cond)
            u = Velocity().target(self.denoiser.interpolant, x_hat, eps_hat, times)
            divergence = x.new_zeros(len(x))
            for v in self.probes:
                v = v.expand_as(x)
                (product,) = torch.autograd.grad(u, x, v, retain_graph=True)
                divergence = divergence + (product * v).flatten(1).sum(1)
        return u.detach(), divergence.detach()


def normal(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the log-density, (B,), of x (B, ...) under N(0, sigma^2), sigma (B,) or ()."""
    sigma = expand(sigma, x)
    squares = (x / sigma).square()
    log_density = -(squares + math.log(2 * math.pi)) / 2 - sigma.log()
    return log_density.flatten(1).sum(1)


def bits_per_dim(
    log_p: Tensor,
    shape: tuple[int, ...],
    range: tuple[float, float] = (-1.0, 1.0),
    levels: int = 256,
) -> Tensor:
    """Return `-log_p / (D ln 2) + log2(levels / width)`, (B,).

    This bounds the bits per dimension of the image before dequantisation.

    Args:
        log_p: log-density in nats of dequantised images (data.dequantised), (B,).
        shape: (C, H, W) of one sample; D is their product.
        range: of the data: the last term is 8 for (0, 1) and 7 for (-1, 1).
        levels: number of levels that the range was divided into.

    Raises:
        ValueError: an empty range, a shape without dimensions, or no level.
    """
    low, high = range
    if not low < high or math.prod(shape) < 1 or levels < 1:
        raise ValueError(
            f"bits_per_dim: range {range} must rise; shape {tuple(shape)} and levels ({levels}) "
            "must be positive"
        )
    return -log_p / (math.prod(shape) * math.log(2)) + math.log2(levels / (high - low))
