"""Shortcut models against the exact jumps of a Gaussian and of a point."""

import pytest
import torch
from torch import nn

from data.batch import Batch
from models.denoiser import Denoiser
from models.interpolant import Linear, expand
from models.nets.dit import DiT
from models.prediction import Velocity
from tests.forms import every_interpolant
from tests.oracle import Flow, Point
from tests.trainer.jumps import Moved, Straight
from trainer.draws import Draws
from trainer.objectives import Shortcut


def sized(objective, size):
    """Return grids of steps of 2^-size."""
    return objective.grid(
        torch.full((12,), (size + 0.5) / objective.halvings, dtype=torch.float64), torch.arange(12).double() / 12
    )


def test_steps_are_powers_of_two_on_their_own_grid():
    objective = Shortcut(halvings=3)
    t, middle, until = objective.grid(torch.rand(6000), torch.rand(6000))
    steps, counts = (t - until).mul(8).round().unique(return_counts=True)
    assert steps.tolist() == [2, 4, 8] and counts.min() > 1800
    torch.testing.assert_close((t + until) / 2, middle, rtol=0, atol=1e-5)
    torch.testing.assert_close(until / (t - until), (until / (t - until)).round(), rtol=0, atol=1e-3)
    assert until.min() == 0 and t.max() < 1


@every_interpolant
@pytest.mark.parametrize("size", [0, 2, 5])
def test_two_exact_jumps_are_one(interpolant, size):
    objective, flow = Shortcut(), Flow(interpolant)
    t, middle, until = sized(objective, size)
    x_t = torch.randn(12, 1, 2, 2, dtype=torch.float64)
    x, eps = objective.chord(flow, x_t, t, middle, until, None)
    torch.testing.assert_close(interpolant.mix(x, eps, until), flow.map(x_t, t, until))
    torch.testing.assert_close(interpolant.mix(x, eps, t), x_t)


@pytest.mark.parametrize("size", [0, 3, 6])
def test_on_linear_it_is_the_mean_of_two_velocities(size):
    """s(x, t, 2d) = (s(x, t, d) + s(x', t - d, d)) / 2 (2410.12557, eq. 4); the smallest d is 0."""
    net = DiT(size=4, channels=2, patch=2, width=16, depth=1, heads=2, jumps=True)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    denoiser, objective = Denoiser(net, Linear(), Velocity()), Shortcut()
    t, middle, until = sized(objective, size)
    x_t = torch.randn(12, 2, 4, 4, dtype=torch.float64)
    first = Velocity().target(Linear(), *denoiser(x_t, t, None, t if size == 6 else middle), t)
    x_m = x_t - expand(t - middle, x_t) * first
    second = Velocity().target(Linear(), *denoiser(x_m, middle, None, middle if size == 6 else until), middle)
    x, eps = objective.chord(denoiser, x_t, t, middle, until, None)
    torch.testing.assert_close(eps - x, (first + second) / 2, rtol=1e-3, atol=1e-3)  # t is off the end by 1e-5


@every_interpolant
def test_the_loss_is_zero_at_the_truth_and_counts_its_evaluations(interpolant):
    """One of each sample, and two more of one in four (2410.12557, section 3.2)."""
    x, eps = torch.randn(1, 1, 2, 2, dtype=torch.float64), torch.randn(64, 1, 2, 2, dtype=torch.float64)
    truth = Straight(interpolant, x)
    assert Shortcut(measure=Velocity())(truth, x.expand_as(eps), eps) < 1e-9 and truth.asked == 64 + 2 * 16
    assert Shortcut(measure=Velocity())(Straight(interpolant, x + 0.1), x.expand_as(eps), eps) > 1e-4


@every_interpolant
def test_the_gradient_points_to_the_truth_and_leaves_the_half_jumps_alone(interpolant):
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 20_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    def loss(theta, held):
        moved = Moved(interpolant)
        moved.theta, moved.held = theta, held
        torch.manual_seed(1)
        return Shortcut()(moved, 0.5 + 0.7 * z, eps)

    for start in (-1.0, 1.0):
        theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        loss(theta, theta.detach()).backward()
        there = [loss(theta.detach() + h, theta.detach()).item() for h in (-1e-3, 1e-3)]
        assert theta.grad.item() == pytest.approx((there[1] - there[0]) / 2e-3, rel=1e-5)
        assert theta.grad.item() * start > 0


def test_ranks_share_the_work_of_the_global_batch():
    """Whatever the slices: the same samples learn from jumps, at the same times."""
    x, eps, flow = torch.randn(96, 1, 2, 2), torch.randn(96, 1, 2, 2), Flow(Linear())
    seen = []
    for places in ([(0, 96)], [(0, 30), (30, 96)]):
        objective, parts = Shortcut(), []
        for first, last in places:
            draws = Draws(Batch(x[first:last], True, seed=3, step=5, start=first, size=96))
            objective(flow, x[first:last], eps[first:last], None, draws)
            parts.append(objective.seen)
        seen.append([torch.cat(values) for values in zip(*parts)])
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Shortcut(every=1), "every is 1, it must be at least 2"),
        (lambda: Shortcut(halvings=0), "halvings is 0, it must lie in"),
        (lambda: Shortcut()(Point(Linear(), torch.zeros(1)), *torch.zeros(2, 3, 1, 2, 2)), "jumps true"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
