"""Points of the plane: their supports, moments and densities, and a set that is a function of its seed."""

import math

import numpy as np
import pytest
import torch

from data.plane import LAWS, Plane, checkerboard, eight_gaussians, two_moons

N = 40_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("law", LAWS)
def test_points_are_float32_centred_and_a_function_of_the_generator(law):
    points = LAWS[law](N, generator())
    assert points.shape == (N, 2) and points.dtype == torch.float32
    assert points.mean(0).abs().max() < 5 * points.std() / math.sqrt(N)
    assert torch.equal(points, LAWS[law](N, generator())) and not torch.equal(points, LAWS[law](N, generator(1)))


def normal(x, m, s):
    """Return the density of points (N, 2) under the even mixture of N(m, s^2), means (K, 2)."""
    return (-(torch.cdist(x, m) ** 2) / (2 * s**2)).exp().mean(1) / (2 * math.pi * s**2)


def density(law, x):
    """Return the laws' densities as they are described."""
    if law == "checkerboard":
        return ((x.abs() < 2).all(1) & (x.floor().sum(1) % 2 == 0)) / 8
    if law == "eight_gaussians":
        angle = torch.arange(8) * math.pi / 4
        return normal(x, 2 * torch.stack([angle.cos(), angle.sin()], 1), 0.2)
    angle = (torch.arange(200) + 0.5) * math.pi / 200
    upper = torch.stack([1.5 * angle.cos() - 0.75, 1.5 * angle.sin() - 0.375], 1)
    return normal(x, torch.cat([upper, -upper]), 0.15)


@pytest.mark.parametrize(("law", "entropy"), [("two_moons", 1.818), ("eight_gaussians", 1.698), ("checkerboard", 2.079)])
def test_points_have_the_density_and_the_entropy_that_they_are_said_to_have(law, entropy):
    """-log p, integrated over the plane and averaged over points; the least that any model can reach on held-out ones."""
    axis = torch.linspace(-3.975, 3.975, 160)
    p = density(law, torch.cartesian_prod(axis, axis))
    assert p.sum().item() * 0.05**2 == pytest.approx(1, abs=2e-3)
    assert torch.special.entr(p).sum().item() * 0.05**2 == pytest.approx(entropy, abs=2e-3)
    assert -density(law, LAWS[law](N, generator())).log().mean().item() == pytest.approx(entropy, abs=0.02)


def test_eight_gaussians_are_eight():
    points = eight_gaussians(N, generator())
    turns = points[:, 1].atan2(points[:, 0]) / (math.pi / 4)
    near = turns.round()
    centres = 2 * torch.stack([(near * math.pi / 4).cos(), (near * math.pi / 4).sin()], 1)
    assert (near.long() % 8).bincount() == pytest.approx(N / 8, rel=0.1)
    assert (points - centres).std().item() == pytest.approx(0.2, rel=0.02)


def test_the_checkerboard_is_uniform_on_its_eight_squares():
    points = checkerboard(N, generator())
    corner = points.floor().long()
    assert points.min() >= -2 and points.max() <= 2 and (corner.sum(1) % 2 == 0).all()
    assert (corner[:, 0] * 4 + corner[:, 1]).unique(return_counts=True)[1].tolist() == pytest.approx([N / 8] * 8, rel=0.1)
    assert (points - points.floor()).var(0).tolist() == pytest.approx([1 / 12] * 2, rel=0.03)


def test_two_moons_lie_on_half_circles():
    """The distance to the nearer moon's circle has the noise's spread; the law is the same turned by pi."""
    points = two_moons(N, generator())
    distances = torch.stack([((points + side * torch.tensor([0.75, 0.375])).norm(dim=1) - 1.5).abs() for side in (1, -1)])
    assert distances.min(0).values.square().mean().sqrt().item() == pytest.approx(0.15, rel=0.1)
    assert (points[:, 0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_set_is_whole_in_every_epoch_and_another_seed_is_another_set():
    source, other = Plane("two_moons", 100), Plane("two_moons", 100, seed=1)
    epoch = source.take(7, 0, 100)
    assert epoch.x.shape == (100, 2, 1, 1) and epoch.latent
    assert torch.equal(epoch.x.flatten(1).sort(0).values, source.points.sort(0).values)
    assert torch.equal(source.read(np.array([3, 1])).x.flatten(1), source.points[[3, 1]])
    assert source.manifest["shards"][0]["sha256"] != other.manifest["shards"][0]["sha256"]


@pytest.mark.parametrize(
    ("given", "said"),
    [(("moons",), "law is 'moons'"), (("two_moons", 0), r"count \(0\)"), (("two_moons", 9, -1), r"seed \(-1\)")],
)
def test_what_is_no_set_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Plane(*given)
