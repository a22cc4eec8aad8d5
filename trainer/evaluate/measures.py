"""Measures of samples: distance, recall, first-orderness."""

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


def recall(real: Tensor, fake: Tensor, k: int = 3) -> float:
    """Return the fraction of real features inside the k-nearest-neighbour balls of the fakes (1904.06991).

    With the arguments swapped it is the precision.
    """
    radius = torch.cdist(fake, fake).kthvalue(k + 1, dim=1).values  # the nearest of all is the point itself
    return (torch.cdist(real, fake) <= radius).any(1).float().mean().item()


@torch.no_grad()
def first_orderness(denoiser: DenoiserLike, eps: Tensor, cond: Tensor | None = None, steps: int = 32) -> float:
    """Return E |eps_hat(x_t1, t1) - eps_hat(x_t2, t2)|^2 per dimension, t1 and t2 from DDIM's grid (2410.07303).

    It is zero exactly when one step draws what many steps draw. The trajectories are the denoiser's own.
    """
    walk = DDIM(steps)
    states = walk.walk(denoiser, eps, cond)[:-1]
    times = (eps.new_tensor(t).expand(len(eps)) for t in walk.times)
    hats = torch.stack([denoiser(x_t, t, cond)[1] for x_t, t in zip(states, times)])
    return 2 * hats.var(0, correction=0).mean().item()  # two independent times differ by twice the variance
