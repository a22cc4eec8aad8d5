"""Time distributions against the papers' formulas; test_objectives.py checks each with defaults."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from data.batch import Batch
from models.interpolant import Linear, Trigonometric, VariancePreserving
from tests.examples import every_interpolant
from tests.helpers.refusals import refused
from trainer.objectives.parts.time_distributions import (
    CosMap,
    Exponential,
    LogitNormal,
    LogNormalSigma,
    Mode,
    TimeDistribution,
    Uniform,
    UShaped,
    invert_increasing,
)
from trainer.step_random import StepRandom

DISTRIBUTIONS = [
    *(
        cls()
        for cls in TimeDistribution.__subclasses__()
        if cls.__module__ == TimeDistribution.__module__
    ),
    Mode(-1.0),
    Mode(0.0),
    Mode(1.7),
    Exponential(-4.0),
    Exponential(1e-3),
    Exponential(80.0),
    LogNormalSigma(0.0, 1.0),
    LogNormalSigma(-1.2, 1.2, VariancePreserving()),
    LogNormalSigma(2.0, 3.0, Linear(0.3)),
]


every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)


@every_distribution
def test_the_density_is_the_inverse_slope_of_the_quantiles(distribution):
    """q'(u) p(q(u)) = 1, in float64."""
    u = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    h = 1e-6
    slope = (distribution.quantile(u + h) - distribution.quantile(u - h)) / (2 * h)
    found = slope * distribution.density(distribution.quantile(u))
    torch.testing.assert_close(found, torch.ones_like(u), rtol=1e-5, atol=0)


@every_distribution
def test_the_density_integrates_to_one(distribution):
    """Between the distribution's quantiles, so that the quadrature finds every peak."""
    points = torch.linspace(1e-4, 1 - 1e-4, 60, dtype=torch.float64)
    ends = distribution.quantile(points).tolist()

    def density(t):
        return distribution.density(torch.as_tensor(t)).numpy()

    parts = [integrate.fixed_quad(density, a, b, n=8)[0] for a, b in pairwise(ends)]
    assert sum(parts) == pytest.approx(1 - 2e-4, abs=2e-3)


@every_distribution
def test_histograms_of_samples_follow_the_density(distribution):
    t = distribution.sample(20_000, torch.Generator().manual_seed(1)).double().numpy()
    counts, _ = np.histogram(t, np.linspace(0, 1, 11))
    grid = torch.linspace(0, 1, 40_001, dtype=torch.float64)[1:-1]
    expected = [distribution.density(part).sum().item() / 40_000 for part in grid.tensor_split(10)]
    tolerance = 4 * 0.5 / math.sqrt(len(t)) + 1e-3
    assert np.abs(counts / len(t) - expected).max() < tolerance


@every_distribution
def test_stratified_times_have_the_same_mean_with_far_lower_variance(distribution):
    plain = []
    stratified = []
    for step in range(200):
        random = StepRandom(Batch(torch.zeros(64, 1, 1, 1), True, seed=0, step=step, size=64))
        plain.append(distribution(random.uniform("time")).double().mean())
        stratified.append(distribution(random.stratified("time")).double().mean())
    plain = torch.stack(plain)
    stratified = torch.stack(stratified)
    assert abs(plain.mean() - stratified.mean()) < 4 * plain.std() / math.sqrt(200)
    assert stratified.var() < plain.var() / 10


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.0, 1.0), (2.0, 0.3)])
def test_log_normal_sigma_on_linear_is_logit_normal(mean, std):
    u = torch.linspace(1e-4, 1 - 1e-4, 101, dtype=torch.float64)
    found = LogNormalSigma(mean, std)
    expected = LogitNormal(mean, std)
    torch.testing.assert_close(found.quantile(u), expected.quantile(u), rtol=1e-10, atol=1e-13)
    t = expected.quantile(u)
    torch.testing.assert_close(found.density(t), expected.density(t), rtol=1e-9, atol=0)


@every_interpolant
def test_log_sigma_is_normal_on_every_interpolant(interpolant):
    """The normal is truncated to the noise levels that the interpolant reaches."""
    distribution = LogNormalSigma(-0.5, 0.8).for_interpolant(interpolant)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alpha, sigma = interpolant(distribution.quantile(u))
    z = ((sigma / alpha).log().numpy() + 0.5) / 0.8
    found = (stats.norm.cdf(z) - distribution.below) / distribution.within
    np.testing.assert_allclose(found, u.numpy(), atol=1e-6)


@every_interpolant
def test_an_explicit_interpolant_replaces_the_denoisers(interpolant):
    explicit = LogNormalSigma(interpolant=Trigonometric())
    assert explicit.for_interpolant(interpolant) is explicit


@every_interpolant
def test_a_distribution_of_t_is_the_same_on_every_interpolant(interpolant):
    assert isinstance(Uniform().for_interpolant(interpolant), Uniform)


U = torch.linspace(0, 1, 10_001, dtype=torch.float64)


def test_mode_of_zero_is_uniform():
    torch.testing.assert_close(Mode(0.0).quantile(U), U)


@pytest.mark.parametrize("s", [-1.0, 1.752])
def test_quantiles_of_mode_rise_up_to_its_bounds(s):
    assert (Mode(s).quantile(U).diff() >= 0).all()


@pytest.mark.parametrize("s", [-1.05, 1.8, math.nan])
def test_mode_refuses_values_with_falling_quantiles(s):
    with refused("Mode", "s", s, "[-1, 1.752]"):
        Mode(s)
    falling = Mode(1.0)
    falling.slope = s
    assert not (falling.quantile(U).diff() >= 0).all()


def test_cosmap_has_the_noise_levels_of_the_cosine_schedule():
    """Uniform t on Trigonometric has the sigma / alpha of CosMap's t on Linear."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alpha, sigma = Linear()(CosMap().quantile(u))
    cosine_alpha, cosine_sigma = Trigonometric()(u)
    torch.testing.assert_close(sigma / alpha, cosine_sigma / cosine_alpha)


def test_the_u_shape_is_the_mean_of_two_exponentials():
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    mean = (Exponential(4.0).density(t) + Exponential(-4.0).density(t)) / 2
    torch.testing.assert_close(mean, UShaped(4.0).density(t))


def test_the_inversion_of_an_increasing_function():
    t = torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close(invert_increasing(lambda t: t**3, t**3), t, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("cls", "options", "named"),
    [
        (LogNormalSigma, {"mean": 0, "std": 0}, ("std", 0)),
        (LogitNormal, {"mean": 0, "std": math.nan}, ("std", math.nan)),
        (Exponential, {"a": 0.0}, ("a", 0.0, "Uniform")),
        (Exponential, {"a": 1000.0}, ("a", 1000.0)),
        (UShaped, {"a": 1000.0}, ("a", 1000.0)),
    ],
)
def test_impossible_distributions_are_refused(cls, options, named):
    with refused(cls.__name__, *named):
        cls(**options)


def test_noise_levels_outside_the_interpolants_are_refused():
    with refused("LogNormalSigma", "mean", 9.0, "std", 0.1, "VariancePreserving"):
        LogNormalSigma(9.0, 0.1, VariancePreserving())


def test_a_negative_number_of_times_is_refused():
    with refused("Uniform", "n", -1):
        Uniform().sample(-1)
