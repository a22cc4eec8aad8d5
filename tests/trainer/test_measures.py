"""Measures against closed forms."""

import pytest
import torch

from models.interpolant import Linear, Trigonometric
from tests.oracle import Point, single
from trainer.evaluate import grid
from trainer.evaluate.measures import first_orderness, frechet, recall


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


def test_grid_lays_rows_out():
    image = grid(torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 2, 2), 3)
    assert image.size == (6, 4) and image.getpixel((0, 0)) == 0 and image.getpixel((5, 3)) == 255
