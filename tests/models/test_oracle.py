"""The exact denoiser of a Gaussian mixture against quadrature and the continuity equation, on every interpolant."""

import math

import pytest
import torch

from models.interpolant import Linear
from models.prediction import Score, Velocity
from tests.forms import every_interpolant
from tests.oracle import Mixture

MEANS, STDS, WEIGHTS = [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6]
TIMES = [0.1, 0.35037, 0.7, 0.95]


def normal(x, mean, std):
    return torch.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))


def law(x, alpha=1.0, sigma=0.0):
    """Return the density of x_t at x."""
    return sum(w * normal(x, alpha * m, math.hypot(alpha * s, sigma)) for m, s, w in zip(MEANS, STDS, WEIGHTS))


def spots(alpha, sigma):
    """Return states where p_t is not negligible, shape (9, 1, 1, 1)."""
    return (torch.linspace(-1.5, 1.5, 9, dtype=torch.float64) * math.hypot(1.3 * alpha, sigma)).view(-1, 1, 1, 1)


@every_interpolant
@pytest.mark.parametrize("time", TIMES)
def test_posterior_means_score_and_velocity_are_the_integrals(interpolant, time):
    """E[x | x_t] = int x p(x) N(x_t; alpha x, sigma^2) dx / p_t(x_t), on a grid that resolves the narrower factor."""
    t = torch.tensor(time, dtype=torch.float64)
    (alpha, sigma), (da, ds) = ([v.item() for v in pair] for pair in (interpolant(t), interpolant.rates(t)))
    x_t = spots(alpha, sigma)
    x_hat, eps_hat = Mixture(interpolant, MEANS, STDS, WEIGHTS)(x_t, t)
    x = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    joint = law(x) * normal(x_t.view(-1, 1), alpha * x, sigma)
    evidence = torch.trapezoid(joint, x)
    mean = torch.trapezoid(joint * x, x) / evidence
    noise = torch.trapezoid(joint * (x_t.view(-1, 1) - alpha * x) / sigma, x) / evidence
    torch.testing.assert_close(x_hat.flatten(), mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(eps_hat.flatten(), noise, rtol=1e-7, atol=1e-7)
    score = Score().target(interpolant, x_hat, eps_hat, t).flatten()
    velocity = Velocity().target(interpolant, x_hat, eps_hat, t).flatten()
    at = x_t.flatten().requires_grad_()
    (slope,) = torch.autograd.grad(law(at, alpha, sigma).log().sum(), at)
    torch.testing.assert_close(score, slope, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(velocity, da * mean + ds * noise, rtol=1e-7, atol=1e-6)


@every_interpolant
@pytest.mark.parametrize("time", TIMES)
def test_velocity_carries_the_density(interpolant, time):
    """dp/dt + d(p u)/dx = 0, by central differences (off the knots of Discrete)."""
    h, mid = 1e-5, torch.tensor(time + 4.3e-4, dtype=torch.float64)
    alpha, sigma = (v.item() for v in interpolant(mid))
    x, step = spots(alpha, sigma), 1e-5 * math.hypot(alpha, sigma)

    def flux(x):
        u = Velocity().target(interpolant, *Mixture(interpolant, MEANS, STDS, WEIGHTS)(x, mid), mid)
        return law(x, alpha, sigma) * u

    ahead, behind = ([v.item() for v in interpolant(mid + d)] for d in (h, -h))
    change = (law(x, *ahead) - law(x, *behind)) / (2 * h)
    spread = (flux(x + step) - flux(x - step)) / (2 * step)
    torch.testing.assert_close(change, -spread, rtol=0, atol=1e-5 * spread.abs().max().item())


@every_interpolant
@pytest.mark.parametrize("time", [0.0, *TIMES, 1.0])
def test_the_closed_form_is_the_density_of_the_states(interpolant, time):
    """It integrates to 1, its integral is the distribution, and noised samples follow it (Kolmogorov-Smirnov)."""
    t, exact, n = torch.tensor(time, dtype=torch.float64), Mixture(interpolant, MEANS, STDS, WEIGHTS), 20_000
    alpha, sigma = (v.item() for v in interpolant(t))
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64) * math.hypot(alpha, sigma)
    p = exact.log_density(x[:, None], t).exp()
    torch.testing.assert_close(p, law(x, alpha, sigma), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cumulative_trapezoid(p, x), exact.distribution(x[1:], t), rtol=0, atol=1e-5)
    assert exact.distribution(x[-1:], t).item() == pytest.approx(1, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    data = exact.sample((n,), generator)
    states = interpolant.mix(data.double(), torch.randn(n, generator=generator).double(), t).sort().values
    gap = (exact.distribution(states, t) - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert gap < 1.63 / math.sqrt(n), "a gap that equal laws exceed once in a hundred times"


def test_a_mixture_that_is_none_is_refused():
    for means, stds, weights, said in [
        ([0.0], [1.0, 2.0], [1.0], "1 means, 2 stds"),
        ([0.0], [0.0], [1.0], "must be positive"),
        ([0.0, 1.0], [1.0, 1.0], [0.5, 0.6], "sum 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            Mixture(Linear(), means, stds, weights)
