"""Grids of times."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from models.interpolant import Linear, VariancePreserving
from models.sampler import DDIM, karras, shifted, trailing, uniform, uniform_lambda
from tests.examples import every_interpolant, public_samplers
from tests.helpers.refusals import refused
from tests.oracle import single


def noise_levels(interpolant, times):
    """Return sigma / alpha at times, in float64."""
    alpha, sigma = interpolant(torch.tensor(times, dtype=torch.float64))
    return sigma / alpha


@every_interpolant
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_samplers_accept_every_grid(interpolant, steps):
    grids = [
        uniform(steps),
        trailing(steps),
        shifted(uniform(steps), 3.0),
        karras(steps, interpolant),
        uniform_lambda(steps, interpolant),
    ]
    for times in grids:
        sampler = DDIM(steps, times)
        assert sampler.times == times
        assert sampler(single(interpolant), torch.randn(2, 1, 2, 2)).isfinite().all()


@every_interpolant
def test_karras_levels_are_even_in_their_root(interpolant):
    levels = noise_levels(interpolant, karras(8, interpolant, rho=5.0)[:-1])
    steps = (levels ** (1 / 5)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(7), rtol=1e-4, atol=1e-6)


@every_interpolant
def test_uniform_lambda_is_even_in_lambda(interpolant):
    levels = noise_levels(interpolant, uniform_lambda(8, interpolant)[:-1])
    steps = levels.log().diff()
    torch.testing.assert_close(steps, steps.mean().expand(7), rtol=1e-4, atol=1e-6)


def test_karras_levels_are_the_published_ones():
    """Karras et al. 2022 (arXiv 2206.00364), eq. 5."""
    levels = noise_levels(Linear(), karras(18, Linear())[:-1])
    largest = 80 ** (1 / 7)
    smallest = 0.002 ** (1 / 7)
    roots = [largest + i / 17 * (smallest - largest) for i in range(18)]
    expected = torch.tensor([root**7 for root in roots], dtype=torch.float64)
    torch.testing.assert_close(levels, expected, rtol=1e-9, atol=0)


def test_trailing_starts_at_the_last_level():
    assert trailing(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert trailing(3, 1000) == [1.0, 0.667, 0.333, 0.0]


def test_trailing_is_that_of_diffusers_for_every_count():
    """diffusers has more than `steps` levels for a few counts: the last of them is not used."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        numbers = [round(1000 * t) - 1 for t in trailing(steps)[:-1]]
        assert numbers == scheduler.timesteps[:steps].tolist(), steps


def test_uniform_is_the_default():
    assert uniform(7) == DDIM(7).times


def test_a_shift_adds_to_the_logit():
    assert shifted([1.0, 0.5, 0.0], 3.0) == [1.0, 0.75, 0.0]
    t = shifted([0.2], 2.5)[0]
    assert math.log(t / (1 - t)) == pytest.approx(math.log(0.25) + math.log(2.5))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: uniform(0), ["steps", 0]),
        (lambda: trailing(0), ["steps", 0]),
        (lambda: karras(0, Linear()), ["steps", 0]),
        (lambda: uniform_lambda(-1, Linear()), ["steps", -1]),
        (lambda: trailing(1001), ["steps", 1001, 1000]),
        (lambda: shifted([1.0], 0.0), ["shift", 0.0]),
        (lambda: karras(4, VariancePreserving(), sigma_max=1000.0), ["sigma_max", 1000.0]),
        (lambda: karras(4, Linear(), sigma_min=3.0, sigma_max=2.0), ["sigma_min", 3.0, 2.0]),
        (lambda: karras(4, Linear(0.1), sigma_min=0.01), ["sigma_min", 0.01]),
        (lambda: karras(4, Linear(), rho=0.0), ["rho", 0.0]),
    ],
    ids=[
        "uniform-steps",
        "trailing-steps",
        "karras-steps",
        "lambda-steps",
        "trailing-levels",
        "shift",
        "sigma_max",
        "rising-sigmas",
        "sigma_min",
        "rho",
    ],
)
def test_impossible_grids_are_refused(make, named):
    with refused(*named):
        make()


DETERMINISTIC = [cls for cls in public_samplers() if not cls.is_stochastic]


@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=lambda cls: cls.__name__)
def test_every_deterministic_sampler_accepts_the_rho_grid(sampler):
    times = karras(4, Linear(), sigma_min=0.02)
    x = sampler(4, times)(single(Linear()), torch.randn(2, 1, 2, 2))
    assert x.isfinite().all()
