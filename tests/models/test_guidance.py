"""Guidance: its interval, its rescaling, and a weaker denoiser as the negative."""

import pytest
import torch

from models.guidance import Guided
from models.interpolant import Linear, Trigonometric
from models.sampler import DDIM, Heun
from tests.oracle import single

INTERPOLANT = Trigonometric()


class Conditional:
    """The exact denoiser of N(cond, .5^2), or of N(0, 1) when told nothing; counts its calls."""

    interpolant = INTERPOLANT

    def __init__(self, std=0.5):
        self.std, self.calls = std, 0

    def __call__(self, x_t, t, cond=None):
        self.calls += 1
        return single(INTERPOLANT, *((0.0, 1.0) if cond is None else (cond, self.std)))(x_t, t)


def state():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64), torch.tensor([0.1, 0.4, 0.6, 0.9])


def test_guidance_acts_in_its_interval_only():
    (x_t, t), denoiser = state(), Conditional()
    plain, full = denoiser(x_t, t, 2.0), Guided(denoiser, 3.0)(x_t, t, 2.0)
    for part, c, w in zip(Guided(denoiser, 3.0, 0.4, 0.6)(x_t, t, 2.0), plain, full):
        assert torch.equal(part[[0, 3]], c[[0, 3]]) and torch.equal(part[[1, 2]], w[[1, 2]])
        assert not torch.equal(c[1], w[1])


@pytest.mark.parametrize("walk", [DDIM(10), Heun(10)], ids=lambda value: type(value).__name__)
def test_evaluations_inside_and_outside_the_interval(walk):
    counted = Conditional()
    guided = Guided(counted, 3.0, 0.3, 0.7)
    for dtype in (torch.float32, torch.float64):
        counted.calls = 0
        walk(guided, torch.randn(2, 1, 3, 3, dtype=dtype), 1.0)
        assert counted.calls == walk.nfe(guided)
    assert DDIM(10).nfe(guided) == 10 + 5  # t = .7, .6, .5, .4, .3


@pytest.mark.parametrize("guided", [Guided(Conditional(), 3.0, rescale=r) for r in (0.3, 1.0)], ids=lambda g: str(g.rescale))
def test_rescaling_restores_the_spread_and_keeps_the_state(guided):
    (x_t, t), plain = state(), Guided(guided.denoiser, 3.0)
    x_hat, eps_hat = guided(x_t, t, 2.0)
    torch.testing.assert_close(INTERPOLANT.mix(x_hat, eps_hat, t.double()), x_t, atol=1e-6, rtol=1e-6)
    wanted, found = guided.denoiser(x_t, t, 2.0)[0], plain(x_t, t, 2.0)[0]
    spread = [v.flatten(1).std(1) for v in (x_hat, wanted, found)]
    torch.testing.assert_close(spread[0], guided.rescale * spread[1] + (1 - guided.rescale) * spread[2])


def test_a_weaker_denoiser_is_the_negative():
    """Autoguidance: u is what the weaker one says of the same condition, and costs an evaluation."""
    (x_t, t), strong, weak = state(), Conditional(), Conditional(std=0.9)
    guided = Guided(strong, 2.0, negative=weak)
    for part, c, u in zip(guided(x_t, t, 1.0), strong(x_t, t, 1.0), weak(x_t, t, 1.0)):
        torch.testing.assert_close(part, u + 2.0 * (c - u))
    strong.calls = weak.calls = 0
    DDIM(4)(guided, x_t, 1.0)
    assert strong.calls + weak.calls == DDIM(4).nfe(guided) == 8


@pytest.mark.parametrize(
    "arguments",
    [{"low": 0.7, "high": 0.3}, {"high": 1.1}, {"rescale": 1.5}, {"negative": single(Linear())}],
    ids=lambda value: next(iter(value)),
)
def test_impossible_guidance_is_refused(arguments):
    with pytest.raises(ValueError, match="Guided: "):
        Guided(Conditional(), 2.0, **arguments)
