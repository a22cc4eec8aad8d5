"""Samplers against closed forms."""

import math
from functools import cache

import pytest
import torch

from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.prediction import Velocity
from models.sampler import (
    DDIM,
    Adaptive,
    Ancestral,
    DPMSolver2M,
    EDMHeun,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    RungeKutta4,
    Sampler,
)
from tests.forms import INTERPOLANTS, every_interpolant
from tests.oracle import Mixture, Point, single

ORDERS = {Euler: 1, DDIM: 1, Midpoint: 2, Heun: 2, EDMHeun: 2, DPMSolver2M: 2, RungeKutta4: 4}
DRAWING = [Ancestral, EulerMaruyama]


def noise(like):
    """Return the argument for samplers that draw."""
    return torch.Generator().manual_seed(1)


def test_every_sampler_states_its_order():
    assert set(Sampler.__subclasses__()) == {*ORDERS, *DRAWING, Adaptive}


def mixture(interpolant):
    return Mixture(interpolant, [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6])


@cache
def ends(interpolant):
    """Return a start at t = .98 and where the ODE carries it at t = .02, float64, by the adaptive solver."""
    start = torch.linspace(-2, 2, 11, dtype=torch.float64).view(-1, 1, 1, 1) * interpolant(torch.tensor(0.98))[1].double()
    return start, Adaptive(1, [0.98, 0.02], rtol=1e-10, atol=1e-10).walk(mixture(interpolant), start)[-1]


@every_interpolant
@pytest.mark.parametrize("sampler", ORDERS, ids=lambda s: s.__name__)
@torch.inference_mode()
def test_order_of_convergence(interpolant, sampler):
    """On a two-mode mixture in float64, from t = .98 to .02, the error falls with the nominal order."""
    start, exact = ends(interpolant)

    def error(steps):
        grid = torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64).tolist()
        return (sampler(steps, grid).walk(mixture(interpolant), start)[-1] - exact).abs().max().item()

    steps = {DPMSolver2M: 64, RungeKutta4: 16}.get(sampler, 32)  # finer ones meet the knots of Discrete, a C^1 curve
    assert math.log2(error(steps) / error(2 * steps)) > ORDERS[sampler] - 0.25


@every_interpolant
def test_the_adaptive_solver_keeps_its_tolerance(interpolant):
    start, exact = ends(interpolant)
    solver = Adaptive(1, [0.98, 0.02], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(solver.walk(mixture(interpolant), start)[-1], exact, rtol=2e-4, atol=2e-4)


def test_ddim_is_euler_on_linear():
    denoiser, x = Mixture(Linear(), [-1.0, 1.0], [0.3, 0.3], [0.5, 0.5]), torch.randn(16, 1, 2, 2, dtype=torch.float64)
    times = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    euler = x
    for t, s in zip(times[:-1], times[1:]):
        x_hat, eps_hat = denoiser(euler, t.expand(16))
        euler = euler + (s - t) * (eps_hat - x_hat)
    torch.testing.assert_close(DDIM(9, times.tolist()).walk(denoiser, x)[-1], euler)


@pytest.mark.parametrize("sampler", Sampler.__subclasses__(), ids=lambda s: s.__name__)
@pytest.mark.parametrize("interpolant", [i for i in INTERPOLANTS if i(torch.tensor(0.0))[1] == 0], ids=repr)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_one_point_is_returned_at_every_step_count(sampler, interpolant, steps):
    point = torch.randn(1, 2, 4, 4)
    eps = torch.randn(5, 2, 4, 4)
    x = sampler(steps)(Point(interpolant, point), eps, noise=noise(eps))
    torch.testing.assert_close(x, point.expand(5, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interpolant", [i for i in INTERPOLANTS if i(torch.tensor(0.0))[1] > 0], ids=repr)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_walk_ends_with_the_noise_that_the_interpolant_has_at_0(interpolant, steps):
    """The last step goes to the state at t = 0, alpha(0) x + sigma(0) eps, not to x_hat: on VE sigma(0) = .01 stays."""
    point, eps = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    alpha, sigma = interpolant(torch.ones((), dtype=torch.float64))
    x = DDIM(steps)(Point(interpolant, point), eps)
    torch.testing.assert_close(x, interpolant.mix(point.expand_as(eps), eps - alpha / sigma * point, torch.zeros(()).double()))


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


@pytest.mark.parametrize("sampler", [*ORDERS, Adaptive], ids=lambda s: s.__name__)
@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric()], ids=repr)
@torch.inference_mode()
def test_full_walks_converge_to_the_exact_map_and_back(interpolant, sampler):
    """From t = 1 to 0 and from 0 to 1: x = m + s eps."""
    eps = torch.randn(50, 1, 1, 1, dtype=torch.float64)
    walk = sampler(1, rtol=1e-6, atol=1e-6) if sampler is Adaptive else sampler(100)
    tolerance = 5e-2 if ORDERS.get(sampler) == 1 else 3e-3
    x = walk(single(interpolant, 0.5, 0.7), eps)
    torch.testing.assert_close(x, 0.5 + 0.7 * eps, atol=tolerance, rtol=0)
    torch.testing.assert_close(walk.invert(single(interpolant, 0.5, 0.7), 0.5 + 0.7 * eps), eps, atol=2 * tolerance, rtol=0)


@every_interpolant
@pytest.mark.parametrize("sampler", [*ORDERS, Adaptive], ids=lambda s: s.__name__)
@torch.inference_mode()
def test_inversion_round_trips(interpolant, sampler):
    """On a mixture, from t = .98 to .02 and back, the noise comes back but for a small part, of first order at worst."""
    eps, order = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).view(-1, 1, 1, 1), ORDERS.get(sampler)

    def error(steps):
        walk = sampler(steps, torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64).tolist())
        return (walk.invert(mixture(interpolant), walk(mixture(interpolant), eps)) - eps).abs().max().item()

    if order == 1:
        assert math.log2(error(64) / error(128)) > 0.75
    else:
        assert error({2: 32, 4: 16, None: 1}[order]) < 0.03


class Network(torch.nn.Module):
    """A small network of x_t, the clock and a label, to be compiled."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x_t, clock, cond=None):
        return torch.tanh(self.mix(x_t) + clock.view(-1, 1, 1, 1))


@pytest.mark.parametrize("sampler", Sampler.__subclasses__(), ids=lambda s: s.__name__)
def test_inference_mode_and_compiled_networks_change_nothing(sampler):
    net, eps = Network(), torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(net, backend="eager")
    walk = sampler(3)
    plain = walk(Denoiser(net, Linear(), Velocity()), eps, noise=noise(eps))
    with torch.inference_mode():
        torch.testing.assert_close(walk(Denoiser(compiled, Linear(), Velocity()), eps, noise=noise(eps)), plain, rtol=0, atol=0)
    assert plain.dtype == torch.float32


class Counting:
    """Counts the evaluations of a denoiser, and refuses t = 0."""

    def __init__(self, denoiser):
        self.denoiser, self.interpolant, self.calls = denoiser, denoiser.interpolant, 0

    def __call__(self, x_t, t, cond=None):
        assert t.shape == (len(x_t),) and (t > 0).all()
        self.calls += 1
        return self.denoiser(x_t, t, cond)


@pytest.mark.parametrize("sampler", Sampler.__subclasses__(), ids=lambda s: s.__name__)
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("guidance", [(1.0,), (2.5,), (2.5, 0.3, 0.7)], ids=str)
def test_nfe_counts_what_is_evaluated(sampler, steps, guidance):
    counted = Counting(single(VariancePreserving()))
    guided, walk, eps = Guided(counted, *guidance), sampler(steps), torch.randn(3, 1, 2, 2)
    x = walk(guided, eps, noise=noise(eps))
    assert counted.calls == walk.nfe(guided)
    counted.calls = 0
    if not walk.draws:
        walk.invert(guided, x)
        assert walk.__class__ is Adaptive or guidance[1:] or counted.calls == walk.nfe(guided)


def test_the_count_of_an_adaptive_walk_comes_after_it():
    with pytest.raises(ValueError, match="walk first"):
        Adaptive().nfe()


@pytest.mark.parametrize("times", [[1.0, 0.5, 0.5], [0.2, 0.4, 0.0], [1.1, 0.5, 0.0], [1.0, float("nan"), 0.0], [1.0, 0.0]])
@pytest.mark.parametrize("sampler", Sampler.__subclasses__(), ids=lambda s: s.__name__)
def test_impossible_grids_are_refused(sampler, times):
    with pytest.raises(ValueError, match="times"):
        sampler(2, times)


@pytest.mark.parametrize("sampler", Sampler.__subclasses__(), ids=lambda s: s.__name__)
def test_no_steps_are_refused(sampler):
    with pytest.raises(ValueError, match="steps is 0"):
        sampler(0)


@pytest.mark.parametrize("sampler", Sampler.__subclasses__(), ids=lambda s: s.__name__)
def test_states_that_are_not_finite_are_named(sampler):
    eps = torch.randn(3, 1, 2, 2)
    eps[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite, 1 of 3 since t = 1") as refused:
        sampler(4)(single(Trigonometric()), eps, noise=noise(eps))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "arguments", [{"rtol": 0.0}, {"atol": -1.0}, {"end": 0.0}, {"steps": 2, "times": [1, 0.001, 0]}], ids=str
)
def test_impossible_tolerances_are_refused(arguments):
    with pytest.raises(ValueError, match="Adaptive: (rtol|end)"):
        Adaptive(**arguments)
