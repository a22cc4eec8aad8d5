"""Points of the plane from three distributions of known density: the smallest data to train on."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, IndexedDataset
from data.files import canonical, digest

PlaneDistribution = Literal["two_moons", "eight_gaussians", "checkerboard"]


def two_moons(n: int, generator: torch.Generator) -> Tensor:
    """Return points (n, 2), float32: two interleaved half circles with normal noise.

    The radius is 1.5, each half circle is centred about the other's end, and the noise has
    standard deviation 0.15.
    """
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    # The lower moon is the upper one turned by pi.
    side = 2 * torch.randint(0, 2, (n, 1), generator=generator) - 1
    return 1.5 * side * upper + 0.15 * torch.randn(n, 2, generator=generator)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Return points (n, 2), float32: eight normal distributions on a circle.

    The circle has radius 2, and each normal distribution standard deviation 0.2.
    """
    angle = math.pi / 4 * torch.randint(0, 8, (n,), generator=generator)
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centres + 0.2 * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Return points (n, 2), float32: uniform on eight of the unit squares of [-2, 2)^2.

    They are the squares that have a lower left corner with an even sum of coordinates.
    """
    x = torch.randint(0, 4, (n,), generator=generator)
    y = 2 * torch.randint(0, 2, (n,), generator=generator) + x % 2
    return torch.stack([x, y], dim=1) + torch.rand(n, 2, generator=generator) - 2


DISTRIBUTIONS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "two_moons": two_moons,
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
}


class Plane(IndexedDataset):
    """A fixed set of points from a distribution in the plane.

    A point is a latent of shape (2, 1, 1): two channels of one pixel.

    Args:
        distribution: of the points.
        count: number of points.
        seed: of the points, not of their order; another seed gives held-out points.
    """

    def __init__(self, distribution: PlaneDistribution, count: int = 65536, seed: int = 0):
        names = get_args(PlaneDistribution)
        if distribution not in names:
            raise ValueError(
                f"Plane: distribution is {distribution!r}; it must be one of {', '.join(names)}"
            )
        if count < 1 or not 0 <= seed < 2**63:
            raise ValueError(
                f"Plane: count ({count}) must be at least 1, seed ({seed}) in [0, 2^63)"
            )
        self.distribution = distribution
        self.count = count
        self.seed = seed
        identity = digest(canonical(["plane", distribution, count, seed]))
        shard = {"count": count, "sha256": identity}
        self.manifest = {"kind": "points", "samples": count, "shards": [shard]}
        self.points = DISTRIBUTIONS[distribution](count, torch.Generator().manual_seed(seed))

    def __repr__(self) -> str:
        return f"{self.distribution} (seed {self.seed})"

    def read(self, indices: np.ndarray) -> Batch:
        points = self.points[torch.from_numpy(indices)]
        return Batch(points.view(-1, 2, 1, 1), latent=True)
