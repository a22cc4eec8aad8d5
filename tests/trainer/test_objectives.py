"""The matching objective and the time distributions against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from data.batch import Batch
from models.denoiser import Denoiser
from models.interpolant import Linear, VariancePreserving
from models.prediction import Data, NoisePrediction, Velocity
from tests.examples import PREDICTIONS, every_interpolant
from tests.helpers.denoisers import FixedTime
from tests.helpers.refusals import refused
from tests.oracle import single
from trainer.objectives import Matching
from trainer.objectives.parts.time_distributions import (
    LogitNormal,
    TimeDistribution,
    Uniform,
    UShaped,
)
from trainer.step_random import StepRandom

DISTRIBUTIONS = [cls() for cls in TimeDistribution.__subclasses__()]
DISTRIBUTIONS += [LogitNormal(-0.5, 1.4), UShaped(1.0)]


every_distribution = pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)


@every_distribution
def test_the_density_integrates_to_one_and_is_that_of_the_samples(distribution):
    t = torch.linspace(5e-6, 1 - 5e-6, 100_001, dtype=torch.float64)
    cumulative = torch.cumulative_trapezoid(distribution.density(t), t)
    assert cumulative[-1].item() == pytest.approx(1, abs=1e-3)

    samples = distribution.sample(20_000, torch.Generator().manual_seed(0))
    assert samples.dtype == torch.float32
    assert samples.min() > 0
    assert samples.max() < 1

    def cumulative_distribution(values):
        return np.interp(values, t[1:].numpy(), cumulative.numpy())

    assert stats.kstest(samples.double().numpy(), cumulative_distribution).pvalue > 1e-3


@every_distribution
def test_quantiles_rise(distribution):
    t = distribution(torch.linspace(0, 1 - 2**-24, 1001))
    assert (t.diff() >= 0).all()
    assert t.isfinite().all()


def test_the_u_shape_is_symmetric():
    density = UShaped(4.0).density
    torch.testing.assert_close(density(torch.tensor([0.1])), density(torch.tensor([0.9])))


def test_the_u_shape_is_heavy_at_the_ends():
    density = UShaped(4.0).density
    ratio = density(torch.tensor(0.0)) / density(torch.tensor(0.5))
    assert ratio == pytest.approx(math.cosh(2), rel=1e-5)


def test_a_logit_normal_without_spread_is_refused():
    with refused("LogitNormal", "std", 0):
        LogitNormal(0, 0)


def test_a_flat_u_shape_is_refused():
    with refused("UShaped", "a", 0):
        UShaped(0)


class PairDenoiser:
    """The exact denoiser of pairs (x, eps): it returns the pairs."""

    prediction = Velocity()

    def __init__(self, interpolant, x, eps):
        self.interpolant = interpolant
        self.x = x
        self.eps = eps

    def __call__(self, x_t, t, cond=None):
        return self.x, self.eps


@every_interpolant
@pytest.mark.parametrize("measure", PREDICTIONS, ids=repr)
def test_the_loss_is_zero_only_at_the_truth(interpolant, measure):
    x, eps = torch.randn(2, 128, 1, 2, 2)
    objective = Matching(Uniform(), measure)
    assert objective(PairDenoiser(interpolant, x, eps), x, eps).total == 0
    assert objective(PairDenoiser(interpolant, x + 0.1, eps - 0.05), x, eps).total > 1e-4


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_the_least_loss_of_flow_matching(std):
    """On N(m, s^2) with uniform t it is (pi / 2) s per dimension: that of the exact denoiser."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = 0.5 + std * z
    eps = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    loss = Matching(Uniform(), Velocity())(single(Linear(), 0.5, std), x, eps)
    assert loss.total.item() == pytest.approx(math.pi / 2 * std, rel=0.02)


def test_losses_of_two_predictions_are_proportional():
    """On VP the loss of the noise is SNR times the loss of the data, at one t."""
    x, eps = torch.randn(2, 256, 1, 1, 1, dtype=torch.float64)
    interpolant = VariancePreserving()

    def loss(measure):
        return Matching(FixedTime(0.3), measure)(single(interpolant), x, eps).total

    alpha, sigma = interpolant(torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(loss(NoisePrediction()) / loss(Data()), (alpha / sigma) ** 2)


class ConvolutionNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x_t, time_input, cond=None):
        return self.conv(x_t)


def test_gradients_reach_the_network():
    x = torch.randn(1, 1, 2, 2).expand(32, -1, -1, -1)
    denoiser = Denoiser(ConvolutionNet(), Linear(), Velocity())
    loss = Matching()(denoiser, x, torch.randn(32, 1, 2, 2)).total
    loss.backward()
    assert loss > 0
    assert denoiser.net.conv.weight.grad.abs().sum() > 0


def test_the_batch_determines_the_times():
    """Seed and step of the batch: the loss is the same in every call."""
    x = torch.randn(1, 1, 2, 2).expand(32, -1, -1, -1)
    eps = torch.randn(32, 1, 2, 2)
    denoiser = Denoiser(ConvolutionNet(), Linear(), Velocity())
    random = StepRandom(Batch(x, True, seed=1, step=2, size=32))
    first = Matching(LogitNormal())(denoiser, x, eps, None, random)
    second = Matching(LogitNormal())(denoiser, x, eps, None, random)
    assert first.total == second.total
