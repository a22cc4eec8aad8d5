"""Samplers that draw noise: their marginals, and that their noise is an argument."""

import math

import pytest
import torch

from data.noise import generator
from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.sampler import DDIM, Ancestral, EulerMaruyama, Renoising
from tests.examples import every_interpolant, public_samplers
from tests.helpers.refusals import refused
from tests.oracle import Flow, single

MEAN = 0.5
STD = 0.7
STOCHASTIC = [cls for cls in public_samplers() if cls.is_stochastic]
every_sampler = pytest.mark.parametrize(
    "sampler", [*STOCHASTIC, DDIM], ids=lambda cls: cls.__name__
)
every_gamma = pytest.mark.parametrize("gamma", [0.3, 0.8, 1.0])


def stochastic(sampler, steps, times=None):
    """Return a sampler that draws noise."""
    if sampler is DDIM:
        return DDIM(steps, times, eta=0.6)
    return sampler(steps, times)


def grid(first, last, steps):
    return torch.linspace(first, last, steps + 1, dtype=torch.float64).tolist()


def marginal(interpolant, t):
    """Return the exact mean and variance at t."""
    alpha, sigma = (v.item() for v in interpolant(torch.tensor(t, dtype=torch.float64)))
    return alpha * MEAN, alpha**2 * STD**2 + sigma**2


def sampled_marginal(sampler, interpolant):
    """Return mean and variance at the end of a grid, started from the exact ones at its first time.

    On N(m, s^2) a sampler is an affine map of the start and of every step's noise z, so that
    impulses give both without drawing. Sample 0 of the batch receives none, sample 1 that of
    the start, sample 2 + i that of z_i.
    """
    mean, variance = marginal(interpolant, sampler.times[0])
    x = torch.full((2 + sampler.steps, 1, 1, 1), mean, dtype=torch.float64)
    x[1] += math.sqrt(variance)
    impulses = torch.eye(len(x), dtype=torch.float64)

    def noise(step):
        return impulses[2 + step].view_as(x)

    end = sampler.integrate(Flow(interpolant, MEAN, STD), x, noise=noise)[-1].flatten()
    return end[0].item(), (end[1:] - end[0]).square().sum().item()


@every_interpolant
@every_sampler
@torch.inference_mode()
def test_gaussian_marginals_are_reproduced_to_weak_order_one(interpolant, sampler):
    """By exact jumps they are exact."""
    exact_mean, exact_variance = marginal(interpolant, 0.1)

    def error(steps):
        used = stochastic(sampler, steps, grid(0.9, 0.1, steps))
        mean, variance = sampled_marginal(used, interpolant)
        return max(abs(mean - exact_mean), abs(variance - exact_variance))

    coarse = error(64)
    fine = error(128)
    if sampler is Renoising:
        assert fine < 1e-9
    else:
        assert math.log2(coarse / fine) > 0.75
    assert fine < 0.2 * max(exact_variance, exact_mean)


@every_interpolant
@pytest.mark.parametrize("steps", [1, 2, 5])
@every_gamma
@torch.inference_mode()
def test_exact_jumps_have_exact_marginals_at_every_number_of_steps(interpolant, steps, gamma):
    """Whatever part of the noise is new.

    Consistency models (arXiv 2303.01469, section 4) and CTM (arXiv 2310.02279) sample so.
    """
    sampler = Renoising(steps, grid(0.9, 0.1, steps), gamma)
    found = sampled_marginal(sampler, interpolant)
    assert found == pytest.approx(marginal(interpolant, 0.1), rel=1e-6)


@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric(), VariancePreserving()], ids=repr)
@every_gamma
def test_renoising_by_ddim_is_ddim_with_a_part_of_new_noise(interpolant, gamma):
    """alpha_s x_hat + sigma_s (sqrt(1 - gamma^2) eps_hat + gamma z).

    With gamma = 1 this is algorithm 1 of arXiv 2303.01469.
    """
    x_t, z = torch.randn(2, 9, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor(0.8, dtype=torch.float64)
    s = torch.tensor(0.3, dtype=torch.float64)
    x_hat, eps_hat = single(interpolant)(x_t, t)
    mixed_noise = math.sqrt(1 - gamma**2) * eps_hat + gamma * z
    expected = interpolant.mix(x_hat, mixed_noise, s)
    sampler = Renoising(1, [0.8, 0.3], gamma)
    found = sampler.integrate(single(interpolant), x_t, noise=lambda step: z)[-1]
    torch.testing.assert_close(found, expected)


@every_sampler
@torch.inference_mode()
def test_samples_are_distributed_as_the_data(sampler):
    start = torch.Generator().manual_seed(0)
    eps = torch.randn(4000, 1, 1, 1, generator=start, dtype=torch.float64)
    noise = torch.Generator().manual_seed(1)
    x = stochastic(sampler, 64)(Flow(Trigonometric(), MEAN, STD), eps, noise=noise)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert x.std().item() == pytest.approx(STD, abs=0.05)


@pytest.mark.parametrize(
    "w",
    [torch.zeros_like, torch.square, lambda t: 3 * t * (1 - t)],
    ids=["none", "square", "parabola"],
)
def test_any_rate_of_noise_has_the_same_marginals(w):
    sampler = EulerMaruyama(128, grid(0.95, 0.05, 128), w)
    mean, variance = sampled_marginal(sampler, Linear())
    assert mean == pytest.approx(0.95 * MEAN, abs=0.01)
    assert variance == pytest.approx(0.95**2 * STD**2 + 0.05**2, abs=0.02)


@every_sampler
def test_noise_depends_on_the_generator_only(sampler):
    """The same arguments give the same bits; the global generator is not used."""
    used = stochastic(sampler, 4)
    eps = torch.randn(5, 1, 2, 2)
    before = torch.get_rng_state()

    def sample(seed):
        return used(single(Linear()), eps, noise=torch.Generator().manual_seed(seed))

    first = sample(7)
    assert torch.equal(first, sample(7))
    assert not torch.equal(first, sample(8))
    assert torch.equal(torch.get_rng_state(), before)


@every_sampler
def test_sampling_without_noise_is_refused(sampler):
    with refused("noise", None, "torch.Generator"):
        stochastic(sampler, 4)(single(Linear()), torch.randn(5, 1, 2, 2))


@every_sampler
def test_inversion_is_refused(sampler):
    with refused(sampler.__name__, "DDIM", "eta"):
        stochastic(sampler, 4).invert(single(Linear()), torch.randn(5, 1, 2, 2))


@every_sampler
def test_a_sample_does_not_depend_on_its_batch(sampler):
    """With noise that is a function of (seed, index, step)."""
    used = stochastic(sampler, 4)
    eps = torch.randn(6, 1, 2, 2)

    def sample(first, last):
        def noise(step):
            values = []
            for index in range(first, last):
                value = generator(3, step, stream=index).standard_normal(eps.shape[1:])
                values.append(torch.from_numpy(value))
            return torch.stack(values)

        return used(single(Linear()), eps[first:last], noise=noise)

    assert torch.equal(sample(0, 6), torch.cat([sample(0, 2), sample(2, 6)]))


def test_noise_of_another_shape_is_refused():
    eps = torch.randn(3, 1, 1, 1)
    with refused("noise", 0, "(1, 2)", "(3, 1, 1, 1)"):
        Ancestral(2)(single(Linear()), eps, noise=lambda step: torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("cls", "arguments", "named"),
    [
        (DDIM, {"eta": 1.5}, ["eta", 1.5]),
        (DDIM, {"eta": -0.1}, ["eta", -0.1]),
        (EulerMaruyama, {"w": torch.neg}, ["w", "[-1.0, -0.5,"]),
        (Renoising, {"gamma": 0.0}, ["gamma", 0.0]),
        (Renoising, {"gamma": 1.1}, ["gamma", 1.1]),
    ],
    ids=["eta-above", "eta-below", "w", "gamma-zero", "gamma-above"],
)
def test_impossible_amounts_of_noise_are_refused(cls, arguments, named):
    with refused(cls.__name__, *named):
        cls(2, **arguments)
