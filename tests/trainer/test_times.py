"""Time laws against what the papers say of them; test_objectives.py walks over all of them."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from data.batch import Batch
from models.interpolant import Linear, Trigonometric, VariancePreserving
from tests.forms import every_interpolant
from trainer.draws import Draws
from trainer.times import CosMap, Exponential, LogitNormal, LogNormalSigma, Mode, Times, Uniform, UShaped, inverse

LAWS = [cls() for cls in Times.__subclasses__() if cls.__module__ == "trainer.times"] + [
    *(Mode(s) for s in (-1.0, 0.0, 1.7)),
    *(Exponential(a) for a in (-4.0, 1e-3, 80.0)),
    *(LogNormalSigma(*law) for law in ((0.0, 1.0), (-1.2, 1.2, VariancePreserving()), (2.0, 3.0, Linear(0.3)))),
]
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{type(law).__name__}{vars(law)}")


@every_law
def test_the_density_is_the_slope_of_the_law(law):
    """q'(u) p(q(u)) = 1, in float64."""
    u, h = torch.linspace(0.02, 0.98, 97, dtype=torch.float64), 1e-6
    slope = (law.quantile(u + h) - law.quantile(u - h)) / (2 * h)
    torch.testing.assert_close(slope * law.density(law.quantile(u)), torch.ones_like(u), rtol=1e-5, atol=0)


@every_law
def test_the_density_integrates_to_one(law):
    points = torch.linspace(1e-4, 1 - 1e-4, 60, dtype=torch.float64)
    ends = law.quantile(points).tolist()  # the law's own points, so that quadrature finds every peak
    mass = sum(
        integrate.fixed_quad(lambda t: law.density(torch.as_tensor(t)).numpy(), a, b, n=8)[0] for a, b in zip(ends, ends[1:])
    )
    assert mass == pytest.approx(1 - 2e-4, abs=2e-3)


@every_law
def test_histograms_are_the_density(law):
    t = law.sample(20_000, torch.Generator().manual_seed(1)).double().numpy()
    edges = np.linspace(0, 1, 11)
    grid = torch.linspace(0, 1, 40_001, dtype=torch.float64)[1:-1]
    expected = [law.density(part).sum().item() / 40_000 for part in grid.tensor_split(10)]
    assert np.abs(np.histogram(t, edges)[0] / len(t) - expected).max() < 4 * 0.5 / math.sqrt(len(t)) + 1e-3


@every_law
def test_stratified_times_have_the_mean_with_far_lower_variance(law):
    def means(draw):
        return torch.stack([law(draw(step)).double().mean() for step in range(200)])

    def draws(step):
        return Draws(Batch(torch.zeros(64, 1, 1, 1), True, seed=0, step=step, size=64))

    plain, stratified = means(lambda s: draws(s).uniform("time")), means(lambda s: draws(s).stratified("time"))
    assert abs(plain.mean() - stratified.mean()) < 4 * plain.std() / math.sqrt(200)
    assert stratified.var() < plain.var() / 10


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.0, 1.0), (2.0, 0.3)])
def test_log_normal_sigma_on_linear_is_logit_normal(mean, std):
    u = torch.linspace(1e-4, 1 - 1e-4, 101, dtype=torch.float64)
    ours, theirs = LogNormalSigma(mean, std), LogitNormal(mean, std)
    torch.testing.assert_close(ours.quantile(u), theirs.quantile(u), rtol=1e-10, atol=1e-13)
    t = theirs.quantile(u)
    torch.testing.assert_close(ours.density(t), theirs.density(t), rtol=1e-9, atol=0)


@every_interpolant
def test_log_sigma_is_normal_on_every_interpolant(interpolant):
    """Within the levels that the interpolant reaches, and by the denoiser's own interpolant unless another is named."""
    law = LogNormalSigma(-0.5, 0.8).on(interpolant)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    alpha, sigma = interpolant(law.quantile(u))
    z = ((sigma / alpha).log().numpy() + 0.5) / 0.8
    np.testing.assert_allclose((stats.norm.cdf(z) - law.below) / law.within, u.numpy(), atol=1e-6)
    fixed = LogNormalSigma(interpolant=Trigonometric())
    assert fixed.on(interpolant) is fixed and isinstance(Uniform().on(interpolant), Uniform)


def test_mode_of_zero_is_uniform_and_its_bounds_are_the_last_that_rise():
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    torch.testing.assert_close(Mode(0.0).quantile(u), u)
    for s in (-1.0, 1.752):
        assert (Mode(s).quantile(u).diff() >= 0).all()
    for s in (-1.05, 1.8, math.nan):
        with pytest.raises(ValueError, match=r"Mode: s is .*\[-1, 1.752\]"):
            Mode(s)
        turned = Mode(1.0)
        turned.slope = s
        assert not (turned.quantile(u).diff() >= 0).all()


def test_cosmap_draws_the_levels_of_the_cosine_schedule():
    """Uniform t on Trigonometric has the sigma / alpha of CosMap's t on Linear."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    (a, s), (alpha, sigma) = Linear()(CosMap().quantile(u)), Trigonometric()(u)
    torch.testing.assert_close(s / a, sigma / alpha)


def test_the_u_shape_is_two_exponentials():
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close((Exponential(4.0).density(t) + Exponential(-4.0).density(t)) / 2, UShaped(4.0).density(t))


def test_inverse_inverts():
    t = torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close(inverse(lambda t: t**3, t**3), t, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LogNormalSigma(0, 0), "std is 0"),
        (lambda: LogitNormal(0, math.nan), "std is nan"),
        (lambda: LogNormalSigma(9.0, 0.1, VariancePreserving()), "choose a mean between"),
        (lambda: Exponential(0.0), "which is Uniform"),
        (lambda: Exponential(1000.0), "a is 1000"),
        (lambda: UShaped(1000.0), "a is 1000"),
        (lambda: Uniform().sample(-1), "n is -1"),
    ],
)
def test_impossible_laws_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
