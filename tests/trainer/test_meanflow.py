"""MeanFlow against the exact jumps of a Gaussian and of a point; its derivative against finite differences."""

import pytest
import torch
from torch import nn

from data.batch import Batch
from models.denoiser import Denoiser
from models.interpolant import Linear, expand
from models.nets.attention import Attention
from models.nets.dit import DiT
from models.prediction import Velocity
from tests.forms import every_interpolant, every_prediction
from tests.oracle import Flow, Point
from tests.trainer.jumps import Moved, Straight
from trainer.draws import Draws
from trainer.errors import Adaptive, Squared
from trainer.module import Generator
from trainer.objectives import MeanFlow
from trainer.objectives.meanflow import mean_velocity
from trainer.times import UShaped

T = torch.linspace(0.3, 0.95, 14, dtype=torch.float64)
S = T * torch.linspace(0.1, 0.9, 14, dtype=torch.float64).flip(0)


class Tiny(nn.Module):
    """A network of float64 with attention that reads both times."""

    jumps = True

    def __init__(self):
        super().__init__()
        self.read, self.attention, self.out = nn.Linear(4, 8), Attention(8, 2), nn.Linear(8, 2)
        self.double()

    def forward(self, x_t, clock, cond=None, until=None):
        tokens = x_t.flatten(2).transpose(1, 2)
        until = clock if until is None else until
        told = torch.stack([clock, until], -1)[:, None].expand(-1, tokens.shape[1], -1)
        hidden = torch.sin(self.read(torch.cat([tokens, told], -1)))
        return self.out(hidden + self.attention(hidden)).transpose(1, 2).reshape(x_t.shape)


@every_interpolant
def test_the_mean_velocity_is_the_chord_and_in_the_limit_the_velocity(interpolant):
    x, eps = torch.randn(2, 14, 2, 3, 3, dtype=torch.float64)
    chord = (interpolant.mix(x, eps, T) - interpolant.mix(x, eps, S)) / expand(T - S, x)
    torch.testing.assert_close(mean_velocity(interpolant, (x, eps), T, S), chord)
    velocity = Velocity().target(interpolant, x, eps, T)
    torch.testing.assert_close(mean_velocity(interpolant, (x, eps), T, T), velocity)
    torch.testing.assert_close(mean_velocity(interpolant, (x, eps), T, T - 1e-6), velocity, rtol=1e-3, atol=1e-3)


@every_interpolant
def test_the_exact_jumps_leave_no_gap(interpolant):
    """Along the marginal velocity, which is that of the posterior means."""
    flow, x_t = Flow(interpolant), torch.randn(14, 1, 2, 2, dtype=torch.float64)
    for s in (S, None):
        gap = MeanFlow().gap(flow, *flow(x_t, T), T, s)
        torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-6)


@every_interpolant
def test_the_loss_is_zero_at_the_truth_and_counts_one_evaluation(interpolant):
    x, eps = torch.randn(1, 1, 2, 2, dtype=torch.float64), torch.randn(40, 1, 2, 2, dtype=torch.float64)
    for objective in (MeanFlow(error=Squared()), MeanFlow(UShaped(), UShaped(), same=0.0, error=Squared())):
        truth = Straight(interpolant, x)
        assert objective(truth, x.expand_as(eps), eps) < 1e-9 and truth.asked == 40
        assert objective(Straight(interpolant, x + 0.1), x.expand_as(eps), eps) > 1e-4


@every_interpolant
@every_prediction
def test_the_derivative_is_that_of_finite_differences(interpolant, prediction):
    """Through the attention, the solve and the row of the mean velocity, along dx_t/dt = u."""
    torch.manual_seed(0)
    denoiser = Denoiser(Tiny(), interpolant, prediction)
    x, eps = torch.randn(2, 14, 2, 2, 2, dtype=torch.float64)
    x_t, u, h = interpolant.mix(x, eps, T), Velocity().target(interpolant, x, eps, T), 1e-6
    ends = [mean_velocity(interpolant, denoiser(x_t + d * u, T + d, None, S), T + d, S) for d in (-h, 0, h)]
    expected = ends[1] - u + expand(T - S, u) * (ends[2] - ends[0]) / (2 * h)
    gap = MeanFlow().gap(denoiser, x, eps, T, S)
    torch.testing.assert_close(gap, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    gap.sum().backward()
    assert all(value.grad.isfinite().all() for value in denoiser.parameters())


@every_interpolant
def test_the_gradient_points_to_the_truth(interpolant):
    """The slope in theta is 2 E gap, the target held: from either side towards 0, where it is nothing but noise."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 14 * 3000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x, t, s = 0.5 + 0.7 * x, T.repeat(3000), S.repeat(3000)
    slopes = {}
    for theta in (-0.5, 0.0, 0.5):
        moved = Moved(interpolant)
        moved.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        gap = MeanFlow().gap(moved, x, eps, t, s)
        scale = gap.detach().std()
        (gap.square().mean() / scale).backward()
        slopes[theta] = moved.theta.grad.item()
        assert slopes[theta] == pytest.approx(2 * gap.mean().item() / scale.item(), rel=1e-6)  # of a target that is held
    noise = 2 * len(x) ** -0.5
    assert slopes[-0.5] < -noise < noise < slopes[0.5] and abs(slopes[0.0]) < 4 * noise


def test_guidance_moves_the_field():
    """u + w (c - u) with the network's own u: the gap is that of w v + (1 - w) u."""

    class Told:
        interpolant, jumps = Linear(), True

        def __call__(self, x_t, t, cond=None, s=None):
            velocity = torch.full_like(x_t, 5.0 if cond is None else 2.0)
            return x_t - expand(t, x_t) * velocity, x_t + expand(1 - t, x_t) * velocity

    x, eps = torch.randn(2, 14, 1, 2, 2, dtype=torch.float64)
    for s in (S, None):
        gap = MeanFlow(guidance=3.0).gap(Told(), x, eps, T, s, torch.zeros(14, dtype=torch.long))
        torch.testing.assert_close(gap, 2 - (3 * (eps - x) - 2 * 5.0))


def test_ranks_share_the_draws_of_the_global_batch():
    objective, interpolant = MeanFlow(), Linear()
    parts = [
        Draws(Batch(torch.zeros(n, 1, 2, 2), True, seed=3, step=5, start=at, size=96)) for at, n in ((0, 96), (0, 40), (40, 56))
    ]
    whole, *slices = (objective.drawn(interpolant, part.batch.x, part) for part in parts)
    for of_all, of_parts in zip(whole, zip(*slices)):
        torch.testing.assert_close(of_all, torch.cat(of_parts))
    t, s, jumps = whole
    assert (s <= t).all() and jumps.sum() == 24 and jumps.nonzero().diff(dim=0).eq(4).all()


def test_an_interval_may_reach_the_data():
    t, s, _ = MeanFlow(UShaped(), UShaped()).drawn(Linear(), torch.zeros(4000, 1, 1, 1), None)
    assert 0.4 < s.eq(0).float().mean() < 0.6 and (s <= t).all()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_adaptive_error_only_scales_the_gradient(power):
    gap = torch.randn(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    Adaptive(power, 0.1)(gap).sum().backward()
    squares = gap.detach().square().flatten(1).sum(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(gap.grad, 2 * gap.detach() / (squares + 0.1) ** power)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MeanFlow(same=1.0), "same is 1.0, it must lie in"),
        (lambda: MeanFlow(guidance=0.0), "guidance is 0.0, it must be positive"),
        (lambda: Adaptive(-1.0), "power is -1.0"),
        (lambda: Adaptive(1.0, 0.0), "floor is 0.0"),
        (lambda: MeanFlow()(Point(Linear(), torch.zeros(1)), *torch.zeros(2, 3, 1, 2, 2)), "jumps true"),
        (
            lambda: Generator(Denoiser(DiT(jumps=True), Linear(), Velocity()), MeanFlow(), recompute=True),
            "model.recompute: MeanFlow",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
