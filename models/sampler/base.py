"""What all samplers share: grids of times, noise, memory, and the count of evaluations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from models.denoiser import DenoiserLike, cost, first_level, is_two_time
from models.interpolant import Interpolant, Linear, expand
from models.prediction import Velocity

# The noise of the steps 0, 1, ...: a generator, or a function that returns (B, C, H, W).
NoiseSource = torch.Generator | Callable[[int], Tensor]


class Trajectory:
    """One run of a sampler: the denoiser, its condition, the noise and memory of the steps.

    Args:
        denoiser: called as denoiser(x_t, t, cond).
        cond: passed in every call.
        noise: for stochastic samplers: a generator, or a function of the step.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        cond: Tensor | None = None,
        noise: NoiseSource | None = None,
    ):
        self.denoiser = denoiser
        self.cond = cond
        self.noise = noise
        self.index = 0  # of the current step
        self.memory: tuple[Tensor, Tensor] | None = None  # of a multistep sampler; None at first
        self.nfe = 0  # network evaluations so far

    @property
    def interpolant(self) -> Interpolant:
        """The denoiser's interpolant."""
        return self.denoiser.interpolant

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the denoiser's (x_hat, eps_hat) and count its cost.

        Args:
            x_t: states, (B, C, H, W).
            t: their times, (B,).
            s: time of a jump, passed to denoisers that take a second time.
        """
        self.nfe += cost(self.denoiser, t)
        if s is not None and is_two_time(self.denoiser):
            return self.denoiser(x_t, t, self.cond, s)
        return self.denoiser(x_t, t, self.cond)

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return u(x_t, t) of the probability-flow ODE dx/dt = u."""
        x_hat, eps_hat = self(x_t, t)
        return Velocity().target(self.interpolant, x_hat, eps_hat, t)

    def step_noise(self, like: Tensor) -> Tensor:
        """Return the standard normal noise of this step, with the state's shape."""
        if isinstance(self.noise, torch.Generator):
            device = self.noise.device
            z = torch.randn(like.shape, generator=self.noise, dtype=like.dtype, device=device)
        elif self.noise is not None:
            z = self.noise(self.index)
        else:
            raise ValueError(
                "noise is None, but this sampler is stochastic: "
                "pass a torch.Generator or a function of the step"
            )
        if z.shape != like.shape:
            raise ValueError(
                f"noise of step {self.index} has shape {tuple(z.shape)}, "
                f"the state has shape {tuple(like.shape)}"
            )
        return z.to(like)

    def ddim(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s of one DDIM step, `alpha_s x_hat + sigma_s eps_hat`.

        Song et al. 2020 (arXiv 2010.02502), eq. 12. For a denoiser that takes a second time it is
        the learned jump.
        """
        x_hat, eps_hat = self(x_t, t, s)
        return self.interpolant.mix(x_hat, eps_hat, s)


class Sampler(ABC):
    """Integrates states along a grid of times.

    It starts at sigma(t_0) eps, where t_0 is the grid's first time, 1 by default. Where alpha(1) is
    not zero (VariancePreserving, Stable Diffusion's betas, VarianceExploding) this omits
    alpha(t_0) x, as all implementations do. Only from known samples can one start exactly, with
    `integrate`.

    Args:
        steps: number of steps, at least 1.
        times: a falling grid of steps + 1 values in [0, 1] (see `models.sampler.grids`); uniform
            from 1 to 0 by default.
    """

    is_stochastic = False  # whether a step adds noise

    def __init__(self, steps: int, times: Sequence[float] | None = None):
        name = type(self).__name__
        if steps < 1:
            raise ValueError(f"{name}: steps is {steps}; it must be at least 1")
        if times is None:
            times = [1 - i / steps for i in range(steps + 1)]
        self.steps = steps
        self.times = [float(t) for t in times]
        if len(self.times) != steps + 1:
            raise ValueError(f"{name}: {steps} steps need {steps + 1} times, got {len(self.times)}")
        if not all(1 >= t > s >= 0 for t, s in pairwise(self.times)):
            raise ValueError(f"{name}: times must fall within [0, 1], got {self.times}")

    @abstractmethod
    def step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s.

        Args:
            trajectory: evaluates the denoiser.
            x_t: the state at t, (B, C, H, W).
            t: time in (0, 1], (B,).
            s: time in (0, 1], (B,): s < t towards the data. s > t when the sampler is inverted,
                which stochastic samplers need not support.
        """

    def grid(self, interpolant: Interpolant) -> list[float]:
        """Return the times of the states on an interpolant, falling: `times`."""
        return self.times

    def final_step(self, trajectory: Trajectory, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s = 0: one DDIM step.

        No network is evaluated at t = 0, where predictions are singular. Where sigma(0) is not zero
        (VarianceExploding .01, EDMPath .002, Linear's sigma_min) that much noise remains, as in
        flow matching (arXiv 2210.02747). Score SDE and EDM remove it by one more evaluation, the
        denoiser's x_hat at t = 0, as EDMHeun does.
        """
        return trajectory.ddim(x_t, t, s)

    def first_inverse_step(self, trajectory: Trajectory, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the state at s of data x at t = 0: `final_step` backwards.

        The noise is the denoiser's estimate for the clean data at s. Where sigma(0) is not zero, x
        holds sigma(0) of it.
        """
        clean = trajectory.interpolant.mix(x, torch.zeros_like(x), s)
        _, eps_hat = trajectory(clean, s)
        _, sigma = trajectory.interpolant(t)
        return trajectory.interpolant.mix(x - expand(sigma, x) * eps_hat, eps_hat, s)

    def integrate(
        self,
        denoiser: DenoiserLike,
        x_t: Tensor,
        cond: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> list[Tensor]:
        """Return the states at every time of the grid.

        Args:
            denoiser: called as denoiser(x_t, t, cond).
            x_t: the state at the grid's first time, (B, C, H, W).
            cond: the denoiser's condition.
            noise: as in `__call__`.

        Raises:
            ValueError: the states are not finite, or a stochastic sampler got no noise.
        """
        if self.is_stochastic and noise is None:
            raise ValueError(
                f"{type(self).__name__}: noise is None; "
                "pass a torch.Generator or a function of the step"
            )
        times = self.grid(denoiser.interpolant)
        states = self._take_steps(times, Trajectory(denoiser, cond, noise), x_t)
        self._check_finite(states, times)
        return states

    def _take_steps(self, times: list[float], trajectory: Trajectory, x_t: Tensor) -> list[Tensor]:
        states = [x_t]
        grid = x_t.new_tensor(times, dtype=torch.promote_types(x_t.dtype, torch.float32))
        last = len(times) - 2
        for i, (t, s) in enumerate(zip(grid[:-1], grid[1:])):
            step: Callable[..., Tensor] = self.step
            if i == 0 and times[0] == 0:
                step = self.first_inverse_step
            elif i == last and times[-1] == 0:
                step = self.final_step
            trajectory.index = i
            states.append(step(trajectory, states[-1], t.expand(len(x_t)), s.expand(len(x_t))))
        return states

    @torch.no_grad()
    def __call__(
        self,
        denoiser: DenoiserLike,
        eps: Tensor,
        cond: Tensor | None = None,
        noise: NoiseSource | None = None,
    ) -> Tensor:
        """Return samples x, shape (B, C, H, W), from standard normal noise eps.

        Args:
            denoiser: called as denoiser(x_t, t, cond).
            eps: (B, C, H, W).
            cond: the denoiser's condition.
            noise: for stochastic samplers, never the global generator: a torch.Generator, or a
                function of the step (0, 1, ...) that returns (B, C, H, W). With a function a sample
                can be independent of the others in its batch.

        Raises:
            ValueError: the states are not finite, or a stochastic sampler got no noise.
        """
        first = eps.new_tensor(self.times[0])
        start = denoiser.interpolant.mix(torch.zeros_like(eps), eps, first)
        return self.integrate(denoiser, start, cond, noise)[-1]

    @torch.no_grad()
    def invert(self, denoiser: DenoiserLike, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the noise eps, shape (B, C, H, W), from which this sampler makes x.

        The same steps are taken backwards. This inverts the ODE, and hence the sampler up to its
        order of accuracy. The noise is the last state divided by sigma(t_0).
        """
        if self.is_stochastic:
            raise ValueError(
                f"{type(self).__name__}: a stochastic sampler has no inverse; use DDIM with eta 0"
            )
        times = self.grid(denoiser.interpolant)[::-1]
        states = self._take_steps(times, Trajectory(denoiser, cond), x)
        self._check_finite(states, times)
        end = states[-1]
        _, sigma = denoiser.interpolant(end.new_tensor(times[-1]))
        return end / expand(sigma, end)

    def _check_finite(self, states: list[Tensor], times: list[float]) -> None:
        """Raise for the first state that is not finite, if the last is not."""
        if states[-1].isfinite().all():
            return
        t, bad = next((t, x) for t, x in zip(times, states) if not x.isfinite().all())
        count = (~bad.isfinite()).flatten(1).any(1).sum().item()
        raise ValueError(
            f"{type(self).__name__}: samples are not finite, {count} of {len(bad)} since "
            f"t = {t:.6g}; is the input finite, and can the prediction be solved at "
            f"t = {times[0]:.6g} (NoisePrediction and Score cannot where alpha = 0)?"
        )

    def nfe(self, denoiser: DenoiserLike | None = None, inverse: bool = False) -> int:
        """Return the network evaluations per sample; guidance doubles them where it acts.

        Args:
            denoiser: whose evaluations are counted; by default one on Linear without guidance.
            inverse: of `invert`, which makes its evaluations at other times.
        """
        blank = torch.zeros(1, 1, 1, 1)
        counted = _CountedDenoiser(denoiser)
        trajectory = Trajectory(counted, noise=lambda step: blank)
        times = self.grid(counted.interpolant)
        self._take_steps(times[::-1] if inverse else times, trajectory, blank)
        return trajectory.nfe


class _CountedDenoiser:
    """Returns zeros at the cost of another denoiser, to count evaluations without making any."""

    def __init__(self, denoiser: DenoiserLike | None):
        self.denoiser = denoiser
        self.interpolant = denoiser.interpolant if denoiser else Linear()
        self.first_level = first_level(denoiser) if denoiser else 0.0

    def evaluations(self, t: Tensor) -> int:
        """Return the other denoiser's network evaluations of one call at t, per sample."""
        return cost(self.denoiser, t)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x_t), torch.zeros_like(x_t)
