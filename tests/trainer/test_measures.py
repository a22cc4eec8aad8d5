"""Measures against closed forms."""

import pytest
import torch

from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.windows import Piecewise
from tests.forms import every_interpolant
from tests.oracle import Point, single
from trainer.evaluate import drift, grid
from trainer.evaluate.measures import PARTS, first_orderness, frechet, nearest, recall, straightness, trajectories


def test_frechet_distance_of_gaussians():
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)); here in each of 4 dimensions (3 - 0)^2 + (2 - 1)^2."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50_000, 4, generator=generator)
    assert frechet(a, a) == pytest.approx(0, abs=1e-4)
    assert frechet(a, 2 * b + 3) == pytest.approx(4 * (9 + 1), rel=0.02)


def test_recall_and_precision():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(500, 8, generator=generator)
    assert recall(real, real) == 1
    assert recall(real, torch.randn(500, 8, generator=generator)) > 0.7
    half = real[real[:, 0] > 0] * 1.0
    assert recall(real, half) < recall(real, real) and recall(half, real) == 1  # half is missed, none is wrong
    assert recall(real, real + 100) == 0


def test_first_orderness_is_zero_where_one_step_is_enough():
    eps = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    assert first_orderness(Point(Linear(), torch.zeros(1, 1, 2, 2, dtype=torch.float64)), eps) == pytest.approx(0, abs=1e-20)
    assert first_orderness(single(Trigonometric(), 0.0, 1.0), eps) > 0.1


SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1)  # mean 0 and variance 1: all that an affine map reads


def gaussian(interpolant, mean, std, steps=20_000):
    """Return straightness and curvature of N(mean, std^2) by quadrature: x_t = alpha m + S c, S^2 = alpha^2 std^2 + sigma^2."""
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    (alpha, sigma), (a, b) = interpolant(t), interpolant(ends)
    (beta, tau) = interpolant.rates(t)
    spread = torch.hypot(alpha * std, sigma)
    rise, turn = (alpha * beta * std**2 + sigma * tau) / spread, beta  # S' and alpha'
    first, last = torch.hypot(a * std, b)
    c = ((b[1] * SIGNS - a[1] * mean) / last).flatten()[:, None]  # the walk starts at sigma(1) eps
    gap = (a[1] - a[0] - turn) * mean + (last - first - rise) * c
    bend = (turn.diff() * mean + rise.diff() * c) * steps
    parts = [part.square().mean().item() for part in bend[:, : steps - steps % PARTS].tensor_split(PARTS, dim=1)]
    return gap.square().mean().item(), parts


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_straightness_and_curvature_on_linear(std):
    """The walk's error is of first order in the step: halved steps halve it."""
    wanted, bends = gaussian(Linear(), 0.5, std)
    assert wanted == pytest.approx(quad_of_linear(std), rel=1e-6)
    found = [trajectories(single(Linear(), 0.5, std), SIGNS, steps=n) for n in (64, 128)]
    gaps = [abs(f["straightness"] - wanted) for f in found]
    assert gaps[1] < 0.05 * wanted + 1e-4 and gaps[1] < 0.6 * gaps[0] + 1e-9
    assert found[1]["curvature"] == pytest.approx(bends, rel=0.2)


def quad_of_linear(std):
    """int (1 - s - S')^2 dt = int S'^2 dt - (1 - s)^2, S' = (t - (1 - t) s^2) / S."""
    from scipy.integrate import quad

    def rate(t):
        return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) ** 0.5

    return quad(lambda t: rate(t) ** 2, 0, 1)[0] - (1 - std) ** 2


@every_interpolant
def test_straightness_is_the_integral_on_every_interpolant(interpolant):
    found = [trajectories(single(interpolant, 0.5, 0.7), SIGNS, steps=n)["straightness"] for n in (48, 96)]
    assert 2 * found[1] - found[0] == pytest.approx(gaussian(interpolant, 0.5, 0.7)[0], rel=0.05)  # without the first order


@every_interpolant
def test_measures_are_finite_and_a_point_is_first_order_everywhere(interpolant):
    """Curved but first-order: eps_hat is constant along the one point's trajectories everywhere; straight, on some."""
    point = Point(interpolant, torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64))
    found = trajectories(point, SIGNS)
    assert torch.tensor([found["straightness"], *found["curvature"]]).isfinite().all()
    assert found["first_orderness"] == pytest.approx(0, abs=1e-12)
    straight = isinstance(interpolant, Linear | Piecewise)
    assert (found["straightness"] < 1e-20) == straight and (max(found["curvature"]) < 1e-15) == straight


def test_the_measures_of_few_steps():
    found = trajectories(single(VariancePreserving()), SIGNS, steps=4)
    assert len(found["curvature"]) == PARTS and found["curvature"].count(None) == 5
    assert straightness(single(Linear()), SIGNS, steps=1) == pytest.approx(0, abs=1e-20)


def test_drift_is_how_much_farther_the_nearest_real_ones_are():
    real = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    near, far = nearest(real, torch.tensor([[0.0, 1.0], [9.0, 0.0]])), nearest(real, torch.tensor([[3.0, 4.0], [10.0, 1.0]]))
    assert (near, far) == (1, 3) and nearest(real, real) == 0
    rows = drift({"1": {"nearest": far, "fd": 2.0}}, {"nearest": near})
    assert rows == {"1": {"nearest": 3.0, "fd": 2.0, "drift": 2.0}}


def test_grid_lays_rows_out():
    image = grid(torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 2, 2), 3)
    assert image.size == (6, 4) and image.getpixel((0, 0)) == 0 and image.getpixel((5, 3)) == 255
