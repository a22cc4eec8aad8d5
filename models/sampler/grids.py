"""Grids of times for samplers: steps + 1 falling values that end at 0, passed as `times=`."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from models.interpolant import Interpolant

ROUNDING = 1 + 1e-6  # bounds are often read from float32 tables


def uniform(steps: int) -> list[float]:
    """Return equal steps from 1 to 0, the samplers' default."""
    _check_steps(steps)
    return [1 - i / steps for i in range(steps + 1)]


def trailing(steps: int, levels: int = 1000) -> list[float]:
    """Return times of whole levels i at t = (i + 1) / levels, spaced backwards from the last.

    Lin et al. 2023 (arXiv 2305.08891), table 2, with the rounding of diffusers' `trailing`.

    Args:
        steps: number of steps, at most `levels`.
        levels: of the discrete schedule that a network was trained on.
    """
    _check_steps(steps)
    if steps > levels:
        raise ValueError(f"trailing: steps is {steps}; it must be at most levels, {levels}")
    numbers = np.round(np.arange(levels, 0, -levels / steps))[:steps]
    return [*(numbers / levels).tolist(), 0.0]


def shifted(times: Sequence[float], shift: float) -> list[float]:
    """Return times moved by `logit t' = logit t + log shift`; a shift above 1 favours noise.

    Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206), eq. 23.
    """
    if not shift > 0:
        raise ValueError(f"shifted: shift is {shift}; it must be positive")
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def window_edges(windows: int | Sequence[float], name: str = "windows") -> list[float]:
    """Return the falling edges of windows that cover [0, 1]: a grid with one step per window.

    Args:
        windows: the number of equal windows, or their edges.
        name: of the argument, for error messages.

    Raises:
        ValueError: the windows do not cover [0, 1].
    """
    if isinstance(windows, int):
        if windows < 1:
            raise ValueError(f"{name} is {windows}; it must be at least 1")
        return uniform(windows)
    edges = [float(edge) for edge in windows]
    covers = len(edges) >= 2 and edges[0] == 1.0 and edges[-1] == 0.0
    if not covers or not all(t > s for t, s in pairwise(edges)):
        raise ValueError(
            f"{name} are {edges}; they must cover [0, 1]: "
            "pass falling edges, the first 1 and the last 0"
        )
    return edges


def window_grid(steps: int, windows: int | Sequence[float]) -> list[float]:
    """Return times that include every edge of windows, with equal steps inside each window.

    Yan et al. 2024 (arXiv 2405.07510). If the steps do not divide evenly, the noisiest windows take
    one more.

    Args:
        steps: number of steps, at least the number of windows.
        windows: the number of equal windows, or their edges, falling from 1 to 0.
    """
    edges = window_edges(windows)
    count = len(edges) - 1
    if steps < count:
        raise ValueError(
            f"steps is {steps}; it must be at least the number of windows, {count} ({edges})"
        )
    steps_each, remainder = divmod(steps, count)
    times = []
    for i, (t, s) in enumerate(pairwise(edges)):
        inside = steps_each + (i < remainder)
        times += [t + (s - t) * j / inside for j in range(inside)]
    return [*times, 0.0]


def karras(
    steps: int,
    interpolant: Interpolant,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
) -> list[float]:
    """Return times at which sigma / alpha falls evenly in its rho-th root, then 0.

    Karras et al. 2022 (arXiv 2206.00364), eq. 5.

    Args:
        steps: number of steps. The last goes from sigma_min to t = 0; or it goes to sigma_min,
            where that is t = 0 (VarianceExploding).
        interpolant: gives the times of the noise levels.
        sigma_min: last positive sigma / alpha; .002, or the interpolant's least if that is larger.
        sigma_max: first sigma / alpha; 80, or the interpolant's largest if that is smaller.
        rho: exponent, positive.
    """
    if not rho > 0:
        raise ValueError(f"karras: rho is {rho}; it must be positive")
    least, largest = _range(interpolant)
    low = sigma_min or max(least, 0.002)
    high = sigma_max or min(largest, 80.0)
    _check_range(interpolant, low, high)
    ramp = torch.linspace(0, 1, _levels(steps, low, least), dtype=torch.float64)
    root_low = low ** (1 / rho)
    root_high = high ** (1 / rho)
    return _times(interpolant, (root_high + ramp * (root_low - root_high)) ** rho, steps)


def uniform_lambda(
    steps: int,
    interpolant: Interpolant,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> list[float]:
    """Return times at equal steps of lambda = log(alpha / sigma), then 0.

    DPM-Solver (Lu et al. 2022, arXiv 2206.00927), section 3.2.

    Args:
        steps: number of steps. The last goes from sigma_min to t = 0; or it goes to sigma_min,
            where that is t = 0 (VarianceExploding).
        interpolant: gives the times of the noise levels.
        sigma_min: last positive sigma / alpha; .002, or the interpolant's least if that is larger.
        sigma_max: first sigma / alpha; 80, or the interpolant's largest if that is smaller.
    """
    least, largest = _range(interpolant)
    low = sigma_min or max(least, 0.002)
    high = sigma_max or min(largest, 80.0)
    _check_range(interpolant, low, high)
    count = _levels(steps, low, least)
    logs = torch.linspace(math.log(high), math.log(low), count, dtype=torch.float64)
    return _times(interpolant, logs.exp(), steps)


def _times(interpolant: Interpolant, levels: Tensor, steps: int) -> list[float]:
    """Return the times of the first `steps` noise levels sigma / alpha, then 0."""
    times = interpolant.time_of_snr(torch.ones_like(levels), levels).tolist()
    return [*times[:steps], 0.0]


def _range(interpolant: Interpolant) -> tuple[float, float]:
    """Return the least and the largest sigma / alpha, at t = 0 and t = 1."""
    alpha, sigma = interpolant(torch.tensor([0.0, 1.0], dtype=torch.float64))
    least, largest = (sigma / alpha).tolist()
    return least, largest if alpha[1] > 0 else math.inf


def _check_range(interpolant: Interpolant, low: float, high: float) -> None:
    """Check the bounds of a grid in sigma / alpha against what the interpolant reaches."""
    least, largest = _range(interpolant)
    if not (0 < low <= high and least / ROUNDING <= low and high <= largest * ROUNDING):
        raise ValueError(
            f"sigma_min is {low} and sigma_max is {high}; they must rise within the range "
            f"[{least:.6g}, {largest:.6g}] of {interpolant!r}"
        )


def _levels(steps: int, low: float, least: float) -> int:
    """Return the number of levels of a grid: one more if the last is the interpolant's at t = 0."""
    _check_steps(steps)
    return steps + (low <= least * ROUNDING)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
