"""How straight a denoiser's trajectories are: first-orderness, straightness, curvature."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from models.prediction import Velocity
from models.sampler import DDIM, DenoiserLike

CURVATURE_PARTS = 8  # equal parts of [0, 1], each with its curvature


@torch.no_grad()
def measure_trajectories(
    denoiser: DenoiserLike,
    eps: Tensor,
    cond: Tensor | None = None,
    steps: int = 32,
    times: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return measures of the trajectories that DDIM follows from eps, per dimension.

    - first_orderness: E |eps_hat(x_t1, t1) - eps_hat(x_t2, t2)|^2, where t1 and t2 are any two
      times of the grid (arXiv 2410.07303). It is zero exactly when one step gives the same sample
      as many steps.
    - straightness: int E |(x_1 - x_0) - u(x_t, t)|^2 dt (Liu et al. 2022, arXiv 2209.03003,
      section 3). It is zero exactly when every state moves along a line at constant speed. On the
      Linear interpolant it is the variance of the sampler's steps, and zero if first-orderness
      is; on a curved interpolant it is not.
    - curvature: E |du/dt|^2 in each of 8 equal parts of [0, 1], starting at the data, by finite
      differences along the trajectory. A part with too few steps for a difference has None.

    Args:
        denoiser: called as denoiser(x_t, t, cond).
        eps: noises that the sampler starts from, (B, C, H, W).
        cond: the condition, as the network reads it.
        steps: steps of DDIM. The integral is a sum over them, with an error of O(1 / steps), like
            the trajectory itself.
        times: the grid of times; uniform from 1 to 0 by default.
    """
    # Follow the trajectories.
    interpolant = denoiser.interpolant
    sampler = DDIM(steps, times)
    grid = sampler.times
    start = interpolant.mix(torch.zeros_like(eps), eps, eps.new_tensor(grid[0]))
    states = sampler.integrate(denoiser, start, cond)

    # Noise estimates and velocities along them, without t = 0, where predictions are singular.
    noise_estimates = []
    velocities = []
    for x_t, time in zip(states[:-1], grid):
        t = eps.new_tensor(time).expand(len(eps))
        x_hat, eps_hat = denoiser(x_t, t, cond)
        noise_estimates.append(eps_hat)
        velocities.append(Velocity().target(interpolant, x_hat, eps_hat, t))

    # Two independent times differ, in mean square, by twice the variance.
    variance = torch.stack(noise_estimates).var(0, correction=0)
    return {
        "first_orderness": 2 * variance.mean().item(),
        "straightness": _straightness(states, velocities, grid),
        "curvature": _curvature(velocities, grid),
    }


def _straightness(states: list[Tensor], velocities: list[Tensor], grid: list[float]) -> float:
    duration = grid[0] - grid[-1]
    chord = (states[0] - states[-1]) / duration
    total = 0.0
    for (late, early), velocity in zip(pairwise(grid), velocities):
        length = (late - early) / duration
        deviation = (chord - velocity).square().mean()
        total += length * deviation.item()
    return total


def _curvature(velocities: list[Tensor], grid: list[float]) -> list[float | None]:
    # Finite differences, collected in the part of [0, 1] of their midpoint.
    parts: list[list[Tensor]] = [[] for _ in range(CURVATURE_PARTS)]
    for (late, early), (u, v) in zip(pairwise(grid), pairwise(velocities)):
        part = parts[int((late + early) / 2 * CURVATURE_PARTS)]
        difference = (u - v) / (late - early)
        part.append(difference.square().mean())

    # Their mean in each part.
    curvature: list[float | None] = []
    for part in parts:
        value = torch.stack(part).mean().item() if part else None
        curvature.append(value)
    return curvature


def first_orderness(
    denoiser: DenoiserLike,
    eps: Tensor,
    cond: Tensor | None = None,
    steps: int = 32,
    times: Sequence[float] | None = None,
) -> float:
    """Return the first-orderness; see `measure_trajectories`."""
    return measure_trajectories(denoiser, eps, cond, steps, times)["first_orderness"]


def straightness(
    denoiser: DenoiserLike, eps: Tensor, cond: Tensor | None = None, steps: int = 32
) -> float:
    """Return the straightness; see `measure_trajectories`."""
    return measure_trajectories(denoiser, eps, cond, steps)["straightness"]
