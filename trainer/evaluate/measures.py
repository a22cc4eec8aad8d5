"""Measures of samples: distances, recall; and of trajectories: first-orderness, straightness, curvature."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from models.interpolant import Interpolant
from models.prediction import Velocity
from models.sampler import DDIM, DenoiserLike

PARTS = 8  # of [0, 1], in which curvature is told apart


class _AsTheyAre(nn.Identity):
    """Tells torchmetrics that features are given, not images."""

    def __init__(self, features: int):
        super().__init__()
        self.num_features = features


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets of features, (n, d) and (m, d) (1706.08500)."""
    metric = FrechetInceptionDistance(_AsTheyAre(a.shape[1]), normalize=True)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return float(metric.compute())


def energy(a: Tensor, b: Tensor) -> float:
    """Return the energy distance 2 E|A - B| - E|A - A'| - E|B - B'| of points (n, d) and (m, d) (Szekely & Rizzo, 2013).

    It is never negative, and zero for equal laws only as n and m grow: two sets of one law show its floor.
    """
    exact = "donot_use_mm_for_euclid_dist"  # the fast way loses small distances to round-off
    between, in_a, in_b = (torch.cdist(p, q, compute_mode=exact).double().mean().item() for p, q in ((a, b), (a, a), (b, b)))
    return 2 * between - in_a - in_b


def recall(real: Tensor, fake: Tensor, k: int = 3) -> float:
    """Return the fraction of real features inside the k-nearest-neighbour balls of the fakes (1904.06991).

    With the arguments swapped it is the precision.
    """
    radius = torch.cdist(fake, fake).kthvalue(k + 1, dim=1).values  # the nearest of all is the point itself
    return (torch.cdist(real, fake) <= radius).any(1).float().mean().item()


def nearest(real: Tensor, fake: Tensor) -> float:
    """Return the mean distance of fake features (m, d) to the nearest real ones (n, d): a student's less its teacher's is drift.

    Drift above zero is what a student lost of the data by learning from samples (2405.20320, 2510.25229).
    """
    return torch.cdist(fake, real).min(1).values.mean().item()


@torch.no_grad()
def trajectories(
    denoiser: DenoiserLike, eps: Tensor, cond: Tensor | None = None, steps: int = 32, times: Sequence[float] | None = None
) -> dict[str, Any]:
    """Return measures of a denoiser's own trajectories from eps, (B, C, H, W), along DDIM's walk of some steps, per dimension.

    - first_orderness: E |eps_hat(x_t1, t1) - eps_hat(x_t2, t2)|^2, t1 and t2 any two times of the grid (2410.07303): zero exactly
      when one step draws what many steps draw.
    - straightness: int E |(x_1 - x_0) - u(x_t, t)|^2 dt (2209.03003, section 3): zero exactly when states move evenly along
      lines. On Linear it is the variance of the walk's own steps, and zero where first-orderness is; on a curved interpolant
      it is not.
    - curvature: E |du/dt|^2 in each of 8 equal parts of [0, 1], the data's end first, by differences along the walk.

    Args:
        denoiser: called as denoiser(x_t, t, cond).
        eps: noises that the walk starts from, as a sampler's does.
        cond: what the denoiser is told.
        steps: of DDIM; the integral is their sum, off by O(1 / steps), as the walk is.
        times: its grid, where that is not uniform from 1 to 0.
    """
    interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
    walk = DDIM(steps, times)
    states = walk.walk(denoiser, interpolant.mix(torch.zeros_like(eps), eps, eps.new_tensor(walk.times[0])), cond)
    hats, velocities = [], []
    for x_t, at in zip(states[:-1], walk.times):  # not at t = 0, where rows are singular
        t = eps.new_tensor(at).expand(len(eps))
        x_hat, eps_hat = denoiser(x_t, t, cond)
        hats.append(eps_hat)
        velocities.append(Velocity().target(interpolant, x_hat, eps_hat, t))
    way = (states[0] - states[-1]) / (walk.times[0] - walk.times[-1])
    lengths = [(late - soon) / (walk.times[0] - walk.times[-1]) for late, soon in pairwise(walk.times)]
    parts: list[list[Tensor]] = [[] for _ in range(PARTS)]
    for (late, soon), (u, v) in zip(pairwise(walk.times), pairwise(velocities)):
        parts[int((late + soon) / 2 * PARTS)].append(((u - v) / (late - soon)).square().mean())
    return {
        "first_orderness": 2 * torch.stack(hats).var(0, correction=0).mean().item(),  # two times differ by twice the variance
        "straightness": sum(length * (way - u).square().mean().item() for length, u in zip(lengths, velocities)),
        "curvature": [torch.stack(part).mean().item() if part else None for part in parts],
    }


def first_orderness(
    denoiser: DenoiserLike, eps: Tensor, cond: Tensor | None = None, steps: int = 32, times: Sequence[float] | None = None
) -> float:
    """Return the first-orderness of `trajectories`."""
    return trajectories(denoiser, eps, cond, steps, times)["first_orderness"]


def straightness(denoiser: DenoiserLike, eps: Tensor, cond: Tensor | None = None, steps: int = 32) -> float:
    """Return the straightness of `trajectories`."""
    return trajectories(denoiser, eps, cond, steps)["straightness"]
