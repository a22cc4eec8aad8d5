"""Measures of samples: distances, recall, first-orderness."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from models.sampler import DDIM, DenoiserLike


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


@torch.no_grad()
def first_orderness(
    denoiser: DenoiserLike, eps: Tensor, cond: Tensor | None = None, steps: int = 32, times: Sequence[float] | None = None
) -> float:
    """Return E |eps_hat(x_t1, t1) - eps_hat(x_t2, t2)|^2 per dimension, t1 and t2 from DDIM's grid (2410.07303).

    It is zero exactly when one step draws what many steps draw. The trajectories are the denoiser's own, and begin as those
    of a sampler do.

    Args:
        denoiser: whose trajectories they are.
        eps: (B, C, H, W), the noises that they begin from.
        cond: told at every call.
        steps: of DDIM.
        times: its grid, where that is not uniform from 1 to 0.
    """
    walk = DDIM(steps, times)
    start = denoiser.interpolant.mix(torch.zeros_like(eps), eps, eps.new_tensor(walk.times[0]))  # type: ignore[attr-defined]
    states = walk.walk(denoiser, start, cond)[:-1]
    at = (eps.new_tensor(t).expand(len(eps)) for t in walk.times)
    hats = torch.stack([denoiser(x_t, t, cond)[1] for x_t, t in zip(states, at)])
    return 2 * hats.var(0, correction=0).mean().item()  # two independent times differ by twice the variance
