"""Time laws and the matching objective against closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from data.batch import Batch
from models.denoiser import Denoiser
from models.interpolant import Linear, VariancePreserving
from models.prediction import Data, Noise, Velocity
from tests.forms import PREDICTIONS, every_interpolant
from tests.oracle import single
from trainer.draws import Draws
from trainer.objectives import Matching
from trainer.times import LogitNormal, Times, Uniform, UShaped

LAWS = [cls() for cls in Times.__subclasses__()] + [LogitNormal(-0.5, 1.4), UShaped(1.0)]
every_law = pytest.mark.parametrize("law", LAWS, ids=lambda law: f"{type(law).__name__}{vars(law)}")


@every_law
def test_density_is_a_density_and_is_what_is_sampled(law):
    t = torch.linspace(5e-6, 1 - 5e-6, 100_001, dtype=torch.float64)
    cumulative = torch.cumulative_trapezoid(law.density(t), t)
    assert cumulative[-1].item() == pytest.approx(1, abs=1e-3)
    drawn = law.sample(20_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32 and 0 < drawn.min() and drawn.max() < 1

    def cdf(values):
        return np.interp(values, t[1:].numpy(), cumulative.numpy())

    assert stats.kstest(drawn.double().numpy(), cdf).pvalue > 1e-3


@every_law
def test_quantiles_rise(law):
    t = law(torch.linspace(0, 1 - 2**-24, 1001))
    assert (t.diff() >= 0).all() and t.isfinite().all()


def test_u_shape_is_symmetric_and_heavy_at_the_ends():
    law = UShaped(4.0)
    torch.testing.assert_close(law.density(torch.tensor([0.1])), law.density(torch.tensor([0.9])))
    assert law.density(torch.tensor(0.0)) / law.density(torch.tensor(0.5)) == pytest.approx(math.cosh(2), rel=1e-5)


@pytest.mark.parametrize("make", [lambda: LogitNormal(0, 0), lambda: UShaped(0)])
def test_impossible_laws_are_refused(make):
    with pytest.raises(ValueError, match="must be positive"):
        make()


class Coupled:
    """The exact denoiser of pairs (x, eps): it knows both."""

    prediction = Velocity()

    def __init__(self, interpolant, x, eps):
        self.interpolant, self.x, self.eps = interpolant, x, eps

    def __call__(self, x_t, t, cond=None):
        return self.x, self.eps


@every_interpolant
@pytest.mark.parametrize("measure", PREDICTIONS, ids=repr)
def test_the_loss_is_zero_at_the_truth_and_not_beside_it(interpolant, measure):
    x, eps = torch.randn(2, 128, 1, 2, 2)
    law = Matching(Uniform(), measure)
    assert law(Coupled(interpolant, x, eps), x, eps) == 0
    assert law(Coupled(interpolant, x + 0.1, eps - 0.05), x, eps) > 1e-4


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_the_floor_of_flow_matching(std):
    """On N(m, s^2) with uniform t, no denoiser goes below (pi / 2) s per dimension; the exact one reaches it."""
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + std * torch.randn(200_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    eps = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    loss = Matching(Uniform(), Velocity())(single(Linear(), 0.5, std), x, eps)
    assert loss.item() == pytest.approx(math.pi / 2 * std, rel=0.02)


def test_measures_are_proportional():
    """On VP the eps-loss is SNR times the x-loss (at one t)."""
    x, eps = torch.randn(2, 256, 1, 1, 1, dtype=torch.float64)
    interpolant, t = VariancePreserving(), torch.tensor(0.3, dtype=torch.float64)

    class Fixed(Times):
        def quantile(self, u):
            return t.expand(len(u))

        def density(self, t):
            return t

    losses = [Matching(Fixed(), row)(single(interpolant), x, eps) for row in (Data(), Noise())]
    alpha, sigma = interpolant(t)
    torch.testing.assert_close(losses[1] / losses[0], (alpha / sigma) ** 2)


def test_gradients_reach_the_network_and_draws_key_the_times():
    point = torch.randn(1, 1, 2, 2)
    net = torch.nn.Conv2d(1, 1, 1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = net

        def forward(self, x_t, clock, cond=None):
            return self.conv(x_t)

    denoiser, eps = Denoiser(Net(), Linear(), Velocity()), torch.randn(32, 1, 2, 2)
    draws = Draws(Batch(point.expand(32, -1, -1, -1), True, seed=1, step=2, size=32))
    losses = [Matching(LogitNormal())(denoiser, point.expand(32, -1, -1, -1), eps, None, draws) for _ in range(2)]
    assert losses[0] == losses[1]
    losses[0].backward()
    assert net.weight.grad.abs().sum() > 0
    assert Matching()(denoiser, point.expand(32, -1, -1, -1), eps) > 0
