"""The exact denoiser of a Gaussian mixture, against quadrature and the continuity equation."""

import math

import pytest
import torch

from models.interpolant import Linear
from models.prediction import Score, Velocity
from tests.examples import every_interpolant
from tests.helpers.refusals import refused
from tests.oracle import Mixture

MEANS = [-1.0, 1.5]
STDS = [0.4, 0.6]
WEIGHTS = [0.4, 0.6]
TIMES = [0.1, 0.35037, 0.7, 0.95]


def normal(x, mean, std):
    """Return the density of N(mean, std^2) at x."""
    return torch.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def density(x, alpha=1.0, sigma=0.0):
    """Return the density of the states x_t = alpha x + sigma eps at x."""
    total = 0.0
    for mean, std, weight in zip(MEANS, STDS, WEIGHTS):
        total = total + weight * normal(x, alpha * mean, math.hypot(alpha * std, sigma))
    return total


def likely_states(alpha, sigma):
    """Return states at which p_t is not negligible, shape (9, 1, 1, 1)."""
    width = math.hypot(1.3 * alpha, sigma)
    return (torch.linspace(-1.5, 1.5, 9, dtype=torch.float64) * width).view(-1, 1, 1, 1)


def mixture(interpolant):
    return Mixture(interpolant, MEANS, STDS, WEIGHTS)


def integrated_means(x_t, alpha, sigma):
    """Return E[x | x_t] and E[eps | x_t], shape (B,), by quadrature.

    E[x | x_t] = int x p(x) N(x_t; alpha x, sigma^2) dx / p_t(x_t); the grid resolves the
    narrower factor.
    """
    x = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    state = x_t.view(-1, 1)
    joint = density(x) * normal(state, alpha * x, sigma)
    evidence = torch.trapezoid(joint, x)
    data = torch.trapezoid(joint * x, x) / evidence
    noise = torch.trapezoid(joint * (state - alpha * x) / sigma, x) / evidence
    return data, noise


@every_interpolant
@pytest.mark.parametrize("time", TIMES)
def test_posterior_means_and_velocity_are_the_integrals(interpolant, time):
    t = torch.tensor(time, dtype=torch.float64)
    alpha, sigma = (value.item() for value in interpolant(t))
    d_alpha, d_sigma = (value.item() for value in interpolant.derivatives(t))
    x_t = likely_states(alpha, sigma)
    x_hat, eps_hat = mixture(interpolant)(x_t, t)
    velocity = Velocity().target(interpolant, x_hat, eps_hat, t).flatten()
    data, noise = integrated_means(x_t, alpha, sigma)
    torch.testing.assert_close(x_hat.flatten(), data, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(eps_hat.flatten(), noise, rtol=1e-7, atol=1e-7)
    expected = d_alpha * data + d_sigma * noise
    torch.testing.assert_close(velocity, expected, rtol=1e-7, atol=1e-6)


@every_interpolant
@pytest.mark.parametrize("time", TIMES)
def test_score_is_the_gradient_of_the_density(interpolant, time):
    t = torch.tensor(time, dtype=torch.float64)
    alpha, sigma = (value.item() for value in interpolant(t))
    x_t = likely_states(alpha, sigma)
    x_hat, eps_hat = mixture(interpolant)(x_t, t)
    score = Score().target(interpolant, x_hat, eps_hat, t).flatten()
    state = x_t.flatten().requires_grad_()
    (gradient,) = torch.autograd.grad(density(state, alpha, sigma).log().sum(), state)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)


@every_interpolant
@pytest.mark.parametrize("time", TIMES)
def test_velocity_carries_the_density(interpolant, time):
    """dp/dt + d(p u)/dx = 0, by central differences (off the knots of Discrete)."""
    t = torch.tensor(time + 4.3e-4, dtype=torch.float64)
    alpha, sigma = (value.item() for value in interpolant(t))
    x = likely_states(alpha, sigma)

    def flux(x):
        x_hat, eps_hat = mixture(interpolant)(x, t)
        u = Velocity().target(interpolant, x_hat, eps_hat, t)
        return density(x, alpha, sigma) * u

    # dp/dt
    h = 1e-5
    ahead = [value.item() for value in interpolant(t + h)]
    behind = [value.item() for value in interpolant(t - h)]
    change = (density(x, *ahead) - density(x, *behind)) / (2 * h)
    # d(p u)/dx
    step = 1e-5 * math.hypot(alpha, sigma)
    divergence = (flux(x + step) - flux(x - step)) / (2 * step)
    tolerance = 1e-5 * divergence.abs().max().item()
    torch.testing.assert_close(change, -divergence, rtol=0, atol=tolerance)


every_time = pytest.mark.parametrize("time", [0.0, *TIMES, 1.0])


@every_interpolant
@every_time
def test_log_density_and_distribution_are_those_of_the_states(interpolant, time):
    """The density's integral is the distribution, which ends at 1."""
    t = torch.tensor(time, dtype=torch.float64)
    exact = mixture(interpolant)
    alpha, sigma = (value.item() for value in interpolant(t))
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64) * math.hypot(alpha, sigma)
    p = exact.log_density(x[:, None], t).exp()
    torch.testing.assert_close(p, density(x, alpha, sigma), rtol=1e-9, atol=1e-12)
    integral = torch.cumulative_trapezoid(p, x)
    torch.testing.assert_close(integral, exact.distribution(x[1:], t), rtol=0, atol=1e-5)
    assert exact.distribution(x[-1:], t).item() == pytest.approx(1, abs=1e-12)


@every_interpolant
@every_time
def test_noised_samples_follow_the_distribution(interpolant, time):
    """By the Kolmogorov-Smirnov test, which a true distribution fails once in a hundred times."""
    n = 20_000
    t = torch.tensor(time, dtype=torch.float64)
    exact = mixture(interpolant)
    generator = torch.Generator().manual_seed(0)
    data = exact.sample((n,), generator).double()
    noise = torch.randn(n, generator=generator).double()
    states = interpolant.mix(data, noise, t).sort().values
    empirical = (torch.arange(n) + 0.5) / n
    gap = (exact.distribution(states, t) - empirical).abs().max().item()
    assert gap < 1.63 / math.sqrt(n)


@pytest.mark.parametrize(
    ("means", "stds", "weights", "named"),
    [
        ([0.0], [1.0, 2.0], [1.0], ["means", 1, "stds", 2, "weights"]),
        ([0.0], [0.0], [1.0], ["stds", [0.0]]),
        ([0.0, 1.0], [1.0, 1.0], [0.5, 0.6], ["weights", [0.5, 0.6]]),
    ],
    ids=["lengths", "zero-std", "sum-of-weights"],
)
def test_an_impossible_mixture_is_refused(means, stds, weights, named):
    with refused("Mixture", *named):
        Mixture(Linear(), means, stds, weights)
