"""Points in the plane: supports, moments, densities, and sets that are functions of a seed."""

import math

import numpy as np
import pytest
import torch

from data.plane import DISTRIBUTIONS, Plane, checkerboard, eight_gaussians, two_moons
from tests.helpers.refusals import refused

N = 40_000


def make_generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_points_are_float32_and_centred(name):
    points = DISTRIBUTIONS[name](N, make_generator())
    assert points.shape == (N, 2)
    assert points.dtype == torch.float32
    assert points.mean(0).abs().max() < 5 * points.std() / math.sqrt(N)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_points_are_a_function_of_the_generator(name):
    points = DISTRIBUTIONS[name](N, make_generator())
    assert torch.equal(points, DISTRIBUTIONS[name](N, make_generator()))
    assert not torch.equal(points, DISTRIBUTIONS[name](N, make_generator(1)))


def mixture_density(x, means, std):
    """Return the density of points x (N, 2) under the even mixture of N(mean, std^2)."""
    squares = torch.cdist(x, means) ** 2
    return (-squares / (2 * std**2)).exp().mean(1) / (2 * math.pi * std**2)


def density(name, x):
    """Return the density of a distribution at points x (N, 2), by its definition."""
    if name == "checkerboard":
        inside = (x.abs() < 2).all(1)
        even = x.floor().sum(1) % 2 == 0
        return (inside & even) / 8
    if name == "eight_gaussians":
        angle = torch.arange(8) * math.pi / 4
        return mixture_density(x, 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.2)
    angle = (torch.arange(200) + 0.5) * math.pi / 200
    upper = torch.stack([1.5 * angle.cos() - 0.75, 1.5 * angle.sin() - 0.375], 1)
    return mixture_density(x, torch.cat([upper, -upper]), 0.15)


ENTROPIES = [("two_moons", 1.818), ("eight_gaussians", 1.698), ("checkerboard", 2.079)]


@pytest.mark.parametrize(("name", "entropy"), ENTROPIES)
def test_points_have_the_documented_density_and_entropy(name, entropy):
    """The entropy is the mean of -log p: the least loss that a model can reach on held-out points.

    It is integrated over the plane and averaged over points.
    """
    axis = torch.linspace(-3.975, 3.975, 160)
    area = 0.05**2  # of a cell
    p = density(name, torch.cartesian_prod(axis, axis))
    assert p.sum().item() * area == pytest.approx(1, abs=2e-3)
    assert torch.special.entr(p).sum().item() * area == pytest.approx(entropy, abs=2e-3)

    points = DISTRIBUTIONS[name](N, make_generator())
    assert -density(name, points).log().mean().item() == pytest.approx(entropy, abs=0.02)


def test_eight_gaussians_are_eight():
    points = eight_gaussians(N, make_generator())
    turns = points[:, 1].atan2(points[:, 0]) / (math.pi / 4)
    nearest = turns.round()
    angle = nearest * math.pi / 4
    centres = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    assert (nearest.long() % 8).bincount() == pytest.approx(N / 8, rel=0.1)
    assert (points - centres).std().item() == pytest.approx(0.2, rel=0.02)


def test_the_checkerboard_is_uniform_on_its_eight_squares():
    points = checkerboard(N, make_generator())
    corner = points.floor().long()
    assert points.min() >= -2
    assert points.max() <= 2
    assert (corner.sum(1) % 2 == 0).all()

    counts = (corner[:, 0] * 4 + corner[:, 1]).unique(return_counts=True)[1]
    assert counts.tolist() == pytest.approx([N / 8] * 8, rel=0.1)
    assert (points - points.floor()).var(0).tolist() == pytest.approx([1 / 12] * 2, rel=0.03)


def test_two_moons_lie_on_half_circles():
    """The distance to the nearer circle has the spread of the noise; both moons are as frequent."""
    points = two_moons(N, make_generator())
    distances = []
    for side in (1, -1):
        centre = side * torch.tensor([0.75, 0.375])
        distances.append(((points + centre).norm(dim=1) - 1.5).abs())
    nearer = torch.stack(distances).min(0).values
    assert nearer.square().mean().sqrt().item() == pytest.approx(0.15, rel=0.1)
    assert (points[:, 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_every_epoch_holds_every_point_once():
    source = Plane("two_moons", 100)
    epoch = source.take(7, 0, 100)
    assert epoch.x.shape == (100, 2, 1, 1)
    assert epoch.latent
    assert torch.equal(epoch.x.flatten(1).sort(0).values, source.points.sort(0).values)


def test_points_are_read_by_index():
    source = Plane("two_moons", 100)
    assert torch.equal(source.read(np.array([3, 1])).x.flatten(1), source.points[[3, 1]])


def test_another_seed_is_another_set():
    first = Plane("two_moons", 100).manifest["shards"][0]
    second = Plane("two_moons", 100, seed=1).manifest["shards"][0]
    assert first["sha256"] != second["sha256"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("moons",), ("'moons'", "two_moons", "eight_gaussians", "checkerboard")),
        (("two_moons", 0), ("count", 0)),
        (("two_moons", 9, -1), ("seed", -1)),
    ],
    ids=["unknown distribution", "no points", "negative seed"],
)
def test_invalid_arguments_are_named(arguments, named):
    with refused("Plane", *named, kind=ValueError):
        Plane(*arguments)
