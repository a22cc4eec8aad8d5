"""Log-likelihoods against the closed forms of Gaussians and mixtures."""

import math

import pytest
import torch
from torch import nn

from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.likelihood import Adaptive, Exact, Fixed, Flow, Hutchinson, bits_per_dim, dequantise, log_prob
from models.nets.dit import DiT
from models.prediction import Noise, Velocity
from tests.forms import every_interpolant
from tests.oracle import Mixture, single

ONE = torch.tensor(1.0)
X = torch.linspace(-2, 2.5, 8, dtype=torch.float64).view(-1, 1, 1, 1) * torch.tensor([1.0, 0.3], dtype=torch.float64)


def modes(interpolant):
    return Mixture(interpolant, [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6])


def truth(oracle, x, t=1e-4):
    """Return the log-density of x under the law of data + (sigma / alpha) noise at t."""
    alpha, _ = oracle.interpolant(torch.tensor(t, dtype=torch.float64))
    return oracle.log_density(alpha * x, torch.tensor(t)) + x[0].numel() * alpha.log()


def solved(oracle, x, t=1e-4, tolerance=2e-4):
    """Solve as a user would: where the solve is refused, with more steps."""

    def prior(end):
        return oracle.log_density(end, ONE)

    for steps in (40, 120, 360):
        try:
            return log_prob(oracle, x, solver=Fixed(steps), prior=prior, t_min=t, tolerance=tolerance)[0]
        except ValueError as error:
            assert "take more steps" in str(error)
    raise AssertionError("360 steps were not enough")


@every_interpolant
@pytest.mark.parametrize("oracle", [single, modes])
def test_the_density_of_the_oracle(interpolant, oracle):
    """Within 1e-3 nat, with the exact trace and the oracle's own density at t = 1."""
    denoiser, t = oracle(interpolant), 2e-3  # a table of 1000 entries has a kink at its first
    assert (solved(denoiser, X, t) - truth(denoiser, X, t)).abs().max() < 1e-3


@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric(), VariancePreserving()], ids=repr)
def test_it_starts_near_enough_to_the_data(interpolant):
    """Where sigma(0) = 0 the density is that of the data themselves, to 1e-3 nat."""
    data = modes(Linear()).log_density(X, torch.tensor(0.0))
    assert (solved(modes(interpolant), X) - data).abs().max() < 1e-3


@every_interpolant
def test_the_default_prior_is_a_normal_and_its_mismatch_is_told_apart(interpolant):
    """VP and VE do not end in N(0, sigma^2): what is lost is the difference of the two densities at the noisy end."""
    oracle, ends = modes(interpolant), []

    def prior(end):
        ends.append(end)
        return oracle.log_density(end, ONE)

    options = {"solver": Fixed(8), "tolerance": math.inf}
    lost = log_prob(oracle, X, **options)[0] - log_prob(oracle, X, prior=prior, **options)[0]
    sigma = interpolant(ONE.double())[1]
    normal = torch.distributions.Normal(0.0, sigma).log_prob(ends[0]).flatten(1).sum(1)
    torch.testing.assert_close(lost, normal - oracle.log_density(ends[0], ONE), rtol=0, atol=1e-9)
    assert lost.abs().max() < 0.5


class Counting:
    """Counts the evaluations of a denoiser, and refuses t = 0."""

    def __init__(self, denoiser):
        self.denoiser, self.interpolant, self.calls = denoiser, denoiser.interpolant, 0

    def __call__(self, x_t, t, cond=None):
        assert t.shape == (len(x_t),) and (t > 0).all()
        self.calls += 1
        return self.denoiser(x_t, t, cond)


@pytest.mark.parametrize("solver", [Fixed(12), Adaptive(1e-6, 1e-6)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_nfe_counts_what_is_evaluated(solver, scale):
    counted = Counting(modes(Linear()))
    log_p, nfe = log_prob(Guided(counted, scale), X, solver=solver, tolerance=1.0)
    assert nfe == counted.calls and log_p.shape == (8,)
    if isinstance(solver, Fixed):
        assert nfe == 4 * (12 + 6) * (1 if scale == 1 else 2)


def test_the_adaptive_solver_agrees():
    for interpolant in (Linear(), VariancePreserving()):
        oracle = modes(interpolant)
        found, _ = log_prob(oracle, X, solver=Adaptive(), prior=lambda end, of=oracle: of.log_density(end, ONE))
        assert (found - truth(oracle, X)).abs().max() < 1e-3


def test_hutchinson_is_unbiased_and_keeps_its_probe():
    """Its mean is the exact trace's answer; on a diagonal Jacobian every probe's is; one seed gives one answer."""
    x, options = X[3:4, :, :, [0, 1, 0, 1]], {"solver": Fixed(32), "tolerance": math.inf}
    oracle = modes(Linear())
    exact, _ = log_prob(oracle, x, **options)
    many = x.expand(4000, -1, -1, -1)
    found, _ = log_prob(oracle, many, trace=Hutchinson(torch.Generator().manual_seed(0)), **options)
    assert found.std() > 1e-2 and abs(found.mean() - exact) < 4 * found.std() / math.sqrt(4000)
    several, _ = log_prob(oracle, many, trace=Hutchinson(torch.Generator().manual_seed(0), 4), **options)
    assert several.std() == pytest.approx(found.std().item() / 2, rel=0.2)
    again, _ = log_prob(oracle, many, trace=Hutchinson(torch.Generator().manual_seed(0)), **options)
    assert torch.equal(found, again)
    diagonal = single(Linear())
    probed, _ = log_prob(diagonal, X, trace=Hutchinson(torch.Generator().manual_seed(0)), **options)
    torch.testing.assert_close(probed, log_prob(diagonal, X, **options)[0])


class Wave(nn.Module):
    """An untrained velocity that bends one dimension."""

    def forward(self, x_t, clock, cond=None):
        return (2 * x_t + 3 * clock.view(-1, 1, 1, 1)).sin()


def test_any_network_has_a_density_of_mass_one():
    x = torch.linspace(-8, 8, 2001, dtype=torch.float64)
    log_p, _ = log_prob(Denoiser(Wave(), Linear(), Velocity()), x.view(-1, 1, 1, 1), solver=Fixed(40), tolerance=1e-2)
    assert torch.trapezoid(log_p.exp(), x).item() == pytest.approx(1, abs=1e-4)


def network():
    torch.manual_seed(0)
    net = DiT(size=4, channels=1, patch=2, width=16, depth=1, heads=2, classes=3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Denoiser(net, Linear(), Velocity())


def test_the_divergence_is_the_trace_of_the_jacobian():
    denoiser, x, t = network().double(), torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    u, divergence = Flow(denoiser, torch.tensor([0, 2]), Exact().probes(x))(x, t)

    def velocity(x):
        x_hat, eps_hat = denoiser(x, t.expand(2), torch.tensor([0, 2]))
        return eps_hat - x_hat

    torch.testing.assert_close(u, velocity(x).detach())
    jacobian = torch.autograd.functional.jacobian(velocity, x).view(2, 16, 2, 16)
    torch.testing.assert_close(divergence, torch.stack([jacobian[i, :, i].trace() for i in range(2)]))


def test_a_network_under_inference_mode_with_a_condition():
    denoiser, trace = network(), Hutchinson(torch.Generator().manual_seed(0))
    with torch.inference_mode():
        x, cond = torch.randn(2, 1, 4, 4), torch.tensor([0, 2])
        log_p, nfe = log_prob(denoiser, x, cond, trace, Fixed(10), tolerance=1.0)
    assert log_p.dtype == torch.float32 and log_p.isfinite().all() and nfe == 60 and not log_p.requires_grad
    assert all(parameter.grad is None for parameter in denoiser.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"solver": Fixed(2)}, "under-resolved.*nats per dimension, tolerance is 0.001: take more steps"),
        ({"solver": Adaptive(10.0, 10.0)}, "under-resolved"),
        ({"solver": Adaptive(most=2)}, "Adaptive cannot go on"),
        ({"t_min": 0.0}, "t_min is 0.0"),
        ({"t_max": 1.5}, "t_max is 1.5"),
        ({"x": X * math.nan}, "must hold at least one sample and be finite"),
        ({"x": X[:0]}, "shape .0, 1, 1, 2."),
        ({"denoiser": Denoiser(Wave(), Linear(), Noise())}, r"Noise\(\) is singular on Linear.* at t = 1"),
    ],
)
def test_bad_input_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        log_prob(**{"denoiser": modes(VariancePreserving()), "x": X, **change})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Fixed(0), "steps is 0"),
        (lambda: Fixed(7), "must be even"),
        (lambda: Adaptive(0.0), "must be positive"),
        (lambda: Hutchinson(torch.Generator(), 0), "count is 0"),
        (lambda: bits_per_dim(torch.zeros(1), (1, 2, 2), (1.0, 1.0)), "must rise"),
        (lambda: dequantise(torch.zeros(3), torch.Generator()), "must be torch.uint8"),
    ],
)
def test_impossible_settings_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(("range", "offset"), [((0.0, 1.0), 8.0), ((-1.0, 1.0), 7.0)])
def test_bits_per_dimension(range, offset):
    """-log p / (D ln 2) + 8 for data in [0, 1], + 7 for [-1, 1]; uniform bytes cost 8 bits either way."""
    log_p, shape = torch.tensor([-30.0, 5.0]), (3, 4, 4)
    torch.testing.assert_close(bits_per_dim(log_p, shape, range), -log_p / (48 * math.log(2)) + offset)
    uniform = torch.tensor([-48 * math.log(range[1] - range[0])])
    torch.testing.assert_close(bits_per_dim(uniform, shape, range), torch.tensor([8.0]))


def test_dequantised_bytes_fill_their_bins():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(40)
    x = dequantise(pixels, torch.Generator().manual_seed(0))
    place = (x.double() + 1) * 128
    assert torch.equal(place.floor().clamp(max=255).to(torch.uint8), pixels)
    assert (place - pixels).mean().item() == pytest.approx(0.5, abs=0.02) and (place - pixels).max() > 0.99
