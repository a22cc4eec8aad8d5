"""Samplers against closed forms."""

import math

import pytest
import torch

from models.guidance import Guided
from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.sampler import DDIM, Heun, Sampler
from tests.forms import INTERPOLANTS, every_interpolant
from tests.oracle import Mixture, Point, single

ORDERS = {DDIM: 1, Heun: 2}


def test_every_sampler_states_its_order():
    assert set(Sampler.__subclasses__()) == set(ORDERS)


@every_interpolant
@pytest.mark.parametrize("sampler", ORDERS, ids=lambda s: s.__name__)
def test_order_of_convergence(interpolant, sampler):
    """On a two-mode mixture in float64, from t = .98 to .02, the error falls with the nominal order."""
    denoiser = Mixture(interpolant, [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6])
    start = torch.linspace(-2, 2, 11, dtype=torch.float64).view(-1, 1, 1, 1)

    def end(steps, kind=sampler):
        grid = torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64).tolist()
        return kind(steps, grid).walk(denoiser, start)[-1]

    exact = end(1024, Heun)
    coarse, fine = ((end(steps) - exact).abs().max().item() for steps in (64, 128))
    assert math.log2(coarse / fine) > ORDERS[sampler] - 0.25


def test_ddim_is_euler_on_linear():
    denoiser, x = Mixture(Linear(), [-1.0, 1.0], [0.3, 0.3], [0.5, 0.5]), torch.randn(16, 1, 2, 2, dtype=torch.float64)
    times = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    euler = x
    for t, s in zip(times[:-1], times[1:]):
        x_hat, eps_hat = denoiser(euler, t.expand(16))
        euler = euler + (s - t) * (eps_hat - x_hat)
    torch.testing.assert_close(DDIM(9, times.tolist()).walk(denoiser, x)[-1], euler)


@pytest.mark.parametrize("sampler", ORDERS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("interpolant", [i for i in INTERPOLANTS if i(torch.tensor(0.0))[1] == 0], ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 32])
def test_one_point_is_returned_at_every_step_count(sampler, interpolant, steps):
    point = torch.randn(1, 2, 4, 4)
    x = sampler(steps)(Point(interpolant, point), torch.randn(5, 2, 4, 4))
    torch.testing.assert_close(x, point.expand(5, -1, -1, -1), rtol=1e-4, atol=1e-4)


@every_interpolant
def test_one_ddim_step_on_a_gaussian(interpolant):
    """The deviation is multiplied by S_r / S_t cos(theta_r - theta_t), theta = atan2(sigma, alpha s)."""
    mean, std = 0.5, 0.7
    t, r = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    (a_t, s_t), (a_r, s_r) = interpolant(t), interpolant(r)
    S_t, S_r = torch.hypot(a_t * std, s_t), torch.hypot(a_r * std, s_r)
    angle = torch.atan2(s_r, a_r * std) - torch.atan2(s_t, a_t * std)
    x_t = torch.randn(9, 1, 1, 1, dtype=torch.float64)
    expected = a_r * mean + S_r / S_t * angle.cos() * (x_t - a_t * mean)
    torch.testing.assert_close(DDIM(1, [0.8, 0.5]).walk(single(interpolant, mean, std), x_t)[-1], expected)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_equal_angle_steps_shrink_a_standard_normal(steps):
    """N steps of DDIM on N(0, 1), uniform on Trigonometric, leave the standard deviation cos(pi / 2N)^N."""
    eps = torch.randn(7, 1, 1, 1, dtype=torch.float64)
    x = DDIM(steps)(single(Trigonometric(), 0.0, 1.0), eps)
    torch.testing.assert_close(x, eps * math.cos(math.pi / 2 / steps) ** steps, atol=1e-12, rtol=1e-9)


def test_many_steps_reach_the_exact_map():
    eps = torch.randn(50, 1, 1, 1, dtype=torch.float64)
    for interpolant in (Linear(), Trigonometric()):
        x = Heun(200)(single(interpolant, 0.5, 0.7), eps)
        torch.testing.assert_close(x, 0.5 + 0.7 * eps, atol=1e-3, rtol=0)


class Counting:
    """Counts the evaluations of a denoiser, and refuses t = 0."""

    def __init__(self, denoiser):
        self.denoiser, self.interpolant, self.calls = denoiser, denoiser.interpolant, 0

    def __call__(self, x_t, t, cond=None):
        assert t.shape == (len(x_t),) and (t > 0).all()
        self.calls += 1
        return self.denoiser(x_t, t, cond)


@pytest.mark.parametrize("sampler", ORDERS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_nfe_counts_what_is_evaluated(sampler, steps, scale):
    counted = Counting(single(VariancePreserving()))
    guided = Guided(counted, scale)
    sampler(steps)(guided, torch.randn(3, 1, 2, 2))
    assert counted.calls == sampler(steps).nfe(guided)


@pytest.mark.parametrize("times", [[1.0, 0.5, 0.5], [0.2, 0.4, 0.0], [1.1, 0.5, 0.0], [1.0, 0.0]])
def test_impossible_grids_are_refused(times):
    with pytest.raises(ValueError, match="times"):
        DDIM(2, times)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        DDIM(0)
