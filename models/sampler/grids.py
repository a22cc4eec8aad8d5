"""Grids of times for samplers: each returns steps + 1 falling values that end at 0, to give as `times=`."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from models.interpolant import Interpolant


def uniform(steps: int) -> list[float]:
    """Return equal steps from 1 to 0, what samplers walk by default."""
    return [1 - i / _at_least_one(steps) for i in range(steps + 1)]


def trailing(steps: int, levels: int = 1000) -> list[float]:
    """Return times of whole levels i at t = (i + 1) / levels, spaced backwards from the last (2305.08891, table 2).

    Args:
        steps: number of steps, at most `levels`.
        levels: of the discrete schedule that a network was trained on.
    """
    if _at_least_one(steps) > levels:
        raise ValueError(f"trailing: {steps} steps do not fit {levels} levels; take at most {levels}")
    return [round(levels - i * levels / steps) / levels for i in range(steps)] + [0.0]


def shifted(times: Sequence[float], shift: float) -> list[float]:
    """Return times moved by `logit t' = logit t + log shift` (SD3, 2403.03206, eq. 23); more than 1 leans to noise."""
    if not shift > 0:
        raise ValueError(f"shifted: shift is {shift}, it must be positive")
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def edges(windows: int | Sequence[float], name: str = "windows") -> list[float]:
    """Return the falling edges of windows that cover [0, 1], so many equal ones or those stated: a grid of one step in each.

    Args:
        windows: how many equal ones, or their edges.
        name: what errors call them.

    Raises:
        ValueError: they do not cover it.
    """
    if isinstance(windows, int):
        if windows < 1:
            raise ValueError(f"{name} is {windows}, it must be at least 1")
        return uniform(windows)
    found = [float(edge) for edge in windows]
    if len(found) < 2 or (found[0], found[-1]) != (1.0, 0.0) or not all(t > s for t, s in pairwise(found)):
        raise ValueError(f"{name} are {found}; they must cover [0, 1]: give falling edges, the first 1 and the last 0")
    return found


def through(steps: int, windows: int | Sequence[float]) -> list[float]:
    """Return times that step on every edge of windows, equal inside each; the first ones take what does not divide (2405.07510).

    Args:
        steps: number of steps, at least that of the windows.
        windows: how many equal ones, or their edges, falling from 1 to 0.
    """
    ends = edges(windows)
    if steps < len(ends) - 1:
        raise ValueError(f"steps is {steps}, fewer than the {len(ends) - 1} windows {ends}; take one in each at least")
    each, more = divmod(steps, len(ends) - 1)
    times = []
    for i, (t, s) in enumerate(pairwise(ends)):
        times += [t + (s - t) * j / (each + (i < more)) for j in range(each + (i < more))]
    return [*times, 0.0]


def karras(
    steps: int,
    interpolant: Interpolant,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> list[float]:
    """Return times at which sigma / alpha falls as EDM's does: evenly in its rho-th root, then 0 (2206.00364, eq. 5).

    Args:
        steps: number of steps; the last goes from sigma_min to t = 0, or to sigma_min where that is t = 0 (VarianceExploding).
        interpolant: whose sigma / alpha is meant.
        sigma_min: last positive sigma / alpha; .002, or the interpolant's least where that is more.
        sigma_max: first sigma / alpha; 80, or the interpolant's largest where that is less.
        rho: exponent, positive.
    """
    if not rho > 0:
        raise ValueError(f"karras: rho is {rho}, it must be positive")
    least, largest = _range(interpolant)
    low, high = _within(interpolant, sigma_min or max(least, 0.002), sigma_max or min(largest, 80.0))
    ramp = torch.linspace(0, 1, _levels(steps, low, least), dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return [*interpolant.time(torch.ones_like(levels), levels).tolist()[:steps], 0.0]


def uniform_lambda(
    steps: int, interpolant: Interpolant, sigma_min: float | None = None, sigma_max: float | None = None
) -> list[float]:
    """Return times at equal steps of lambda = log(alpha / sigma), then 0 (DPM-Solver, 2206.00927, section 3.2).

    Args:
        steps: number of steps; the last goes from sigma_min to t = 0, or to sigma_min where that is t = 0 (VarianceExploding).
        interpolant: whose lambda is meant.
        sigma_min: last positive sigma / alpha; .002, or the interpolant's least where that is more.
        sigma_max: first sigma / alpha; 80, or the interpolant's largest where that is less.
    """
    least, largest = _range(interpolant)
    low, high = _within(interpolant, sigma_min or max(least, 0.002), sigma_max or min(largest, 80.0))
    levels = torch.linspace(math.log(high), math.log(low), _levels(steps, low, least), dtype=torch.float64).exp()
    return [*interpolant.time(torch.ones_like(levels), levels).tolist()[:steps], 0.0]


def _range(interpolant: Interpolant) -> tuple[float, float]:
    """Return the least and the largest sigma / alpha, at t = 0 and t = 1."""
    alpha, sigma = interpolant(torch.tensor([0.0, 1.0], dtype=torch.float64))
    least, largest = (sigma / alpha).tolist()
    return least, largest if alpha[1] > 0 else math.inf


def _within(interpolant: Interpolant, low: float, high: float) -> tuple[float, float]:
    """Return the bounds of a grid in sigma / alpha, checked against what the interpolant reaches."""
    least, largest = _range(interpolant)
    slack = 1 + 1e-6  # bounds are often read from float32 tables
    if not (0 < low <= high and least / slack <= low and high <= largest * slack):
        raise ValueError(f"sigma_min {low} and sigma_max {high} must rise within {interpolant!r}'s [{least:.6g}, {largest:.6g}]")
    return low, high


def _levels(steps: int, low: float, least: float) -> int:
    """Return how many levels a grid spans: one more where its last is the interpolant's own end, t = 0."""
    return _at_least_one(steps) + (low <= least * (1 + 1e-6))


def _at_least_one(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"steps is {steps}, it must be at least 1")
    return steps
