"""Averages against closed forms, and the watch."""

import numpy as np
import pytest
import torch

from trainer.callbacks.metrics import by_time
from trainer.posthoc import exponent, products, weights


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.25])
def test_the_exponent_gives_the_width(width):
    """The profile (g + 1) t^g on [0, 1] has relative standard deviation `width`."""
    g = exponent(width)
    mean, square = (g + 1) / (g + 2), (g + 1) / (g + 3)
    assert np.sqrt(square - mean**2) == pytest.approx(width, rel=1e-9)


def test_impossible_widths_are_refused():
    for width in (0.0, 0.29, -1.0):
        with pytest.raises(ValueError, match="EMA width"):
            exponent(width)


def test_products_are_integrals():
    t = np.linspace(0, 10, 200_001)
    for a, g, b, h in [(10.0, 2.0, 10.0, 5.0), (6.0, 3.0, 10.0, 1.0), (10.0, 4.0, 3.0, 0.5)]:
        p = (g + 1) * np.where(t <= a, t, 0) ** g / a ** (g + 1)
        q = (h + 1) * np.where(t <= b, t, 0) ** h / b ** (h + 1)
        found = products(np.array([a]), np.array([g]), np.array([b]), np.array([h]))[0, 0]
        assert found == pytest.approx(np.trapezoid(p * q, t), rel=1e-3)


def test_snapshots_of_two_widths_make_a_third():
    """Weights that wander are averaged online at .05, .1 and .08; the last is reconstructed from the others."""
    generator = torch.Generator().manual_seed(0)
    path = torch.randn(4000, 8, generator=generator, dtype=torch.float64).cumsum(0)
    averages = {width: path[0].clone() for width in (0.05, 0.08, 0.1)}
    steps, gammas, snapshots = [], [], []
    for step, now in enumerate(path, 1):
        for width, average in averages.items():
            average.lerp_(now, 1 - (1 - 1 / step) ** (exponent(width) + 1))
        if step % 250 == 0:
            for width in (0.05, 0.1):
                steps.append(float(step)), gammas.append(exponent(width)), snapshots.append(averages[width].clone())
    found = weights(np.array(steps), np.array(gammas), 4000, exponent(0.08))
    rebuilt = (torch.from_numpy(found)[:, None] * torch.stack(snapshots)).sum(0)
    near = (averages[0.05] - averages[0.08]).abs().mean()
    assert (rebuilt - averages[0.08]).abs().mean() < 0.02 * near
    assert found.sum() == pytest.approx(1, abs=1e-2)


def test_the_loss_by_time_is_one_on_any_number_of_ranks():
    """Ranks add sums and counts: a bin that is empty on one of them, or on all, makes no NaN."""
    times = torch.tensor([0.0, 0.1, 0.3, 0.31, 0.32, 0.8, 0.9, 1.0])
    errors = torch.arange(8.0)
    whole = by_time([(times, errors)], 4, lambda sums: sums)
    assert whole == {"loss_t0": 0.5, "loss_t1": 3.0, "loss_t3": 6.0}
    sums = []
    by_time([(times[:2], errors[:2]), (times[2:3], errors[2:3])], 4, lambda mine: sums.append(mine) or mine)
    assert by_time([(times[3:], errors[3:])], 4, lambda mine: mine + sums[0]) == whole
