"""Windows of time: PeRFlow's forms (2405.07510) as an interpolant and a prediction, so that every sampler knows them.

Inside a window, from its noisy end s to its clean end e, its states are straight in t. `Piecewise` with Velocity is its form
velocity, with Noise its ddim_eps, with WindowNoise its diff_eps; on the windows' edges DDIM is the step of its scheduler.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from models.interpolant import Interpolant
from models.prediction import Prediction
from models.sampler.grids import edges

TOUCH = 1e-6  # how far rounding may have carried a time over the edge that it was meant to be


def window(t: Tensor, ends: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the ends (s, e) of the window of t, each of t's shape, e < t <= s; `ends` fall from 1 to 0."""
    s, e = torch.full_like(t, ends[0]), torch.full_like(t, ends[1])
    for high, low in pairwise(ends[1:]):
        above = t > high + TOUCH
        s, e = s.where(above, high), e.where(above, low)
    return s, e


def drawn(u: Tensor, ends: Sequence[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a window drawn by uniform numbers u in [0, 1), all as likely: (k, s, e, place), each of u's shape.

    The k-th is from s down to e; place is uniform in [0, 1) again, whatever the window.
    """
    count = len(ends) - 1
    k = (u * count).floor().clamp(max=count - 1)  # rounding may carry u x count to count
    s, e = torch.full_like(u, ends[0]), torch.full_like(u, ends[1])
    for i in range(1, count):
        s, e = s.where(k != i, ends[i]), e.where(k != i, ends[i + 1])
    return k, s, e, (u * count - k).clamp(max=1 - 2**-24)


class Piecewise(Interpolant):
    """Another interpolant's alpha and sigma on the edges of windows, straight in t between them: PeRFlow's states (2405.07510).

    Args:
        interpolant: the teacher's own.
        windows: how many equal ones, or their edges, falling from 1 to 0.
    """

    def __init__(self, interpolant: Interpolant, windows: int | list[float] = 4):
        edges(windows)  # refuses impossible ones
        self.interpolant, self.windows = interpolant, windows

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s, e = window(t, edges(self.windows))
        part = (s - t) / (s - e)
        (alpha, sigma), (beta, tau) = self.interpolant(s), self.interpolant(e)
        return torch.lerp(alpha, beta, part), torch.lerp(sigma, tau, part)


class WindowNoise(Prediction):
    """y = c eps: the noise that diffusion adds from a window's clean end to its noisy one (2405.07510, diff_eps).

    x_s = g x_e + sqrt(sigma_s^2 - g^2 sigma_e^2) y with g = alpha_s / alpha_e; eps is that of the chord through both states,
    and so y = c eps, c^2 = (alpha_e sigma_s - alpha_s sigma_e) / (alpha_e sigma_s + alpha_s sigma_e).

    Args:
        windows: how many equal ones, or their edges, falling from 1 to 0.
    """

    def __init__(self, windows: int | list[float] = 4):
        edges(windows)
        self.windows = windows

    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        s, e = window(t, edges(self.windows))
        (alpha_s, sigma_s), (alpha_e, sigma_e) = interpolant(s), interpolant(e)
        there, back = alpha_e * sigma_s, alpha_s * sigma_e
        return torch.zeros_like(t), ((there - back) / (there + back)).sqrt()
