"""Samplers walk t from 1 (noise) to 0 (data). Of a denoiser they need its call and its `interpolant`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.interpolant import expand
from models.prediction import Velocity

DenoiserLike = Callable[..., tuple[Tensor, Tensor]]  # with an attribute `interpolant`; analytic denoisers are welcome


class Sampler(ABC):
    """A deterministic walk along a grid of times.

    Args:
        steps: number of steps, at least 1.
        times: an explicit falling grid of steps + 1 values in [0, 1]; uniform from 1 to 0 by default.
    """

    evaluations = 1  # of the denoiser, in one step

    def __init__(self, steps: int, times: Sequence[float] | None = None):
        if steps < 1:
            raise ValueError(f"{type(self).__name__}: steps is {steps}, it must be at least 1")
        self.steps = steps
        self.times = [1 - i / steps for i in range(steps + 1)] if times is None else [float(t) for t in times]
        if len(self.times) != steps + 1:
            raise ValueError(f"{type(self).__name__}: {steps} steps need {steps + 1} times, got {len(self.times)}")
        if not all(1 >= t > s >= 0 for t, s in zip(self.times, self.times[1:])):
            raise ValueError(f"{type(self).__name__}: times must fall within [0, 1], got {self.times}")

    @abstractmethod
    def step(self, denoiser: DenoiserLike, x_t: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        """Return the state at s < t from the state x_t, shape (B, C, H, W), at t; t and s of shape (B,)."""

    def walk(self, denoiser: DenoiserLike, x_t: Tensor, cond: Tensor | None = None) -> list[Tensor]:
        """Return the states at every time of the grid, from the state x_t at its first.

        The last step, to t = 0, is a DDIM step, so that no network is evaluated at t = 0, where rows are singular.
        """
        states = [x_t]
        grid = x_t.new_tensor(self.times, dtype=torch.promote_types(x_t.dtype, torch.float32))
        for i, (t, s) in enumerate(zip(grid[:-1], grid[1:])):
            step = ddim if self.times[i + 1] == 0 else self.step
            states.append(step(denoiser, states[-1], t.expand(len(x_t)), s.expand(len(x_t)), cond))
        return states

    @torch.no_grad()
    def __call__(self, denoiser: DenoiserLike, eps: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return samples x, shape (B, C, H, W), from standard normal noise eps: the walk starts at sigma(t_0) eps."""
        start = denoiser.interpolant.mix(torch.zeros_like(eps), eps, eps.new_tensor(self.times[0]))  # type: ignore[attr-defined]
        return self.walk(denoiser, start, cond)[-1]

    def nfe(self, denoiser: DenoiserLike | None = None) -> int:
        """Return the network evaluations that one sample costs; guidance (of `denoiser`) doubles them."""
        last = 1 if self.times[-1] == 0 else self.evaluations
        return ((self.steps - 1) * self.evaluations + last) * getattr(denoiser, "evaluations", 1)


def ddim(denoiser: DenoiserLike, x_t: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
    """One DDIM step, `alpha_s x_hat + sigma_s eps_hat` (2010.02502, eq. 12): Euler on Linear."""
    return denoiser.interpolant.mix(*denoiser(x_t, t, cond), s)  # type: ignore[attr-defined]


class DDIM(Sampler):
    """First order: Euler in x_t / alpha against sigma / alpha, and Euler on the velocity for Linear."""

    def step(self, denoiser: DenoiserLike, x_t: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        return ddim(denoiser, x_t, t, s, cond)


class Heun(Sampler):
    """Second order: Heun's rule on the probability-flow ODE dx/dt = u(x_t, t) (2206.00364, algorithm 1, in t)."""

    evaluations = 2

    def step(self, denoiser: DenoiserLike, x_t: Tensor, t: Tensor, s: Tensor, cond: Tensor | None) -> Tensor:
        h = expand(s - t, x_t)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return Velocity().target(denoiser.interpolant, *denoiser(x, t, cond), t)  # type: ignore[attr-defined]

        u = velocity(x_t, t)
        return x_t + h / 2 * (u + velocity(x_t + h * u, s))
