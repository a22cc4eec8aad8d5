"""Points of the plane under three laws whose densities are known: the smallest data that a model can be trained on."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, Set
from data.files import canonical, digest

Law = Literal["two_moons", "eight_gaussians", "checkerboard"]


def two_moons(n: int, generator: torch.Generator) -> Tensor:
    """Return points (n, 2), float32: two half circles of radius 1.5, each about the other's end, with normal noise of .15."""
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    side = 2 * torch.randint(0, 2, (n, 1), generator=generator) - 1  # the lower moon is the upper one turned by pi
    return 1.5 * side * upper + 0.15 * torch.randn(n, 2, generator=generator)


def eight_gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Return points (n, 2), float32: normal with standard deviation .2 about eight places on a circle of radius 2."""
    angle = math.pi / 4 * torch.randint(0, 8, (n,), generator=generator)
    return 2 * torch.stack([angle.cos(), angle.sin()], dim=1) + 0.2 * torch.randn(n, 2, generator=generator)


def checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Return points (n, 2), float32: uniform on the unit squares of [-2, 2)^2 whose corners' coordinates have an even sum."""
    column = torch.randint(0, 4, (n,), generator=generator)
    row = 2 * torch.randint(0, 2, (n,), generator=generator) + column % 2
    return torch.stack([column, row], dim=1) + torch.rand(n, 2, generator=generator) - 2


LAWS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "two_moons": two_moons,
    "eight_gaussians": eight_gaussians,
    "checkerboard": checkerboard,
}


class Plane(Set):
    """Points drawn once and for all from a law of the plane, as latents of shape (2, 1, 1): two channels of one pixel.

    Args:
        law: of the points.
        count: how many there are.
        seed: of the points, not of their order: another seed gives held-out ones.
    """

    def __init__(self, law: Law, count: int = 65536, seed: int = 0):
        if law not in get_args(Law):
            raise ValueError(f"Plane: law is {law!r}, it must be one of {', '.join(get_args(Law))}")
        if count < 1 or not 0 <= seed < 2**63:
            raise ValueError(f"Plane: count ({count}) must be at least 1, seed ({seed}) in [0, 2^63)")
        self.law, self.count, self.seed = law, count, seed
        shard = {"count": count, "sha256": digest(canonical(["plane", law, count, seed]))}
        self.manifest = {"kind": "points", "samples": count, "shards": [shard]}
        self.points = LAWS[law](count, torch.Generator().manual_seed(seed))

    def __repr__(self) -> str:
        return f"{self.law} (seed {self.seed})"

    def read(self, indices: np.ndarray) -> Batch:
        return Batch(self.points[torch.from_numpy(indices)].view(-1, 2, 1, 1), latent=True)
