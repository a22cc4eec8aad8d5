"""Log-likelihood of a denoiser's data law, by the change of variables along its probability-flow ODE."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand
from models.prediction import Velocity
from models.sampler import DenoiserLike, cost

State = tuple[Tensor, Tensor]  # x_t (B, C, H, W), and the divergence integrated so far (B,)
Field = Callable[[Tensor, Tensor], State]  # (x_t, t) -> (velocity, divergence), t of shape ()


class Trace(ABC):
    """Vectors v with E sum_k v_k v_k^T = 1: the divergence is `sum_k v_k . J v_k`."""

    @abstractmethod
    def probes(self, x: Tensor) -> Tensor:
        """Return vectors of shape (K, B or 1, C, H, W) for x (B, C, H, W); they are kept for a whole solve."""


class Exact(Trace):
    """Every dimension in turn: C H W backward passes in each evaluation."""

    def probes(self, x: Tensor) -> Tensor:
        size = x[0].numel()
        return torch.eye(size, dtype=x.dtype, device=x.device).view(size, 1, *x.shape[1:])


class Hutchinson(Trace):
    """Signs drawn at random (Rademacher): unbiased, and exact where the Jacobian is diagonal (FFJORD, 1810.01367, eq. 7).

    Args:
        generator: draws the signs, other ones for every sample.
        count: vectors, and backward passes in each evaluation.
    """

    def __init__(self, generator: torch.Generator, count: int = 1):
        if count < 1:
            raise ValueError(f"Hutchinson: count is {count}, it must be at least 1")
        self.generator, self.count = generator, count

    def probes(self, x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, (self.count, *x.shape), generator=self.generator, device=self.generator.device)
        return (2 * signs - 1).to(x) / math.sqrt(self.count)


class Solver(ABC):
    """Solves dy/dt = f(y, t) from t = first to t = last."""

    @abstractmethod
    def __call__(self, f: Field, y: State, first: float, last: float, rough: bool = False) -> State:
        """Return the state at t = last; rough: with less work, to estimate the error."""


class Fixed(Solver):
    """The classical Runge-Kutta rule of order 4, on equal steps of sqrt(t), as which sigma may grow. Rough: half as many.

    Args:
        steps: even, at least 2; each evaluates the denoiser 4 times.
    """

    def __init__(self, steps: int = 100):
        if steps < 2 or steps % 2:
            raise ValueError(f"Fixed: steps is {steps}, it must be even and at least 2: half as many tell the error")
        self.steps = steps

    def __call__(self, f: Field, y: State, first: float, last: float, rough: bool = False) -> State:
        steps = self.steps // 2 if rough else self.steps
        x, total = y
        even = torch.linspace(math.sqrt(first), math.sqrt(last), steps + 1, dtype=torch.float64, device=x.device)
        grid = even.square().clamp(first, last).to(x.dtype)
        for t, s in zip(grid[:-1], grid[1:]):
            h = s - t
            u1, d1 = f(x, t)
            u2, d2 = f(x + h / 2 * u1, t + h / 2)
            u3, d3 = f(x + h / 2 * u2, t + h / 2)
            u4, d4 = f(x + h * u3, s)
            x, total = x + h / 6 * (u1 + 2 * u2 + 2 * u3 + u4), total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        return x, total


class Adaptive(Solver):
    """torchdiffeq's dopri5, one step size for the whole batch. Rough: both tolerances times 10.

    Args:
        rtol: relative tolerance of a step, positive.
        atol: absolute tolerance of a step, positive.
        most: steps after which it gives up.
    """

    def __init__(self, rtol: float = 1e-6, atol: float = 1e-6, most: int = 10_000):
        if not (rtol > 0 and atol > 0 and most > 0):
            raise ValueError(f"Adaptive: rtol ({rtol}), atol ({atol}) and most ({most}) must be positive")
        self.rtol, self.atol, self.most = rtol, atol, most

    def __call__(self, f: Field, y: State, first: float, last: float, rough: bool = False) -> State:
        from torchdiffeq import odeint  # it brings scipy

        times, by = y[0].new_tensor([first, last]), 10 if rough else 1
        tolerances = {"rtol": by * self.rtol, "atol": by * self.atol}
        options = {"max_num_steps": self.most, "step_t": times[1:]}  # stop there: without it, it oversteps and interpolates

        def rates(t: Tensor, y: State) -> State:
            return f(y[0], t.clamp(first, last))  # the first trial step may overshoot

        try:
            x, total = odeint(rates, y, times, method="dopri5", options=options, **tolerances)
        except AssertionError as error:  # so it says that it cannot go on
            raise ValueError(f"log_prob: Adaptive cannot go on ({error}); raise rtol, atol or t_min") from error
        return x[-1], total[-1]


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
) -> tuple[Tensor, int]:
    """Return (log_p, nfe): the natural logarithm of the density of x, (B,), and the denoiser's evaluations of one sample.

    `log p(x_0) = log p(x_1) + int div u dt` along dx/dt = u = alpha' x_hat + sigma' eps_hat, from data to noise (2011.13456,
    eq. 39). Rates may be infinite at t = 0, so it starts from alpha x at t_min: log_p is that of data + (sigma / alpha) noise
    at t_min, which is what the interpolant itself means by data where sigma(0) > 0. nfe counts both solves, not backward passes.

    Args:
        denoiser: called as denoiser(x_t, t, cond); its evaluations for one sample must not see the others.
        x: data (B, C, H, W), finite; float64 is solved in float64, all else in float32.
        cond: its condition.
        trace: of the velocity's Jacobian; Exact by default.
        solver: Fixed by default.
        prior: log-density, (B,), of states at t_max; by default of N(0, sigma^2), which VP and VE reach only nearly.
        t_min: where the solve starts, in (0, t_max); raise it to 2 / N for a table of N noise levels, which has a kink at 1 / N.
        t_max: where it ends, at most 1; below 1 for predictions that are singular there.
        tolerance: largest estimate of the solver's error, in nats per dimension; the estimate is the distance to a rougher
            solve, which is mostly that one's error: on the safe side.

    Raises:
        ValueError: x is not finite; the times are none; a state is not finite on the way; the solve is under-resolved.
    """
    if not (x.ndim > 1 and len(x) and x.isfinite().all()):
        raise ValueError(f"log_prob: x, shape {tuple(x.shape)}, must hold at least one sample and be finite")
    if not 0 < t_min < t_max <= 1:
        raise ValueError(f"log_prob: t_min is {t_min}, t_max is {t_max}; needs 0 < t_min < t_max <= 1")
    trace, solver = trace or Exact(), solver or Fixed()
    with torch.inference_mode(False), torch.no_grad():
        x = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        alpha, sigma = interpolant(x.new_tensor([t_min, t_max]))
        flow = Flow(denoiser, None if cond is None else cond.clone(), trace.probes(x))  # no inference tensor is differentiated
        start = alpha[0] * x, x[0].numel() * alpha[0].log().expand(len(x))  # the change of variables from x to alpha x
        fine, rough = (solver(flow, start, t_min, t_max, rough) for rough in (False, True))
        log_p, guess = (total + (prior(end) if prior else normal(end, sigma[1])) for end, total in (fine, rough))
        error = ((log_p - guess).abs().max() / x[0].numel()).item()
    if not math.isfinite(error):
        raise ValueError(
            f"log_prob: a state is not finite between t = {t_min} and {t_max}: keep off where the prediction is singular"
        )
    if error > tolerance:
        raise ValueError(
            f"log_prob: under-resolved, the solver's error is about {error:.1e} nats per dimension, tolerance is {tolerance:g}: "
            "take more steps (Fixed), lower tolerances (Adaptive), or a larger t_min"
        )
    return log_p, flow.nfe


class Flow:
    """The velocity of a denoiser and its divergence, counting calls.

    Args:
        denoiser: of the flow.
        cond: its condition.
        probes: of the trace, (K, B or 1, C, H, W).
    """

    def __init__(self, denoiser: DenoiserLike, cond: Tensor | None, probes: Tensor):
        self.denoiser, self.cond, self.probes, self.nfe = denoiser, cond, probes, 0

    def __call__(self, x: Tensor, t: Tensor) -> State:
        """Return (u, div u), shapes (B, C, H, W) and (B,), at t of shape ().

        By backward passes: attention kernels have no forward-mode derivative.
        """
        self.nfe += cost(self.denoiser, t)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            times = t.expand(len(x))
            interpolant = self.denoiser.interpolant  # type: ignore[attr-defined]
            u = Velocity().target(interpolant, *self.denoiser(x, times, self.cond), times)
            divergence = x.new_zeros(len(x))
            for v in self.probes:
                v = v.expand_as(x)
                (row,) = torch.autograd.grad(u, x, v, retain_graph=True)
                divergence = divergence + (row * v).flatten(1).sum(1)
        return u.detach(), divergence.detach()


def normal(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the log-density, (B,), of x (B, ...) under N(0, sigma^2), sigma of shape () or (B,)."""
    return (-((x / expand(sigma, x)).square() + math.log(2 * math.pi)) / 2 - expand(sigma, x).log()).flatten(1).sum(1)


def bits_per_dim(log_p: Tensor, shape: tuple[int, ...], range: tuple[float, float] = (-1.0, 1.0), levels: int = 256) -> Tensor:
    """Return `-log_p / (D ln 2) + log2(levels / width)`, (B,): the bits that a number of a dequantised image costs at most.

    Args:
        log_p: log-density in nats of `dequantise(pixels, generator, range)`, (B,).
        shape: (C, H, W) of one sample; D is their product.
        range: of the data: the last term is 8 for (0, 1) and 7 for (-1, 1).
        levels: that the range was divided into.

    Raises:
        ValueError: an empty range, a shape without dimensions, or no level.
    """
    low, high = range
    if not low < high or math.prod(shape) < 1 or levels < 1:
        raise ValueError(f"bits_per_dim: range {range} must rise, shape {tuple(shape)} and levels ({levels}) be positive")
    return -log_p / (math.prod(shape) * math.log(2)) + math.log2(levels / (high - low))


def dequantise(pixels: Tensor, generator: torch.Generator, range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """Return `low + (high - low) (pixels + u) / 256`, u uniform in [0, 1), float32: bytes with a density (1511.01844).

    Args:
        pixels: bytes (uint8), any shape.
        generator: draws u.
        range: that the bytes fill.

    Raises:
        ValueError: pixels that are no bytes.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"dequantise: pixels are {pixels.dtype}, they must be torch.uint8 (models.codec.to_uint8 makes them)")
    low, high = range
    u = torch.rand(pixels.shape, generator=generator, device=generator.device).to(pixels.device)
    return low + (high - low) * (pixels + u) / 256
