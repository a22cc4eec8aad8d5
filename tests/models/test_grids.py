"""Grids of times."""

import math

import pytest
import torch

from models.interpolant import Linear, VariancePreserving
from models.sampler import DDIM, Sampler, karras, shifted, trailing, uniform, uniform_lambda
from tests.forms import every_interpolant
from tests.oracle import single


def ratio(interpolant, times):
    alpha, sigma = interpolant(torch.tensor(times, dtype=torch.float64))
    return sigma / alpha


@every_interpolant
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_every_grid_is_one_that_samplers_walk(interpolant, steps):
    grids = [uniform(steps), trailing(steps), shifted(uniform(steps), 3.0)]
    for times in [*grids, karras(steps, interpolant), uniform_lambda(steps, interpolant)]:
        assert DDIM(steps, times).times == times
        assert DDIM(steps, times)(single(interpolant), torch.randn(2, 1, 2, 2)).isfinite().all()


@every_interpolant
def test_karras_levels_are_even_in_their_root(interpolant):
    found = ratio(interpolant, karras(8, interpolant, rho=5.0)[:-1])
    root = found ** (1 / 5)
    torch.testing.assert_close(root.diff(), root.diff().mean().expand(7), rtol=1e-4, atol=1e-6)


@every_interpolant
def test_lambda_is_even(interpolant):
    steps = ratio(interpolant, uniform_lambda(8, interpolant)[:-1]).log().diff()
    torch.testing.assert_close(steps, steps.mean().expand(7), rtol=1e-4, atol=1e-6)


def test_karras_levels_are_the_papers():
    levels = ratio(Linear(), karras(18, Linear())[:-1])
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(levels, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_trailing_starts_at_the_last_level_and_uniform_is_the_default():
    assert trailing(4) == [1.0, 0.75, 0.5, 0.25, 0.0] and trailing(3, 1000) == [1.0, 0.667, 0.333, 0.0]
    assert uniform(7) == DDIM(7).times


def test_a_shift_adds_to_the_logit():
    assert shifted([1.0, 0.5, 0.0], 3.0) == [1.0, 0.75, 0.0]
    t = shifted([0.2], 2.5)[0]
    assert math.log(t / (1 - t)) == pytest.approx(math.log(0.25) + math.log(2.5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: uniform(0),
        lambda: trailing(0),
        lambda: karras(0, Linear()),
        lambda: uniform_lambda(-1, Linear()),
        lambda: trailing(1001),
        lambda: shifted([1.0], 0.0),
        lambda: karras(4, VariancePreserving(), sigma_max=1000.0),
        lambda: karras(4, Linear(), sigma_min=3.0, sigma_max=2.0),
        lambda: karras(4, Linear(0.1), sigma_min=0.01),
        lambda: karras(4, Linear(), rho=0.0),
    ],
)
def test_impossible_grids_are_refused(make):
    with pytest.raises(ValueError, match="steps|shift|sigma_min|rho") as refused:
        make()
    assert "\n" not in str(refused.value)


def test_every_sampler_walks_the_rho_grid():
    for sampler in Sampler.__subclasses__():
        if not sampler.draws:
            steps = 4
            x = sampler(steps, karras(steps, Linear(), sigma_min=0.02))(single(Linear()), torch.randn(2, 1, 2, 2))
            assert x.isfinite().all()
