"""What all samplers share: the walk along a grid of times, its noise, its memory, and the count of its evaluations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from models.interpolant import Interpolant, Linear, expand
from models.prediction import Velocity

DenoiserLike = Callable[..., tuple[Tensor, Tensor]]  # with an attribute `interpolant`; analytic denoisers are welcome
Noise = torch.Generator | Callable[[int], Tensor]  # of the walk's steps 0, 1, ...: a generator, or z(step), (B, C, H, W)


def cost(denoiser: DenoiserLike, t: Tensor) -> int:
    """Return the network evaluations of one call at t, per sample: the denoiser's own count, 1 where it keeps none."""
    evaluations = getattr(denoiser, "evaluations", None)
    return 1 if evaluations is None else evaluations(t)


class Walk:
    """One walk of a sampler: the denoiser with its condition, the step's noise, and what one step tells the next.

    Args:
        denoiser: called as denoiser(x_t, t, cond).
        cond: told at every call.
        noise: of a sampler that draws some: a generator, or a function of the step.
    """

    def __init__(self, denoiser: DenoiserLike, cond: Tensor | None = None, noise: Noise | None = None):
        self.denoiser, self.cond, self.noise = denoiser, cond, noise
        self.index = 0  # of the step being taken
        self.memory: tuple[Tensor, Tensor] | None = None  # a multistep sampler's own; None at the start
        self.nfe = 0  # network evaluations so far

    @property
    def interpolant(self) -> Interpolant:
        """The denoiser's own interpolant."""
        return self.denoiser.interpolant  # type: ignore[attr-defined]

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the denoiser's (x_hat, eps_hat), for a jump to s if it was taught to make any, and count what it costs."""
        self.nfe += cost(self.denoiser, t)
        if s is None or not getattr(self.denoiser, "jumps", False):
            return self.denoiser(x_t, t, self.cond)
        return self.denoiser(x_t, t, self.cond, s)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return u(x_t, t) of the probability-flow ODE dx/dt = u."""
        return Velocity().target(self.interpolant, *self(x_t, t), t)

    def z(self, like: Tensor) -> Tensor:
        """Return the standard normal noise of this step, of the state's shape."""
        if isinstance(self.noise, torch.Generator):
            z = torch.randn(like.shape, generator=self.noise, dtype=like.dtype, device=self.noise.device)
        elif self.noise is not None:
            z = self.noise(self.index)
        else:
            raise ValueError("noise is None, but this sampler draws some: give a torch.Generator or a function of the step")
        if z.shape != like.shape:
            raise ValueError(f"noise of step {self.index} has the shape {tuple(z.shape)}, the state has {tuple(like.shape)}")
        return z.to(like)

    def ddim(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s of one DDIM step, `alpha_s x_hat + sigma_s eps_hat` (2010.02502, eq. 12): a taught jump too."""
        return self.interpolant.mix(*self(x_t, t, s), s)


class Sampler(ABC):
    """A walk along a grid of times.

    It starts where the interpolant allows: at sigma(t_0) eps, t_0 the grid's first time, 1 by default. Where alpha(1) is
    not zero (VariancePreserving, Stable Diffusion's betas, VarianceExploding) that leaves out alpha(t_0) x, which is what
    the field does; only samples of one's own can be started from exactly, by `walk`.

    Args:
        steps: number of steps, at least 1.
        times: an explicit falling grid of steps + 1 values in [0, 1] (see `models.sampler.grids`); uniform from 1 to 0 by
            default.
    """

    draws = False  # whether a step draws noise

    def __init__(self, steps: int, times: Sequence[float] | None = None):
        if steps < 1:
            raise ValueError(f"{type(self).__name__}: steps is {steps}, it must be at least 1")
        self.steps = steps
        self.times = [1 - i / steps for i in range(steps + 1)] if times is None else [float(t) for t in times]
        if len(self.times) != steps + 1:
            raise ValueError(f"{type(self).__name__}: {steps} steps need {steps + 1} times, got {len(self.times)}")
        if not all(1 >= t > s >= 0 for t, s in pairwise(self.times)):
            raise ValueError(f"{type(self).__name__}: times must fall within [0, 1], got {self.times}")

    @abstractmethod
    def step(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s from the state x_t, shape (B, C, H, W), at t; t and s in (0, 1], of shape (B,).

        s < t towards the data; s > t where the walk is run backwards, which a sampler that draws noise need not bear.
        """

    def land(self, walk: Walk, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s = 0: one DDIM step, so that no network is evaluated at t = 0, where rows are singular.

        Where sigma(0) is not zero (VarianceExploding .01, Karras .002, Linear's sigma_min) that much noise stays in it, as in
        flow matching (2210.02747). Score SDE and EDM take it out by one more evaluation: the denoiser's x_hat at t = 0.
        """
        return walk.ddim(x_t, t, s)

    def lift(self, walk: Walk, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s of data x at t = 0: `land` backwards, with the noise that the denoiser sees at s."""
        clean = walk.interpolant.mix(x, torch.zeros_like(x), s)
        return walk.interpolant.mix(x, walk(clean, s)[1], s)

    def walk(self, denoiser: DenoiserLike, x_t: Tensor, cond: Tensor | None = None, noise: Noise | None = None) -> list[Tensor]:
        """Return the states at every time of the grid, from the state x_t at its first; refuses those that are not finite."""
        if self.draws and noise is None:
            raise ValueError(f"{type(self).__name__}: noise is None; give a torch.Generator or a function of the step")
        states = self._along(self.times, Walk(denoiser, cond, noise), x_t)
        self._finite(states, self.times)
        return states

    def _along(self, times: list[float], walk: Walk, x_t: Tensor) -> list[Tensor]:
        states = [x_t]
        grid = x_t.new_tensor(times, dtype=torch.promote_types(x_t.dtype, torch.float32))
        for i, (t, s) in enumerate(zip(grid[:-1], grid[1:])):
            step, walk.index = self.lift if times[i] == 0 else self.land if times[i + 1] == 0 else self.step, i
            states.append(step(walk, states[-1], t.expand(len(x_t)), s.expand(len(x_t))))
        return states

    @torch.no_grad()
    def __call__(self, denoiser: DenoiserLike, eps: Tensor, cond: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Return samples x, shape (B, C, H, W), from standard normal noise eps: the walk starts at sigma(t_0) eps.

        Args:
            denoiser: called as denoiser(x_t, t, cond).
            eps: (B, C, H, W).
            cond: what the denoiser is told.
            noise: of samplers that draw some, and never the global generator: a torch.Generator, or a function of the
                step (0, 1, ...) that returns (B, C, H, W), with which a sample need not depend on the batch it is in.

        Raises:
            ValueError: the states are not finite, or a sampler that draws noise was given none.
        """
        start = denoiser.interpolant.mix(torch.zeros_like(eps), eps, eps.new_tensor(self.times[0]))  # type: ignore[attr-defined]
        return self.walk(denoiser, start, cond, noise)[-1]

    @torch.no_grad()
    def invert(self, denoiser: DenoiserLike, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the noise eps, shape (B, C, H, W), from which this sampler draws x: the same walk, backwards.

        It inverts the ODE, hence the sampler to its order of accuracy; the noise is the last state over sigma(t_0).
        """
        if self.draws:
            raise ValueError(f"{type(self).__name__}: a walk that draws noise has no inverse; use DDIM with eta 0")
        times = self.times[::-1]
        states = self._along(times, Walk(denoiser, cond), x)
        self._finite(states, times)
        end = states[-1]
        _, sigma = denoiser.interpolant(end.new_tensor(times[-1]))  # type: ignore[attr-defined]
        return end / expand(sigma, end)

    def _finite(self, states: list[Tensor], times: list[float]) -> None:
        """Name the first state that is not finite, if the last is not."""
        if states[-1].isfinite().all():
            return
        t, bad = next((t, x) for t, x in zip(times, states) if not x.isfinite().all())
        count = (~bad.isfinite()).flatten(1).any(1).sum().item()
        raise ValueError(
            f"{type(self).__name__}: samples are not finite, {count} of {len(bad)} since t = {t:.6g}; is the input finite, and "
            f"does the prediction solve at t = {times[0]:.6g} (Noise and Score do not where alpha = 0)?"
        )

    def nfe(self, denoiser: DenoiserLike | None = None) -> int:
        """Return the network evaluations that one sample costs; guidance (of `denoiser`) doubles them where it acts."""
        walk = Walk(_Silent(denoiser), noise=lambda step: torch.zeros(1, 1, 1, 1))
        self._along(self.times, walk, torch.zeros(1, 1, 1, 1))
        return walk.nfe


class _Silent:
    """A denoiser that says nothing at the cost of another one: walking it counts evaluations without making any."""

    def __init__(self, denoiser: DenoiserLike | None):
        self.interpolant = Linear()
        self.evaluations = getattr(denoiser, "evaluations", None)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x_t), torch.zeros_like(x_t)
