"""All interpolants give the same trajectories at equal SNR, up to scale."""

import pytest
import torch

from models import teacher
from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Discrete, Karras, Linear, Trigonometric, VariancePreserving
from models.nets.dit import DiT
from models.prediction import Noise
from models.retimed import Retimed
from models.sampler import DDIM
from tests.forms import every_interpolant
from tests.oracle import Mixture

MIXTURE = [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6]


@every_interpolant
def test_it_is_the_other_interpolants_own_denoiser(interpolant):
    """On the exact denoiser of a mixture, wherever both SNRs exist."""
    x_t = torch.randn(40, 1, 1, 1, dtype=torch.float64)
    for other in (Linear(), VariancePreserving()):
        seen = Retimed(Mixture(interpolant, *MIXTURE), other, gap=0.4)
        angle = [torch.atan2(*reversed(i(torch.tensor([0.0, 1.0]).double()))) for i in (interpolant, other)]
        low, high = max(a[0] for a in angle) + 1e-3, min(a[1] for a in angle) - 1e-3
        angles = torch.linspace(low.item(), high.item(), 40, dtype=torch.float64)
        t = other.time(angles.cos(), angles.sin())
        for mine, theirs in zip(seen(x_t, t), Mixture(other, *MIXTURE)(x_t, t)):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@every_interpolant
def test_trajectories_are_the_same_at_equal_snr(interpolant):
    """DDIM through times of equal SNR visits the same states, scaled by the ratio of the alphas."""
    times = torch.linspace(0.9, 0.3, 7, dtype=torch.float64)
    alpha, sigma = interpolant(times)
    flow = Linear()
    there = flow.time(alpha, sigma)
    scale = flow(there)[0] / alpha
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1) * torch.hypot(alpha[0], sigma[0])
    exact = Mixture(interpolant, *MIXTURE)
    ours = DDIM(6, times.tolist()).walk(exact, x)
    theirs = DDIM(6, there.tolist()).walk(Retimed(exact, flow, gap=0.4), scale[0] * x)
    for s, a, b in zip(scale, ours, theirs):
        torch.testing.assert_close(s * a, b, rtol=1e-7, atol=1e-7)


def test_a_range_that_is_not_covered_is_refused():
    with pytest.raises(ValueError, match="more than gap"):
        Retimed(Mixture(Linear(0.5), *MIXTURE), Linear())
    Retimed(Mixture(Discrete.scaled_linear(beta_start=0.00085, beta_end=0.012), *MIXTURE), Linear())


def test_it_is_guided_sampled_and_described():
    net = DiT(size=4, channels=2, patch=2, width=16, depth=1, heads=2, classes=3)
    seen = Retimed(Denoiser(net, VariancePreserving(), Noise()), Trigonometric())
    guided, eps = Guided(seen, 2.0), torch.randn(3, 2, 4, 4)
    assert DDIM(4)(guided, eps, torch.tensor([0, 1, 2])).isfinite().all() and DDIM(4).nfe(guided) == 8
    assert Retimed(guided, Karras(), 0.1).evaluations(torch.tensor([0.5])) == 2 and seen.shape == (2, 4, 4)
    assert teacher.describe(teacher.build(teacher.describe(seen))) == teacher.describe(seen)
