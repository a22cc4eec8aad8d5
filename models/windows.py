"""Windows of time: PeRFlow's parametrisations as an interpolant and a prediction.

Yan et al. 2024 (arXiv 2405.07510). Inside a window, from its noisy end s to its clean end e, the
states are linear in t. On `Piecewise`, the prediction Velocity is the paper's velocity,
NoisePrediction its ddim_eps, and WindowNoise its diff_eps. On the windows' edges, DDIM is the step
of its scheduler.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from models.interpolant import Interpolant
from models.prediction import Prediction
from models.sampler.grids import window_edges

EDGE_TOLERANCE = 1e-6  # how far rounding may have moved a time beyond the edge that it should be


def window(t: Tensor, edges: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the ends (s, e) of the window that contains t, e < t <= s, each with t's shape.

    Args:
        t: times in [0, 1].
        edges: of the windows, falling from 1 to 0.
    """
    s = torch.full_like(t, edges[0])
    e = torch.full_like(t, edges[1])
    for high, low in pairwise(edges[1:]):
        above = t > high + EDGE_TOLERANCE
        s = s.where(above, high)
        e = e.where(above, low)
    return s, e


class WindowSample(NamedTuple):
    """Windows drawn at random, one for each sample."""

    number: Tensor  # of the window, 0 the noisiest
    s: Tensor  # its noisy end
    e: Tensor  # its clean end
    u: Tensor  # uniform in [0, 1), independent of the window


def sample_window(u: Tensor, edges: Sequence[float]) -> WindowSample:
    """Choose a window for each of the uniform numbers u in [0, 1), all with equal probability."""
    count = len(edges) - 1
    number = (u * count).floor().clamp(max=count - 1)  # rounding may carry u * count to count
    s = torch.full_like(u, edges[0])
    e = torch.full_like(u, edges[1])
    for i in range(1, count):
        s = s.where(number != i, edges[i])
        e = e.where(number != i, edges[i + 1])
    return WindowSample(number, s, e, (u * count - number).clamp(max=1 - 2**-24))


class Piecewise(Interpolant):
    """PeRFlow's states: another interpolant on the windows' edges, linear in t between them.

    Args:
        interpolant: the teacher's own.
        windows: the number of equal windows, or their edges, falling from 1 to 0.
    """

    def __init__(self, interpolant: Interpolant, windows: int | list[float] = 4):
        window_edges(windows)  # raises for invalid windows
        self.interpolant = interpolant
        self.windows = windows

    @property
    def first_level(self) -> float:
        return self.interpolant.first_level

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s, e = window(t, window_edges(self.windows))
        part = (s - t) / (s - e)
        alpha_s, sigma_s = self.interpolant(s)
        alpha_e, sigma_e = self.interpolant(e)
        return torch.lerp(alpha_s, alpha_e, part), torch.lerp(sigma_s, sigma_e, part)


class WindowNoise(Prediction):
    """y = c eps: the noise that diffusion adds from a window's clean end to its noisy end.

    x_s = g x_e + sqrt(sigma_s^2 - g^2 sigma_e^2) y with g = alpha_s / alpha_e. eps is that of the
    line through both states, so that
    c^2 = (alpha_e sigma_s - alpha_s sigma_e) / (alpha_e sigma_s + alpha_s sigma_e).

    Args:
        windows: the number of equal windows, or their edges, falling from 1 to 0.
    """

    def __init__(self, windows: int | list[float] = 4):
        window_edges(windows)  # raises for invalid windows
        self.windows = windows

    def coefficients(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        s, e = window(t, window_edges(self.windows))
        alpha_s, sigma_s = interpolant(s)
        alpha_e, sigma_e = interpolant(e)
        forward = alpha_e * sigma_s
        backward = alpha_s * sigma_e
        c = ((forward - backward) / (forward + backward)).sqrt()
        return torch.zeros_like(t), c
