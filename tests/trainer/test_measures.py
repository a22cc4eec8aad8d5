"""Distances of samples and measures of trajectories against closed forms."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.windows import Piecewise
from tests.examples import every_interpolant
from tests.helpers.refusals import refused
from tests.oracle import Point, single
from trainer.jobs.evaluate import add_drift
from trainer.jobs.run_sampler import tile_images
from trainer.metrics.sample_distances import frechet_distance, nearest_distance, recall
from trainer.metrics.trajectories import (
    CURVATURE_PARTS,
    first_orderness,
    measure_trajectories,
    straightness,
)

# Distances of samples


def test_the_feature_distance_of_gaussians():
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)): in each of 4 dimensions 3^2 + (2 - 1)^2."""
    a, b = torch.randn(2, 50_000, 4, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(a, 2 * b + 3) == pytest.approx(4 * (9 + 1), rel=0.02)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def real(generator):
    return torch.randn(500, 8, generator=generator)


def test_recall_is_one_for_equal_sets_and_zero_for_distant_ones(real):
    assert recall(real, real) == 1
    assert recall(real, real + 100) == 0


def test_recall_of_samples_of_the_same_distribution_is_high(real, generator):
    assert recall(real, torch.randn(500, 8, generator=generator)) > 0.7


def test_half_of_the_data_has_low_recall_and_full_precision(real):
    half = real[real[:, 0] > 0] * 1.0
    assert recall(real, half) < recall(real, real)
    assert recall(half, real) == 1


def test_features_far_from_zero_have_the_distances_of_their_differences(generator):
    """As by numpy in float64, from the differences themselves; more rows than a block has."""
    features = 100 + 0.05 * torch.randn(1500, 16, generator=generator)
    real, fake = features[:1100], features[1100:] + 0.02

    def distances(a, b):
        gaps = a.double().numpy()[:, None] - b.double().numpy()[None]
        return np.sqrt((gaps**2).sum(-1))

    radius = np.sort(distances(fake, fake), axis=1)[:, 3]
    expected = (distances(real, fake) <= radius).any(1).mean()
    assert 0.05 < expected < 0.95
    assert recall(real, fake) == pytest.approx(expected, abs=1e-6)
    nearest = distances(fake, real).min(1).mean()
    assert nearest_distance(real, fake) == pytest.approx(nearest, rel=1e-6)


def test_copies_of_one_point_are_in_its_ball_of_radius_zero(real):
    """Also far from 0: exact copies have the distance 0."""
    real = 100 + real
    fake = real[:1].repeat(9, 1)
    assert recall(fake, real) == 1
    assert recall(real, fake) == pytest.approx(1 / len(real))


def test_fewer_images_than_neighbours_are_refused(real):
    with refused("3", "recall", "2"):
        recall(real, real[:2])


def test_drift_is_the_growth_of_the_distance_to_the_nearest_real_samples():
    real = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    near = nearest_distance(real, torch.tensor([[0.0, 1.0], [9.0, 0.0]]))
    far = nearest_distance(real, torch.tensor([[3.0, 4.0], [10.0, 1.0]]))
    assert near == 1
    assert far == 3
    assert nearest_distance(real, real) == 0
    found = add_drift({"1": {"nearest": far, "fd": 2.0}}, {"nearest": near})
    assert found == {"1": {"nearest": 3.0, "fd": 2.0, "drift": 2.0}}


def test_a_grid_fills_rows_from_left_to_right():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    image = np.array(tile_images(images, 3))
    assert image.shape == (6, 10)  # with gaps of two pixels between the images
    assert [image[0, column] for column in (0, 4, 8)] == [0, 51, 102]
    assert [image[4, column] for column in (0, 4, 8)] == [153, 204, 255]
    assert (image[2:4] == 255).all()
    assert (image[:, [2, 3, 6, 7]] == 255).all()


# Measures of trajectories. Noises of mean 0 and variance 1: all that an affine map depends on.
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1)


def test_first_orderness_is_zero_where_one_step_is_exact():
    eps = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    point = Point(Linear(), torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    assert first_orderness(point, eps) == pytest.approx(0, abs=1e-20)
    assert first_orderness(single(Trigonometric(), 0.0, 1.0), eps) > 0.1


def gaussian(interpolant, mean, std, steps=20_000):
    """Return straightness and curvature for N(mean, std^2) by quadrature.

    The trajectory is x_t = alpha m + S c with S^2 = alpha^2 std^2 + sigma^2.
    """
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = interpolant(t)
    alpha_ends, sigma_ends = interpolant(ends)
    alpha_rate, sigma_rate = interpolant.derivatives(t)

    # S, its derivative, and its values at t = 0 and 1.
    spread = torch.hypot(alpha * std, sigma)
    spread_rate = (alpha * alpha_rate * std**2 + sigma * sigma_rate) / spread
    first, last = torch.hypot(alpha_ends * std, sigma_ends)

    # The trajectory starts at sigma(1) eps, which gives c.
    c = ((sigma_ends[1] * SIGNS - alpha_ends[1] * mean) / last).flatten()[:, None]
    gap = (alpha_ends[1] - alpha_ends[0] - alpha_rate) * mean + (last - first - spread_rate) * c
    bend = (alpha_rate.diff() * mean + spread_rate.diff() * c) * steps
    parts = bend[:, : steps - steps % CURVATURE_PARTS].tensor_split(CURVATURE_PARTS, dim=1)
    return gap.square().mean().item(), [part.square().mean().item() for part in parts]


def straightness_on_linear(std):
    """Return int (1 - s - S')^2 dt = int S'^2 dt - (1 - s)^2, S' = (t - (1 - t) s^2) / S."""

    def rate(t):
        return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) ** 0.5

    return quad(lambda t: rate(t) ** 2, 0, 1)[0] - (1 - std) ** 2


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_straightness_and_curvature_on_linear(std):
    """The error of the discrete trajectory is of first order: half the step, half the error."""
    wanted, bends = gaussian(Linear(), 0.5, std)
    assert wanted == pytest.approx(straightness_on_linear(std), rel=1e-6)
    coarse = measure_trajectories(single(Linear(), 0.5, std), SIGNS, steps=64)
    fine = measure_trajectories(single(Linear(), 0.5, std), SIGNS, steps=128)
    coarse_error = abs(coarse["straightness"] - wanted)
    fine_error = abs(fine["straightness"] - wanted)
    assert fine_error < 0.05 * wanted + 1e-4
    assert fine_error < 0.6 * coarse_error + 1e-9
    assert fine["curvature"] == pytest.approx(bends, rel=0.2)


@every_interpolant
def test_straightness_is_the_integral_on_every_interpolant(interpolant):
    """Richardson's extrapolation removes the error of first order."""
    denoiser = single(interpolant, 0.5, 0.7)
    coarse = measure_trajectories(denoiser, SIGNS, steps=48)["straightness"]
    fine = measure_trajectories(denoiser, SIGNS, steps=96)["straightness"]
    wanted, _ = gaussian(interpolant, 0.5, 0.7)
    assert 2 * fine - coarse == pytest.approx(wanted, rel=0.05)


@every_interpolant
def test_the_trajectories_of_a_point_are_first_order_on_every_interpolant(interpolant):
    """eps_hat is constant along them on every interpolant; only on some they are straight."""
    point = Point(interpolant, torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64))
    found = measure_trajectories(point, SIGNS)
    assert torch.tensor([found["straightness"], *found["curvature"]]).isfinite().all()
    assert found["first_orderness"] == pytest.approx(0, abs=1e-12)
    straight = isinstance(interpolant, Linear | Piecewise)
    assert (found["straightness"] < 1e-20) == straight
    assert (max(found["curvature"]) < 1e-15) == straight


def test_few_steps_leave_parts_of_the_curvature_unmeasured():
    found = measure_trajectories(single(VariancePreserving()), SIGNS, steps=4)
    assert len(found["curvature"]) == CURVATURE_PARTS
    assert found["curvature"].count(None) == 5


def test_one_step_is_straight():
    assert straightness(single(Linear()), SIGNS, steps=1) == pytest.approx(0, abs=1e-20)
