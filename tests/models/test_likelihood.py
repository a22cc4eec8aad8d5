"""Log-likelihoods against the closed forms of Gaussians and mixtures."""

import math

import pytest
import torch
from torch import nn

from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.likelihood import (
    AdaptiveSolver,
    Exact,
    FixedSolver,
    Hutchinson,
    VelocityAndDivergence,
    bits_per_dim,
    log_prob,
)
from models.nets.dit import DiT
from models.prediction import NoisePrediction, Velocity
from tests.examples import every_interpolant
from tests.helpers.refusals import refused
from tests.oracle import CountingDenoiser, Mixture, single

ONE = torch.tensor(1.0)
LINE = torch.linspace(-2, 2.5, 8, dtype=torch.float64).view(-1, 1, 1, 1)
X = LINE * torch.tensor([1.0, 0.3], dtype=torch.float64)


def two_modes(interpolant):
    return Mixture(interpolant, [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6])


def exact_density(oracle, x, t=1e-4):
    """Return the log-density at x of data + (sigma / alpha) noise at t."""
    alpha, _ = oracle.interpolant(torch.tensor(t, dtype=torch.float64))
    return oracle.log_density(alpha * x, torch.tensor(t)) + x[0].numel() * alpha.log()


def exact_prior(oracle):
    """Return the exact log-density of the states at t = 1."""
    return lambda end: oracle.log_density(end, ONE)


def solved_density(oracle, x, t=1e-4, tolerance=2e-4):
    """Return the solver's log-density at x; where it refuses the solve, with more steps."""
    options = {"prior": exact_prior(oracle), "t_min": t, "tolerance": tolerance}
    for steps in (40, 120, 360):
        try:
            return log_prob(oracle, x, solver=FixedSolver(steps), **options)[0]
        except ValueError as error:
            assert "tolerance" in str(error)
    raise AssertionError("360 steps were not enough")


@every_interpolant
@pytest.mark.parametrize("oracle", [single, two_modes])
def test_the_density_of_an_exact_denoiser_is_exact(interpolant, oracle):
    """Within 1e-3 nat, with the exact trace and the exact density at t = 1."""
    denoiser = oracle(interpolant)
    t = 2e-3  # a table of 1000 entries has a kink at its first one
    difference = solved_density(denoiser, X, t) - exact_density(denoiser, X, t)
    assert difference.abs().max() < 1e-3


@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric(), VariancePreserving()], ids=repr)
def test_the_default_start_is_near_enough_to_the_data(interpolant):
    """Where sigma(0) = 0 the density is that of the data, to 1e-3 nat."""
    expected = two_modes(Linear()).log_density(X, torch.tensor(0.0))
    assert (solved_density(two_modes(interpolant), X) - expected).abs().max() < 1e-3


@every_interpolant
def test_the_default_prior_is_a_normal_distribution(interpolant):
    """VP and VE do not end in N(0, sigma^2): the error is the difference of both at t = 1."""
    oracle = two_modes(interpolant)
    ends = []

    def recording_prior(end):
        ends.append(end)
        return oracle.log_density(end, ONE)

    options = {"solver": FixedSolver(8), "tolerance": math.inf}
    default, _ = log_prob(oracle, X, **options)
    exact, _ = log_prob(oracle, X, prior=recording_prior, **options)
    difference = default - exact
    # The same difference at the noisy end.
    sigma = interpolant(ONE.double())[1]
    normal = torch.distributions.Normal(0.0, sigma).log_prob(ends[0]).flatten(1).sum(1)
    expected = normal - oracle.log_density(ends[0], ONE)
    torch.testing.assert_close(difference, expected, rtol=0, atol=1e-9)
    assert difference.abs().max() < 0.5


@pytest.mark.parametrize(
    "solver", [FixedSolver(2), AdaptiveSolver()], ids=lambda s: type(s).__name__
)
def test_a_network_is_never_called_outside_its_times(solver):
    """Our denoisers refuse t > 1.

    A new DiT has u = 0, along which an adaptive solver would take a step of any size. Its
    density is N(0, 1).
    """
    net = DiT(size=1, channels=2, patch=1, width=8, depth=1, heads=1)
    denoiser = Denoiser(net, Linear(), Velocity())
    found, _ = log_prob(denoiser, X.view(-1, 2, 1, 1).float(), solver=solver)
    expected = -(X.flatten(1).square() + math.log(2 * math.pi)).sum(1) / 2
    assert (found - expected).abs().max() < 2e-3


every_scale = pytest.mark.parametrize("scale", [1.0, 2.5])


@pytest.mark.parametrize(
    "solver", [FixedSolver(12), AdaptiveSolver(1e-6, 1e-6)], ids=lambda s: type(s).__name__
)
@every_scale
def test_nfe_counts_network_calls(solver, scale):
    denoiser = CountingDenoiser(two_modes(Linear()))
    log_p, nfe = log_prob(Guided(denoiser, scale), X, solver=solver, tolerance=1.0)
    assert nfe == denoiser.calls
    assert log_p.shape == (8,)


@every_scale
def test_nfe_of_fixed_steps_counts_both_solves(scale):
    """The fine one and the rough one, of half as many steps, at four calls a step."""
    guided = Guided(two_modes(Linear()), scale)
    _, nfe = log_prob(guided, X, solver=FixedSolver(12), tolerance=1.0)
    assert nfe == 4 * (12 + 6) * (1 if scale == 1 else 2)


@pytest.mark.parametrize("interpolant", [Linear(), VariancePreserving()], ids=repr)
def test_the_adaptive_solver_is_exact(interpolant):
    oracle = two_modes(interpolant)
    found, _ = log_prob(oracle, X, solver=AdaptiveSolver(), prior=exact_prior(oracle))
    assert (found - exact_density(oracle, X)).abs().max() < 1e-3


ROUGH = {"solver": FixedSolver(32), "tolerance": math.inf}
ONE_SAMPLE = X[3:4, :, :, [0, 1, 0, 1]]


def hutchinson(count=1):
    return Hutchinson(torch.Generator().manual_seed(0), count)


def estimates(count=1):
    """Return 4000 estimates for one sample of a mixture."""
    samples = ONE_SAMPLE.expand(4000, -1, -1, -1)
    return log_prob(two_modes(Linear()), samples, trace=hutchinson(count), **ROUGH)[0]


@pytest.fixture(scope="module")
def one_probe():
    return estimates()


def test_hutchinson_is_unbiased(one_probe):
    exact, _ = log_prob(two_modes(Linear()), ONE_SAMPLE, **ROUGH)
    assert one_probe.std() > 1e-2
    assert abs(one_probe.mean() - exact) < 4 * one_probe.std() / math.sqrt(4000)


def test_hutchinson_varies_less_with_more_probes(one_probe):
    assert estimates(count=4).std() == pytest.approx(one_probe.std().item() / 2, rel=0.2)


def test_hutchinson_repeats_with_the_same_seed(one_probe):
    assert torch.equal(one_probe, estimates())


def test_hutchinson_is_exact_on_a_diagonal_jacobian():
    gaussian = single(Linear())
    found, _ = log_prob(gaussian, X, trace=hutchinson(), **ROUGH)
    torch.testing.assert_close(found, log_prob(gaussian, X, **ROUGH)[0])


class SineNetwork(nn.Module):
    """An untrained network whose velocity is far from linear."""

    def forward(self, x_t, time, cond=None):
        return (2 * x_t + 3 * time.view(-1, 1, 1, 1)).sin()


def test_the_density_of_any_network_integrates_to_one():
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    denoiser = Denoiser(SineNetwork(), Linear(), Velocity())
    log_p, _ = log_prob(denoiser, x.view(-1, 1, 1, 1), solver=FixedSolver(40), tolerance=1e-2)
    assert torch.trapezoid(log_p.exp(), x).item() == pytest.approx(1, abs=1e-4)


def random_network():
    torch.manual_seed(0)
    net = DiT(size=4, channels=1, patch=2, width=16, depth=1, heads=2, classes=3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Denoiser(net, Linear(), Velocity())


def test_the_divergence_is_the_trace_of_the_jacobian():
    denoiser = random_network().double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor(0.4, dtype=torch.float64)
    cond = torch.tensor([0, 2])

    def velocity(x):
        x_hat, eps_hat = denoiser(x, t.expand(2), cond)
        return eps_hat - x_hat

    u, divergence = VelocityAndDivergence(denoiser, cond, Exact().probes(x))(x, t)
    jacobian = torch.autograd.functional.jacobian(velocity, x).view(2, 16, 2, 16)
    traces = torch.stack([jacobian[i, :, i].trace() for i in range(2)])
    torch.testing.assert_close(u, velocity(x).detach())
    torch.testing.assert_close(divergence, traces)


def test_a_network_is_measured_under_inference_mode():
    """With a condition; it leaves no gradients."""
    denoiser = random_network()
    with torch.inference_mode():
        x = torch.randn(2, 1, 4, 4)
        cond = torch.tensor([0, 2])
        log_p, nfe = log_prob(denoiser, x, cond, hutchinson(), FixedSolver(10), tolerance=1.0)
    assert log_p.dtype == torch.float32
    assert log_p.isfinite().all()
    assert not log_p.requires_grad
    assert nfe == 60
    for parameter in denoiser.parameters():
        assert parameter.grad is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"solver": FixedSolver(2)}, ["tolerance", 0.001, "t_min"]),
        ({"solver": AdaptiveSolver(10.0, 10.0)}, ["tolerance", 0.001, "t_min"]),
        ({"solver": AdaptiveSolver(max_steps=2)}, ["rtol", "atol", "t_min"]),
        ({"t_min": 0.0}, ["t_min", 0.0]),
        ({"t_max": 1.5}, ["t_max", 1.5]),
        ({"x": X * math.nan}, ["x", "(8, 1, 1, 2)"]),
        ({"x": X[:0]}, ["x", "(0, 1, 1, 2)"]),
        (
            {"denoiser": Denoiser(SineNetwork(), Linear(), NoisePrediction())},
            [repr(NoisePrediction()), repr(Linear()), "t = 1"],
        ),
    ],
    ids=["few-steps", "loose", "most", "t_min", "t_max", "nan", "no-samples", "singular"],
)
def test_bad_input_is_refused(change, named):
    arguments = {"denoiser": two_modes(VariancePreserving()), "x": X, **change}
    with refused(*named):
        log_prob(**arguments)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FixedSolver(0), [FixedSolver.__name__, "steps", 0]),
        (lambda: FixedSolver(7), [FixedSolver.__name__, "steps", 7]),
        (lambda: AdaptiveSolver(0.0), [AdaptiveSolver.__name__, "rtol", 0.0]),
        (lambda: Hutchinson(torch.Generator(), 0), ["Hutchinson", "count", 0]),
        (lambda: bits_per_dim(torch.zeros(1), (1, 2, 2), (1.0, 1.0)), ["range", "(1.0, 1.0)"]),
    ],
    ids=["no-steps", "odd-steps", "tolerance", "count", "range"],
)
def test_impossible_settings_are_refused(make, named):
    with refused(*named):
        make()


every_range = pytest.mark.parametrize(
    ("range", "offset"), [((0.0, 1.0), 8.0), ((-1.0, 1.0), 7.0)], ids=["0-1", "-1-1"]
)


@every_range
def test_bits_per_dimension_are_the_textbook_ones(range, offset):
    """-log p / (D ln 2) + 8 for data in [0, 1], + 7 for data in [-1, 1]."""
    log_p = torch.tensor([-30.0, 5.0])
    expected = -log_p / (48 * math.log(2)) + offset
    torch.testing.assert_close(bits_per_dim(log_p, (3, 4, 4), range), expected)


@every_range
def test_uniform_bytes_cost_eight_bits(range, offset):
    low, high = range
    log_p = torch.tensor([-48 * math.log(high - low)])
    torch.testing.assert_close(bits_per_dim(log_p, (3, 4, 4), range), torch.tensor([8.0]))
