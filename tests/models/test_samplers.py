"""Samplers against closed forms."""

import math
from functools import cache

import pytest
import torch
from torchdiffeq import odeint

from models.clipped import Clipped
from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import (
    Discrete,
    EDMPath,
    Linear,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from models.prediction import Velocity
from models.retimed import Retimed
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
    karras,
)
from tests.examples import INTERPOLANTS, every_interpolant, public_samplers
from tests.helpers.refusals import refused
from tests.oracle import CountingDenoiser, Mixture, Point, single

ORDERS = {Euler: 1, DDIM: 1, Midpoint: 2, Heun: 2, EDMHeun: 2, DPMSolver2M: 2, RungeKutta4: 4}
STOCHASTIC = [Ancestral, EulerMaruyama, Renoising]


def parametrize_samplers(samplers):
    return pytest.mark.parametrize("sampler", samplers, ids=lambda cls: cls.__name__)


every_sampler = parametrize_samplers(public_samplers())
every_solver = parametrize_samplers([*ORDERS, DormandPrince])
NOISELESS = [interpolant for interpolant in INTERPOLANTS if interpolant(torch.tensor(0.0))[1] == 0]
NOISY = [interpolant for interpolant in INTERPOLANTS if interpolant(torch.tensor(0.0))[1] > 0]


def noise():
    """Return the argument for samplers that draw noise."""
    return torch.Generator().manual_seed(1)


def test_every_sampler_states_its_order():
    assert set(public_samplers()) == {*ORDERS, *STOCHASTIC, DormandPrince}


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


# The whole way, from t = 1 to t = 0

whole_interpolants = pytest.mark.parametrize(
    "interpolant", [Linear(), Trigonometric(), VariancePreserving()], ids=repr
)
EPS = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64).view(-1, 1, 1, 1)


@cache
def exact_samples(interpolant):
    """Return the samples of the noises EPS, by the adaptive solver.

    It solves the ODE on Trigonometric, which is smooth everywhere, from the state of equal SNR.
    """
    alpha, sigma = interpolant(torch.ones((), dtype=torch.float64))
    first = (torch.atan2(sigma, alpha) * 2 / math.pi).item()
    solver = DormandPrince(1, [first, 0.0], rtol=1e-11, atol=1e-11, end=1e-6)
    start = EPS * sigma / torch.hypot(alpha, sigma)
    with torch.inference_mode():
        return solver.integrate(mixture(Trigonometric()), start)[-1]


@whole_interpolants
@parametrize_samplers([Midpoint, Heun, RungeKutta4])
@torch.inference_mode()
def test_the_order_of_convergence_holds_up_to_the_data(interpolant, sampler):
    def error(steps):
        found = sampler(steps)(mixture(interpolant), EPS)
        return (found - exact_samples(interpolant)).square().mean().sqrt().item()

    assert math.log2(error(32) / error(64)) > ORDERS[sampler] - 0.3


@whole_interpolants
@parametrize_samplers([Midpoint, Heun, RungeKutta4])
@torch.inference_mode()
def test_the_order_of_the_inversion_holds_from_the_data(interpolant, sampler):
    """On VariancePreserving the first step of RungeKutta4, of third order, shows after 32 steps."""

    def error(steps):
        found = sampler(steps).invert(mixture(interpolant), exact_samples(interpolant))
        return (found - EPS).abs().max().item()

    assert math.log2(error(32) / error(64)) > ORDERS[sampler] - 0.5


def torchdiffeq_samples(denoiser, method, steps):
    """Return the samples of EPS on Linear, by a method of torchdiffeq in equal steps."""

    def velocity(t, x):
        x_hat, eps_hat = denoiser(x, t.expand(len(x)))
        return eps_hat - x_hat

    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return odeint(velocity, EPS, times, method=method)[-1]


@pytest.mark.parametrize("steps", [1, 4, 9])
@torch.inference_mode()
def test_midpoint_is_that_of_torchdiffeq_on_linear(steps):
    denoiser = mixture(Linear())
    expected = torchdiffeq_samples(denoiser, "midpoint", steps)
    torch.testing.assert_close(Midpoint(steps)(denoiser, EPS), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("sampler", "method"), [(Heun, "heun2"), (RungeKutta4, "rk4")])
@torch.inference_mode()
def test_errors_are_of_the_size_of_those_of_torchdiffeq(sampler, method):
    """Its last step evaluates the denoiser at t = 0, which an exact one allows; ours does not.

    Its "rk4" is the 3/8 rule, whose errors are a little smaller than the classical method's.
    """
    denoiser = mixture(Linear())
    exact = exact_samples(Linear())
    ours = (sampler(16)(denoiser, EPS) - exact).square().mean()
    theirs = (torchdiffeq_samples(denoiser, method, 16) - exact).square().mean()
    assert ours.sqrt() < 2 * theirs.sqrt()


class RecordingDenoiser:
    """Records the times at which a denoiser is evaluated."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.interpolant = denoiser.interpolant
        self.times = []

    def __call__(self, x_t, t, cond=None):
        self.times.append(t[0].item())
        return self.denoiser(x_t, t, cond)


@parametrize_samplers([Midpoint, Heun, RungeKutta4])
@pytest.mark.parametrize("direction", ["sampling", "inversion"])
def test_a_chain_is_sampled_at_its_levels_only(sampler, direction):
    """Not below the first, at t = 1 / 1000; the step from it to the data is DDIM's."""
    denoiser = RecordingDenoiser(mixture(Discrete.linear()))
    solver = sampler(8)
    run = solver if direction == "sampling" else solver.invert
    run(denoiser, EPS)
    assert min(denoiser.times) == pytest.approx(1e-3)
    assert len(denoiser.times) == solver.nfe(denoiser, inverse=direction == "inversion")


@parametrize_samplers([Midpoint, Heun, RungeKutta4])
@pytest.mark.parametrize("direction", ["sampling", "inversion"])
def test_a_chain_as_a_flow_is_sampled_at_its_levels_only(sampler, direction):
    """Neither on another interpolant, where the first level has another time."""
    network = RecordingDenoiser(mixture(Discrete.linear()))
    denoiser = Clipped(Retimed(network, Linear()), 100.0)
    solver = sampler(64)
    run = solver if direction == "sampling" else solver.invert
    run(denoiser, EPS)
    assert min(network.times) == pytest.approx(1e-3)
    assert len(network.times) == solver.nfe(denoiser, inverse=direction == "inversion")


def edm_samples(denoise, eps, levels):
    """Return EDM's samples without churn, in its own letters.

    Karras et al. 2022 (arXiv 2206.00364), algorithm 1.

    Args:
        denoise: D(x; sigma).
        eps: noise.
        levels: sigma_0 > ... > sigma_{N-1}; sigma_N = 0 follows.
    """
    x = levels[0] * eps
    for sigma, following in zip(levels, [*levels[1:], 0.0]):
        d = (x - denoise(x, sigma)) / sigma
        x_next = x + (following - sigma) * d
        if following != 0:
            d_next = (x_next - denoise(x_next, following)) / following
            x_next = x + (following - sigma) * (d + d_next) / 2
        x = x_next
    return x


def edm_levels(count, low, high, rho=7):
    """Return EDM's noise levels, eq. 5."""
    roots = [
        high ** (1 / rho) + i / max(count - 1, 1) * (low ** (1 / rho) - high ** (1 / rho))
        for i in range(count)
    ]
    return [root**rho for root in roots]


@pytest.mark.parametrize("steps", [1, 2, 6, 18])
@pytest.mark.parametrize(
    ("interpolant", "grid"),
    [
        (EDMPath(), None),
        (EDMPath(), karras),
        (VarianceExploding(0.002, 80.0), karras),
        (Linear(), karras),
        (Linear(0.002), karras),
        (VariancePreserving(), karras),
    ],
    ids=["edm", "edm-karras", "ve", "linear", "linear-noisy", "vp"],
)
@torch.inference_mode()
def test_edm_heun_is_edms_sampler(interpolant, grid, steps):
    """N noise levels, of which the last leads to the data without noise, at 2 N - 1 evaluations."""
    reference = mixture(EDMPath())

    def denoise(x, sigma):
        level = torch.tensor(sigma, dtype=torch.float64)
        path = EDMPath()
        return reference(x, path.time_of_snr(torch.ones_like(level), level).expand(len(x)))[0]

    times = grid(steps, interpolant) if grid else None
    sampler = EDMHeun(steps, times)
    _, sigma = interpolant(torch.zeros(()))
    denoiser = CountingDenoiser(mixture(interpolant), at_zero=sigma > 0)
    expected = edm_samples(denoise, EPS, edm_levels(steps, 0.002, 80.0))
    torch.testing.assert_close(sampler(denoiser, EPS), expected, rtol=1e-5, atol=1e-5)
    assert denoiser.calls == 2 * steps - 1 == sampler.nfe(denoiser)


def test_edm_heun_leaves_no_noise_on_ve():
    point = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    eps = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    x = EDMHeun(4)(Point(VarianceExploding(), point), eps)
    torch.testing.assert_close(x, point.expand_as(x))


def test_edm_heun_spreads_a_grid_that_starts_at_pure_noise():
    """Linear(.1) is data and noise at t = 0, so that t = 0 is the last of three levels."""
    times = EDMHeun(3, [1.0, 0.8, 0.4, 0.0]).grid(Linear(0.1))
    assert times[0] == 1 and times[2:] == [0, 0]
    assert 0.4 < times[1] < 0.8


@pytest.mark.parametrize("interpolant", [VarianceExploding(0.1, 50.0), Linear(0.1)], ids=repr)
@parametrize_samplers([DDIM, DPMSolver2M])
@torch.inference_mode()
def test_an_inversion_begins_with_the_noise_that_is_left_at_0(interpolant, sampler):
    """As the ODE makes a state with noise: otherwise the error would stay above .03."""
    denoiser = mixture(interpolant)
    x = RungeKutta4(32)(denoiser, EPS)

    def error(steps):
        return (sampler(steps).invert(denoiser, x) - EPS).abs().max().item()

    assert error(64) < 0.1
    assert math.log2(error(64) / error(128)) > 0.7


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
