"""Averages of weights against closed forms, and the loss by time over several ranks."""

import numpy as np
import pytest
import torch

from tests.helpers.refusals import refused
from trainer.callbacks.metrics_log import average_by_time
from trainer.posthoc_ema import exponent, inner_products, posthoc_weights
from trainer.step_outputs import PerSample


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_the_exponent_gives_the_width(width):
    """The profile (g + 1) t^g on [0, 1] has relative standard deviation `width`."""
    g = exponent(width)
    mean = (g + 1) / (g + 2)
    square = (g + 1) / (g + 3)
    assert np.sqrt(square - mean**2) == pytest.approx(width, rel=1e-9)


@pytest.mark.parametrize("width", [0.0, 0.29, -1.0])
def test_impossible_widths_are_refused(width):
    with refused("EMA", "width", width):
        exponent(width)


@pytest.mark.parametrize(
    ("a", "g", "b", "h"),
    [(10.0, 2.0, 10.0, 5.0), (6.0, 3.0, 10.0, 1.0), (10.0, 4.0, 3.0, 0.5)],
)
def test_products_are_integrals(a, g, b, h):
    """The product of two averaging profiles is the integral of one times the other."""
    t = np.linspace(0, 10, 200_001)
    p = (g + 1) * np.where(t <= a, t, 0) ** g / a ** (g + 1)
    q = (h + 1) * np.where(t <= b, t, 0) ** h / b ** (h + 1)
    found = inner_products(np.array([a]), np.array([g]), np.array([b]), np.array([h]))[0, 0]
    assert found == pytest.approx(np.trapezoid(p * q, t), rel=1e-3)


def test_an_average_of_a_third_width_is_reconstructed_from_snapshots_of_two():
    """Weights on a random walk are averaged online at widths .05, .08 and .1.

    The average of width .08 is then reconstructed from snapshots of the two others.
    """
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(4000, 8, generator=generator, dtype=torch.float64).cumsum(0)
    averages = {width: path[0].clone() for width in (0.05, 0.08, 0.1)}
    steps = []
    gammas = []
    snapshots = []

    # Average online, and take a snapshot of two widths every 250 steps.
    for step, current in enumerate(path, 1):
        for width, average in averages.items():
            average.lerp_(current, 1 - (1 - 1 / step) ** (exponent(width) + 1))
        if step % 250 == 0:
            for width in (0.05, 0.1):
                steps.append(float(step))
                gammas.append(exponent(width))
                snapshots.append(averages[width].clone())

    # Reconstruct the third width.
    found = posthoc_weights(np.array(steps), np.array(gammas), 4000, exponent(0.08))
    rebuilt = (torch.from_numpy(found)[:, None] * torch.stack(snapshots)).sum(0)
    gap = (averages[0.05] - averages[0.08]).abs().mean()
    assert (rebuilt - averages[0.08]).abs().mean() < 0.02 * gap
    assert found.sum() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_the_weights_of_few_snapshots_have_the_sum_one(count):
    """EDM2's code divides by the sum: solve_posthoc_coefficients."""
    steps = np.linspace(1000, 4000, count).repeat(2)
    gammas = np.array([exponent(0.05), exponent(0.1)] * count)
    target = exponent(0.15)
    found = posthoc_weights(steps, gammas, 4000, target)
    gram = inner_products(steps, gammas, steps, gammas)
    products = inner_products(steps, gammas, np.array([4000.0]), np.array([target]))[:, 0]
    expected = np.linalg.solve(gram, products)
    np.testing.assert_allclose(found, expected / expected.sum(), rtol=1e-5, atol=1e-8)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_the_loss_by_time_is_the_same_on_any_number_of_ranks():
    """Ranks add sums and counts: a bin that is empty on one rank, or on all, gives no NaN."""
    times = torch.tensor([0.0, 0.1, 0.3, 0.31, 0.32, 0.8, 0.9, 1.0])
    errors = torch.arange(8.0)
    one_rank = average_by_time([PerSample(times, errors)], 4, lambda sums: sums)
    assert one_rank == {"loss_t0": 0.5, "loss_t1": 3.0, "loss_t3": 6.0}

    # Two ranks: the first one's sums are recorded, and added to the second one's.
    first_rank = []

    def record(sums):
        first_rank.append(sums)
        return sums

    micro_batches = [PerSample(times[:2], errors[:2]), PerSample(times[2:3], errors[2:3])]
    average_by_time(micro_batches, 4, record)
    rest = PerSample(times[3:], errors[3:])
    two_ranks = average_by_time([rest], 4, lambda sums: sums + first_rank[0])
    assert two_ranks == one_rank
