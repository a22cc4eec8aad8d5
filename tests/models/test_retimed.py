"""A denoiser on another interpolant: at equal SNR the states are the same up to scale."""

import pytest
import torch

from models.denoiser import Denoiser
from models.description import build, describe
from models.guidance import Guided
from models.interpolant import Discrete, EDMPath, Linear, Trigonometric, VariancePreserving
from models.nets.dit import DiT
from models.prediction import NoisePrediction
from models.retimed import Retimed
from models.sampler import DDIM
from tests.examples import every_interpolant
from tests.helpers.refusals import refused
from tests.oracle import Mixture


def mixture(interpolant):
    return Mixture(interpolant, [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6])


def angles(interpolant):
    """Return the angles atan2(sigma, alpha) at t = 0 and t = 1."""
    alpha, sigma = interpolant(torch.tensor([0.0, 1.0]).double())
    return torch.atan2(sigma, alpha).tolist()


@every_interpolant
@pytest.mark.parametrize("other", [Linear(), VariancePreserving()], ids=repr)
def test_a_retimed_exact_denoiser_is_the_exact_denoiser(interpolant, other):
    """On a mixture, at times where both interpolants have the SNR."""
    x_t = torch.randn(40, 1, 1, 1, dtype=torch.float64)
    retimed = Retimed(mixture(interpolant), other, gap=0.4)
    # Times of the other interpolant at the angles that both have.
    first, last = angles(interpolant)
    other_first, other_last = angles(other)
    low = max(first, other_first) + 1e-3
    high = min(last, other_last) - 1e-3
    phi = torch.linspace(low, high, 40, dtype=torch.float64)
    t = other.time_of_snr(phi.cos(), phi.sin())
    for found, expected in zip(retimed(x_t, t), mixture(other)(x_t, t)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_interpolant
def test_trajectories_are_the_same_at_equal_snr(interpolant):
    """DDIM through times of equal SNR visits the same states, scaled by the ratio of alphas."""
    # Times of both interpolants, and the scale between their states.
    times = torch.linspace(0.9, 0.3, 7, dtype=torch.float64)
    alpha, sigma = interpolant(times)
    linear_times = Linear().time_of_snr(alpha, sigma)
    scales = Linear()(linear_times)[0] / alpha
    # One trajectory on each.
    line = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    x = line * torch.hypot(alpha[0], sigma[0])
    exact = mixture(interpolant)
    retimed = Retimed(exact, Linear(), gap=0.4)
    states = DDIM(6, times.tolist()).integrate(exact, x)
    linear_states = DDIM(6, linear_times.tolist()).integrate(retimed, scales[0] * x)
    for scale, state, linear_state in zip(scales, states, linear_states):
        torch.testing.assert_close(scale * state, linear_state, rtol=1e-7, atol=1e-7)


def test_a_range_that_is_not_covered_is_refused():
    with refused(Retimed.__name__, repr(Linear()), repr(Linear(0.5)), "gap", 0.1):
        Retimed(mixture(Linear(0.5)), Linear())


def test_the_range_of_stable_diffusion_covers_linear():
    interpolant = Discrete.scaled_linear(beta_start=0.00085, beta_end=0.012)
    Retimed(mixture(interpolant), Linear())


def retimed_network():
    net = DiT(size=4, channels=2, patch=2, width=16, depth=1, heads=2, classes=3)
    return Retimed(Denoiser(net, VariancePreserving(), NoisePrediction()), Trigonometric())


def test_a_retimed_denoiser_is_sampled_with_a_scale():
    guided = Guided(retimed_network(), 2.0)
    x = DDIM(4)(guided, torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2]))
    assert x.isfinite().all()
    assert DDIM(4).nfe(guided) == 8


def test_a_guided_denoiser_is_retimed():
    retimed = Retimed(Guided(retimed_network(), 2.0), EDMPath(), 0.1)
    assert retimed.evaluations(torch.tensor([0.5])) == 2


def test_a_retimed_denoiser_is_rebuilt_from_its_description():
    retimed = retimed_network()
    assert describe(build(describe(retimed))) == describe(retimed)
