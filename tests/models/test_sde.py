"""Samplers that draw noise: their marginals, and that their noise is an argument."""

import math

import pytest
import torch

from data.noise import generator
from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.sampler import DDIM, Ancestral, EulerMaruyama, Renoising, Sampler
from tests.forms import every_interpolant
from tests.oracle import Flow, single

MEAN, STD = 0.5, 0.7
DRAWING = [cls for cls in Sampler.__subclasses__() if cls.draws]
every_sampler = pytest.mark.parametrize("sampler", [*DRAWING, DDIM], ids=lambda s: s.__name__)


def drawing(sampler, steps, times=None):
    return DDIM(steps, times, eta=0.6) if sampler is DDIM else sampler(steps, times)


def moments(walk, interpolant):
    """Return mean and variance at the end of a walk from the exact law at t_0, by the impulses of x and of every z.

    On N(m, s^2) a walk is an affine map of them; sample 0 of the batch feels none, sample 1 that of x, sample 2 + i z_i.
    """
    alpha, sigma = (v.item() for v in interpolant(torch.tensor(walk.times[0], dtype=torch.float64)))
    x = torch.full((2 + walk.steps, 1, 1, 1), alpha * MEAN, dtype=torch.float64)
    x[1] += math.sqrt(alpha**2 * STD**2 + sigma**2)
    impulses = torch.eye(len(x), dtype=torch.float64)
    end = walk.walk(Flow(interpolant, MEAN, STD), x, noise=lambda i: impulses[2 + i].view_as(x))[-1].flatten()
    return end[0].item(), (end[1:] - end[0]).square().sum().item()


@every_interpolant
@every_sampler
@torch.inference_mode()
def test_gaussian_marginals_are_reproduced_with_weak_order_one(interpolant, sampler):
    """Mean and variance are exact to h, and known without drawing: no tolerance for luck. By exact jumps they are exact."""
    grid = [torch.linspace(0.9, 0.1, n + 1, dtype=torch.float64).tolist() for n in (64, 128)]
    alpha, sigma = (v.item() for v in interpolant(torch.tensor(0.1, dtype=torch.float64)))
    errors = []
    for times in grid:
        mean, variance = moments(drawing(sampler, len(times) - 1, times), interpolant)
        errors.append(max(abs(mean - alpha * MEAN), abs(variance - alpha**2 * STD**2 - sigma**2)))
    assert errors[1] < 1e-9 if sampler is Renoising else math.log2(errors[0] / errors[1]) > 0.75
    assert errors[1] < 0.2 * max(alpha**2 * STD**2 + sigma**2, alpha * MEAN)


@every_interpolant
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("gamma", [0.3, 0.8, 1.0])
@torch.inference_mode()
def test_exact_jumps_have_the_marginals_at_every_number_of_steps(interpolant, steps, gamma):
    """Consistency models draw the data in any (2303.01469, section 4), whatever part of the noise is new (2310.02279)."""
    times = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()
    mean, variance = moments(Renoising(steps, times, gamma), interpolant)
    alpha, sigma = (v.item() for v in interpolant(torch.tensor(0.1, dtype=torch.float64)))
    assert (mean, variance) == pytest.approx((alpha * MEAN, alpha**2 * STD**2 + sigma**2), rel=1e-6)


@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric(), VariancePreserving()], ids=repr)
@pytest.mark.parametrize("gamma", [0.3, 0.8, 1.0])
def test_renoising_by_ddim_is_ddim_with_a_part_drawn_anew(interpolant, gamma):
    """alpha_s x_hat + sigma_s (sqrt(1 - gamma^2) eps_hat + gamma z): algorithm 1 of 2303.01469 with gamma 1."""
    x_t, z = torch.randn(2, 9, 1, 2, 2, dtype=torch.float64)
    x_hat, eps_hat = single(interpolant)(x_t, torch.tensor(0.8, dtype=torch.float64))
    expected = interpolant.mix(x_hat, math.sqrt(1 - gamma**2) * eps_hat + gamma * z, torch.tensor(0.3, dtype=torch.float64))
    found = Renoising(1, [0.8, 0.3], gamma).walk(single(interpolant), x_t, noise=lambda step: z)[-1]
    torch.testing.assert_close(found, expected)


@every_sampler
@torch.inference_mode()
def test_a_full_walk_draws_the_data(sampler):
    eps = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = drawing(sampler, 64)(Flow(Trigonometric(), MEAN, STD), eps, noise=torch.Generator().manual_seed(1))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.05) and x.std().item() == pytest.approx(STD, abs=0.05)


@pytest.mark.parametrize("w", [torch.zeros_like, torch.square, lambda t: 3 * t * (1 - t)])
def test_any_exchange_of_noise_has_the_same_marginals(w):
    times = torch.linspace(0.95, 0.05, 129, dtype=torch.float64).tolist()
    mean, variance = moments(EulerMaruyama(128, times, w), Linear())
    assert mean == pytest.approx(0.95 * MEAN, abs=0.01)
    assert variance == pytest.approx(0.95**2 * STD**2 + 0.05**2, abs=0.02)


@every_sampler
def test_no_noise_is_drawn_but_the_one_given(sampler):
    """Same bits for same arguments; the global generator is neither read nor moved."""
    eps, walk, denoiser = torch.randn(5, 1, 2, 2), drawing(sampler, 4), single(Linear())
    state = torch.get_rng_state()
    first, again, other = (walk(denoiser, eps, noise=torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="noise is None"):
        walk(denoiser, eps)
    with pytest.raises(ValueError, match="no inverse"):
        walk.invert(denoiser, eps)


@every_sampler
def test_noise_of_seed_index_and_step_does_not_depend_on_batches(sampler):
    """With noise a function of (seed, index, step), a sample's bits are its own."""
    eps, walk, denoiser = torch.randn(6, 1, 2, 2), drawing(sampler, 4), single(Linear())

    def keyed(indices):
        def z(step):
            drawn = [generator(3, step, stream=i).standard_normal(eps.shape[1:]) for i in indices]
            return torch.stack([torch.from_numpy(one) for one in drawn])

        return z

    whole = walk(denoiser, eps, noise=keyed(range(6)))
    parts = [walk(denoiser, eps[a:b], noise=keyed(range(a, b))) for a, b in ((0, 2), (2, 6))]
    assert torch.equal(whole, torch.cat(parts))


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise of step 0 has the shape \(1, 2\)"):
        Ancestral(2)(single(Linear()), torch.randn(3, 1, 1, 1), noise=lambda step: torch.zeros(1, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDIM(2, eta=1.5),
        lambda: DDIM(2, eta=-0.1),
        lambda: EulerMaruyama(2, w=torch.neg),
        lambda: Renoising(2, gamma=0.0),
        lambda: Renoising(2, gamma=1.1),
    ],
)
def test_impossible_amounts_of_noise_are_refused(make):
    with pytest.raises(ValueError, match="eta is|w is|gamma is"):
        make()
