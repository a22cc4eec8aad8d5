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
    Ancestral,
    DormandPrince,
    DPMSolver2M,
    EDMHeun,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    Renoising,
    RungeKutta4,
    Sampler,
)
from tests.examples import INTERPOLANTS, every_interpolant
from tests.helpers.refusals import refused
from tests.oracle import CountingDenoiser, Mixture, Point, single

ORDERS = {Euler: 1, DDIM: 1, Midpoint: 2, Heun: 2, EDMHeun: 2, DPMSolver2M: 2, RungeKutta4: 4}
STOCHASTIC = [Ancestral, EulerMaruyama, Renoising]


def parametrize_samplers(samplers):
    return pytest.mark.parametrize("sampler", samplers, ids=lambda cls: cls.__name__)


every_sampler = parametrize_samplers(Sampler.__subclasses__())
every_solver = parametrize_samplers([*ORDERS, DormandPrince])
NOISELESS = [interpolant for interpolant in INTERPOLANTS if interpolant(torch.tensor(0.0))[1] == 0]
NOISY = [interpolant for interpolant in INTERPOLANTS if interpolant(torch.tensor(0.0))[1] > 0]


def noise():
    """Return the argument for samplers that draw noise."""
    return torch.Generator().manual_seed(1)


def test_every_sampler_states_its_order():
    assert set(Sampler.__subclasses__()) == {*ORDERS, *STOCHASTIC, DormandPrince}


def mixture(interpolant):
    return Mixture(interpolant, [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6])


@cache
def exact_ends(interpolant):
    """Return states at t = .98 and where the ODE carries them at t = .02, in float64.

    The adaptive solver finds the latter.
    """
    sigma = interpolant(torch.tensor(0.98))[1].double()
    start = torch.linspace(-2, 2, 11, dtype=torch.float64).view(-1, 1, 1, 1) * sigma
    solver = DormandPrince(1, [0.98, 0.02], rtol=1e-10, atol=1e-10)
    return start, solver.integrate(mixture(interpolant), start)[-1]


def inner_grid(steps):
    """Return equal steps from t = .98 to .02."""
    return torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64).tolist()


@every_interpolant
@parametrize_samplers(ORDERS)
@torch.inference_mode()
def test_the_error_falls_with_the_order_of_convergence(interpolant, sampler):
    """On a two-mode mixture in float64, from t = .98 to .02."""
    start, exact = exact_ends(interpolant)

    def error(steps):
        found = sampler(steps, inner_grid(steps)).integrate(mixture(interpolant), start)[-1]
        return (found - exact).abs().max().item()

    # Finer grids reach the knots of Discrete, a C^1 curve.
    steps = {DPMSolver2M: 64, RungeKutta4: 16}.get(sampler, 32)
    assert math.log2(error(steps) / error(2 * steps)) > ORDERS[sampler] - 0.25


@every_interpolant
def test_the_adaptive_solver_keeps_its_tolerance(interpolant):
    start, exact = exact_ends(interpolant)
    solver = DormandPrince(1, [0.98, 0.02], rtol=1e-5, atol=1e-5)
    found = solver.integrate(mixture(interpolant), start)[-1]
    torch.testing.assert_close(found, exact, rtol=2e-4, atol=2e-4)


def test_ddim_is_euler_on_linear():
    denoiser = Mixture(Linear(), [-1.0, 1.0], [0.3, 0.3], [0.5, 0.5])
    x = torch.randn(16, 1, 2, 2, dtype=torch.float64)
    times = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    euler = x
    for t, s in zip(times[:-1], times[1:]):
        x_hat, eps_hat = denoiser(euler, t.expand(16))
        euler = euler + (s - t) * (eps_hat - x_hat)
    torch.testing.assert_close(DDIM(9, times.tolist()).integrate(denoiser, x)[-1], euler)


@every_sampler
@pytest.mark.parametrize("interpolant", NOISELESS, ids=repr)
@pytest.mark.parametrize("steps", [1, 3, 8])
def test_one_point_is_returned_at_every_number_of_steps(sampler, interpolant, steps):
    point = torch.randn(1, 2, 4, 4)
    eps = torch.randn(5, 2, 4, 4)
    x = sampler(steps)(Point(interpolant, point), eps, noise=noise())
    torch.testing.assert_close(x, point.expand(5, -1, -1, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interpolant", NOISY, ids=repr)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_sample_keeps_the_noise_of_the_interpolant_at_zero(interpolant, steps):
    """The last step goes to the state at t = 0, alpha(0) x + sigma(0) eps, not to x_hat.

    On VE sigma(0) = .01 stays.
    """
    point = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    eps = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    x = DDIM(steps)(Point(interpolant, point), eps)
    alpha, sigma = interpolant(torch.ones((), dtype=torch.float64))
    zero = torch.zeros(()).double()
    expected = interpolant.mix(point.expand_as(eps), eps - alpha / sigma * point, zero)
    torch.testing.assert_close(x, expected)


@every_interpolant
def test_one_ddim_step_on_a_gaussian(interpolant):
    """The deviation is multiplied by S_r / S_t cos(theta_r - theta_t).

    S^2 = alpha^2 s^2 + sigma^2 and theta = atan2(sigma, alpha s).
    """
    mean = 0.5
    std = 0.7
    alpha_t, sigma_t = interpolant(torch.tensor(0.8, dtype=torch.float64))
    alpha_r, sigma_r = interpolant(torch.tensor(0.5, dtype=torch.float64))
    ratio = torch.hypot(alpha_r * std, sigma_r) / torch.hypot(alpha_t * std, sigma_t)
    angle = torch.atan2(sigma_r, alpha_r * std) - torch.atan2(sigma_t, alpha_t * std)
    x_t = torch.randn(9, 1, 1, 1, dtype=torch.float64)
    expected = alpha_r * mean + ratio * angle.cos() * (x_t - alpha_t * mean)
    found = DDIM(1, [0.8, 0.5]).integrate(single(interpolant, mean, std), x_t)[-1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_equal_angle_steps_shrink_a_standard_normal(steps):
    """N steps of DDIM on N(0, 1), uniform on Trigonometric: the std becomes cos(pi / 2N)^N."""
    eps = torch.randn(7, 1, 1, 1, dtype=torch.float64)
    x = DDIM(steps)(single(Trigonometric(), 0.0, 1.0), eps)
    expected = eps * math.cos(math.pi / 2 / steps) ** steps
    torch.testing.assert_close(x, expected, atol=1e-12, rtol=1e-9)


def accurate(sampler):
    """Return a sampler that solves the whole ODE, and its largest error."""
    if sampler is DormandPrince:
        return DormandPrince(1, rtol=1e-6, atol=1e-6), 3e-3
    tolerance = 5e-2 if ORDERS[sampler] == 1 else 3e-3
    return sampler(100), tolerance


plain_interpolants = pytest.mark.parametrize("interpolant", [Linear(), Trigonometric()], ids=repr)


@every_solver
@plain_interpolants
@torch.inference_mode()
def test_samples_converge_to_the_exact_map(interpolant, sampler):
    """From t = 1 to 0: x = m + s eps."""
    eps = torch.randn(50, 1, 1, 1, dtype=torch.float64)
    solver, tolerance = accurate(sampler)
    x = solver(single(interpolant, 0.5, 0.7), eps)
    torch.testing.assert_close(x, 0.5 + 0.7 * eps, atol=tolerance, rtol=0)


@every_solver
@plain_interpolants
@torch.inference_mode()
def test_inversion_converges_to_the_inverse_of_the_exact_map(interpolant, sampler):
    """From t = 0 to 1: eps = (x - m) / s."""
    eps = torch.randn(50, 1, 1, 1, dtype=torch.float64)
    solver, tolerance = accurate(sampler)
    found = solver.invert(single(interpolant, 0.5, 0.7), 0.5 + 0.7 * eps)
    torch.testing.assert_close(found, eps, atol=2 * tolerance, rtol=0)


@every_interpolant
@every_solver
@torch.inference_mode()
def test_inversion_round_trips(interpolant, sampler):
    """On a mixture, from t = .98 to .02 and back, up to an error of at least first order."""
    eps = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64).view(-1, 1, 1, 1)
    denoiser = mixture(interpolant)

    def error(steps):
        solver = sampler(steps, inner_grid(steps))
        return (solver.invert(denoiser, solver(denoiser, eps)) - eps).abs().max().item()

    order = ORDERS.get(sampler)
    if order == 1:
        assert math.log2(error(64) / error(128)) > 0.75
    else:
        steps = {2: 32, 4: 16, None: 1}[order]
        assert error(steps) < 0.03


class Network(torch.nn.Module):
    """A small network of the state and the time, to be compiled."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x_t, time, cond=None):
        return torch.tanh(self.mix(x_t) + time.view(-1, 1, 1, 1))


@every_sampler
def test_inference_mode_and_compiled_networks_change_nothing(sampler):
    net = Network()
    compiled = torch.compile(net, backend="eager")
    eps = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = sampler(3)(Denoiser(net, Linear(), Velocity()), eps, noise=noise())
    with torch.inference_mode():
        found = sampler(3)(Denoiser(compiled, Linear(), Velocity()), eps, noise=noise())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert expected.dtype == torch.float32


every_scale = pytest.mark.parametrize("scale", [(1.0,), (2.5,), (2.5, 0.3, 0.7)], ids=str)


@every_sampler
@pytest.mark.parametrize("steps", [1, 4])
@every_scale
def test_nfe_counts_network_calls(sampler, steps, scale):
    denoiser = CountingDenoiser(single(VariancePreserving()))
    guided = Guided(denoiser, *scale)
    used = sampler(steps)
    used(guided, torch.randn(3, 1, 2, 2), noise=noise())
    assert denoiser.calls == used.nfe(guided)


@parametrize_samplers(ORDERS)
@pytest.mark.parametrize("steps", [1, 4])
@every_scale
def test_inversion_never_calls_the_network_at_zero(sampler, steps, scale):
    """And `nfe` counts its calls, which in an interval of guidance are not those of sampling."""
    denoiser = CountingDenoiser(single(VariancePreserving()))
    guided = Guided(denoiser, *scale)
    sampler(steps).invert(guided, torch.randn(3, 1, 2, 2))
    assert denoiser.calls == sampler(steps).nfe(guided, inverse=True)


@every_scale
@pytest.mark.parametrize("steps", [1, 4])
def test_adaptive_inversion_never_calls_the_network_at_zero(steps, scale):
    denoiser = CountingDenoiser(single(VariancePreserving()))
    DormandPrince(steps).invert(Guided(denoiser, *scale), torch.randn(3, 1, 2, 2))
    assert denoiser.calls > 0


def test_nfe_of_an_unused_adaptive_solver_is_refused():
    with refused(DormandPrince.__name__, "nfe"):
        DormandPrince().nfe()


@pytest.mark.parametrize(
    "times",
    [
        [1.0, 0.5, 0.5],
        [0.2, 0.4, 0.0],
        [1.1, 0.5, 0.0],
        [1.0, math.nan, 0.0],
    ],
    ids=["flat", "rising", "above-one", "nan"],
)
@every_sampler
def test_impossible_grids_are_refused(sampler, times):
    with refused(sampler.__name__, "times", "[0, 1]", times):
        sampler(2, times)


@every_sampler
def test_a_grid_of_another_length_is_refused(sampler):
    with refused(sampler.__name__, "times", 2, 3):
        sampler(2, [1.0, 0.0])


@every_sampler
def test_no_steps_are_refused(sampler):
    with refused(sampler.__name__, "steps", 0):
        sampler(0)


@every_sampler
def test_states_that_are_not_finite_are_refused(sampler):
    eps = torch.randn(3, 1, 2, 2)
    eps[1, 0, 0, 0] = math.nan
    with refused(sampler.__name__, "1 of 3", "t = 1"):
        sampler(4)(single(Trigonometric()), eps, noise=noise())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rtol": 0.0}, ["rtol", 0.0]),
        ({"atol": -1.0}, ["atol", -1.0]),
        ({"end": 0.0}, ["end", 0.0]),
        ({"steps": 2, "times": [1, 0.001, 0]}, ["end", 0.001, "(0, 0.001)"]),
    ],
    ids=["rtol", "atol", "end", "times"],
)
def test_impossible_tolerances_are_refused(arguments, named):
    with refused(DormandPrince.__name__, *named):
        DormandPrince(**arguments)
