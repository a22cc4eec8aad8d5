"""Distances between two sets of samples, given as points or as features."""

import torch
from torch import Tensor, nn

# torch.cdist's mode for exact distances: the fast one loses small distances to round-off.
CDIST_MODE = "donot_use_mm_for_euclid_dist"
ROWS = 1024  # of a matrix of distances that is in memory at once


class _PrecomputedFeatures(nn.Identity):
    """Stands in for torchmetrics' Inception network: its input already consists of features."""

    def __init__(self, features: int):
        super().__init__()
        self.num_features = features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to two sets of features.

    Heusel et al. 2017 (arXiv 1706.08500), eq. 6.

    Args:
        a: features, (n, d).
        b: features, (m, d).
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import

    # Every rank has all features: adding those of other ranks would count them several times.
    metric = FrechetInceptionDistance(
        _PrecomputedFeatures(a.shape[1]), normalize=True, sync_on_compute=False
    )
    metric.update(a, real=True)
    metric.update(b, real=False)
    return float(metric.compute())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return the energy distance 2 E|A - B| - E|A - A'| - E|B - B'| (Szekely and Rizzo 2013).

    It is never negative. For two sets drawn from one distribution it is zero only in the limit of
    many points: measure two such sets to see its floor.

    Args:
        a: points, (n, d).
        b: points, (m, d).
    """
    between = _mean_distance(a, b)
    within_a = _mean_distance(a, a)
    within_b = _mean_distance(b, b)
    return 2 * between - within_a - within_b


def _mean_distance(a: Tensor, b: Tensor) -> float:
    distances = torch.cdist(a, b, compute_mode=CDIST_MODE).double()
    return distances.mean().item()


def recall(real: Tensor, fake: Tensor, k: int = 3) -> float:
    """Return the fraction of real features inside the k-nearest-neighbour balls of the fake ones.

    With `real` and `fake` exchanged it is the precision.
    Kynkaanniemi et al. 2019 (arXiv 1904.06991), eq. 1 and 2.

    Args:
        real: features of real images, (n, d).
        fake: features of generated images, (m, d).
        k: neighbours that set the radius of a ball.

    Raises:
        ValueError: there are at most k fake features.
    """
    if len(fake) <= k:
        raise ValueError(
            f"recall and precision need more than {k} images of each kind, got {len(fake)}"
        )
    real, fake = _centre(real, fake)
    # Each point is its nearest neighbour itself, hence k + 1.
    radii = [torch.cdist(part, fake).kthvalue(k + 1, dim=1).values for part in fake.split(ROWS)]
    radius = torch.cat(radii)
    inside = [(torch.cdist(part, fake) <= radius).any(1) for part in real.split(ROWS)]
    return torch.cat(inside).float().mean().item()


def nearest_distance(real: Tensor, fake: Tensor) -> float:
    """Return the mean distance from a fake feature to its nearest real one.

    A student's distance minus its teacher's is the drift: if it is positive, the student lost
    some of the data by learning from generated samples (arXiv 2405.20320, arXiv 2510.25229).

    Args:
        real: features of real images, (n, d).
        fake: features of generated images, (m, d).
    """
    real, fake = _centre(real, fake)
    nearest = [torch.cdist(part, real).min(1).values for part in fake.split(ROWS)]
    return torch.cat(nearest).mean().item()


def _centre(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sets in float64, moved so that the mean of the real ones is 0.

    The fast mode of torch.cdist takes |a|^2 - 2 a b + |b|^2, which far from 0 loses the distances.
    """
    centre = real.double().mean(0)
    return real.double() - centre, fake.double() - centre
