"""MeanFlow at the exact jumps of a Gaussian and of a point, and its derivative."""

import pytest
import torch
from torch import nn

from data.batch import Batch
from models.denoiser import Denoiser
from models.interpolant import Linear, expand
from models.nets.attention import Attention
from models.nets.dit import DiT
from models.prediction import Velocity
from tests.examples import every_interpolant, every_prediction
from tests.helpers.denoisers import CountingDenoiser, PointJumps, ShiftedVelocity
from tests.helpers.refusals import refused
from tests.oracle import Flow, Point
from trainer.module import Generator
from trainer.objectives import MeanFlow
from trainer.objectives.meanflow import find_dropped, mean_velocity
from trainer.objectives.parts.distances import AdaptiveDistance, Squared
from trainer.objectives.parts.time_distributions import UShaped
from trainer.step_random import StepRandom

T = torch.linspace(0.3, 0.95, 14, dtype=torch.float64)
S = T * torch.linspace(0.1, 0.9, 14, dtype=torch.float64).flip(0)
intervals = pytest.mark.parametrize("s", [S, None], ids=["jump", "velocity"])


class AttentionNet(nn.Module):
    """A small float64 network with attention that reads both times."""

    two_time = True

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.attention = Attention(8, 2)
        self.out = nn.Linear(8, 2)
        self.double()

    def forward(self, x_t, time_input, cond=None, t_end=None):
        tokens = x_t.flatten(2).transpose(1, 2)
        end = time_input if t_end is None else t_end
        times = torch.stack([time_input, end], -1)[:, None].expand(-1, tokens.shape[1], -1)
        hidden = torch.sin(self.embed(torch.cat([tokens, times], -1)))
        hidden = self.out(hidden + self.attention(hidden))
        return hidden.transpose(1, 2).reshape(x_t.shape)


class ConstantVelocities:
    """A denoiser on Linear with the velocity 2 with a condition and 5 without."""

    interpolant = Linear()
    two_time = True

    def __call__(self, x_t, t, cond=None, s=None):
        velocity = torch.full_like(x_t, 5.0 if cond is None else 2.0)
        x_hat = x_t - expand(t, x_t) * velocity
        eps_hat = x_t + expand(1 - t, x_t) * velocity
        return x_hat, eps_hat


@every_interpolant
def test_the_mean_velocity_is_the_slope_of_the_chord(interpolant):
    x, eps = torch.randn(2, 14, 2, 3, 3, dtype=torch.float64)
    chord = interpolant.mix(x, eps, T) - interpolant.mix(x, eps, S)
    found = mean_velocity(interpolant, (x, eps), T, S)
    torch.testing.assert_close(found, chord / expand(T - S, x))


@every_interpolant
def test_the_mean_velocity_of_a_short_interval_is_the_velocity(interpolant):
    x, eps = torch.randn(2, 14, 2, 3, 3, dtype=torch.float64)
    velocity = Velocity().target(interpolant, x, eps, T)
    torch.testing.assert_close(mean_velocity(interpolant, (x, eps), T, T), velocity)
    nearly = mean_velocity(interpolant, (x, eps), T, T - 1e-6)
    torch.testing.assert_close(nearly, velocity, rtol=1e-3, atol=1e-3)


@every_interpolant
@intervals
def test_the_exact_jumps_leave_no_gap(interpolant, s):
    """Along the marginal velocity, which is that of the posterior means."""
    flow = Flow(interpolant)
    x_t = torch.randn(14, 1, 2, 2, dtype=torch.float64)
    x_hat, eps_hat = flow(x_t, T)
    gap = MeanFlow().gap(flow, x_hat, eps_hat, T, s)
    torch.testing.assert_close(gap, torch.zeros_like(gap), rtol=0, atol=1e-6)


OBJECTIVES = {
    "defaults": MeanFlow(distance=Squared()),
    "intervals": MeanFlow(UShaped(), UShaped(), matching_share=0.0, distance=Squared()),
}


@every_interpolant
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_loss_is_zero_only_at_the_truth(interpolant, objective):
    """At the cost of one evaluation for each sample."""
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    eps = torch.randn(40, 1, 2, 2, dtype=torch.float64)
    data = x.expand_as(eps)
    truth = CountingDenoiser(PointJumps(interpolant, x))
    assert objective(truth, data, eps).total < 1e-9
    assert truth.evaluated == 40
    assert objective(PointJumps(interpolant, x + 0.1), data, eps).total > 1e-4


@every_interpolant
@every_prediction
def test_the_derivative_is_the_finite_difference(interpolant, prediction):
    """Through the attention, the prediction and the mean velocity, along dx_t/dt = u."""
    torch.manual_seed(0)
    denoiser = Denoiser(AttentionNet(), interpolant, prediction)
    x, eps = torch.randn(2, 14, 2, 2, 2, dtype=torch.float64)
    x_t = interpolant.mix(x, eps, T)
    u = Velocity().target(interpolant, x, eps, T)
    h = 1e-6

    def mean_velocity_at(offset):
        x_hat, eps_hat = denoiser(x_t + offset * u, T + offset, None, S)
        return mean_velocity(interpolant, (x_hat, eps_hat), T + offset, S)

    rate = (mean_velocity_at(h) - mean_velocity_at(-h)) / (2 * h)
    expected = mean_velocity_at(0) - u + expand(T - S, u) * rate
    gap = MeanFlow().gap(denoiser, x, eps, T, S)
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(gap, expected, rtol=1e-5, atol=tolerance)

    gap.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in denoiser.parameters())


@every_interpolant
def test_the_gradient_points_to_the_truth(interpolant):
    """With the target held, the slope of the squared gap by an error in the velocity is 2 E gap.

    It has the sign of the error, and is no more than sampling noise at the truth.
    """
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 14 * 3000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = 0.5 + 0.7 * z
    t = T.repeat(3000)
    s = S.repeat(3000)

    def slope_at(error):
        number = torch.tensor(error, dtype=torch.float64, requires_grad=True)
        gap = MeanFlow().gap(ShiftedVelocity(interpolant, number), x, eps, t, s)
        scale = gap.detach().std()
        (gap.square().mean() / scale).backward()
        slope = number.grad.item()
        assert slope == pytest.approx(2 * gap.mean().item() / scale.item(), rel=1e-6)
        return slope

    noise = 2 * len(x) ** -0.5
    assert slope_at(-0.5) < -noise
    assert slope_at(0.5) > noise
    assert abs(slope_at(0.0)) < 4 * noise


@intervals
def test_the_scale_moves_the_velocity_field(s):
    """The field is u + w (c - u) with the network's u: its gap is that of w v + (1 - w) u."""
    x, eps = torch.randn(2, 14, 1, 2, 2, dtype=torch.float64)
    cond = torch.zeros(14, dtype=torch.long)
    gap = MeanFlow(guidance=3.0).gap(ConstantVelocities(), x, eps, T, s, cond)
    torch.testing.assert_close(gap, 2 - (3 * (eps - x) - 2 * 5.0))


class LabelledVelocities(ConstantVelocities):
    """The same, with the class 3 for "no class"."""

    def null_condition(self, cond):
        return torch.full_like(cond, 3)


@intervals
def test_a_dropped_condition_leaves_the_plain_velocity(s):
    """As in the paper's code: where the label is dropped, v is learnt, elsewhere the guided one."""
    x, eps = torch.randn(2, 14, 1, 2, 2, dtype=torch.float64)
    cond = torch.arange(14) % 4
    gap = MeanFlow(guidance=3.0).gap(LabelledVelocities(), x, eps, T, s, cond)
    plain = 2 - (eps - x)
    guided = 2 - (3 * (eps - x) - 2 * 5.0)
    torch.testing.assert_close(gap, plain.where(expand(cond == 3, x), guided))


def test_a_dropped_text_is_found_by_its_encoding():
    """An empty text that was encoded in another batch differs in the last bits."""
    denoiser = LabelledVelocities()
    empty = torch.randn(5, 8)
    denoiser.null_condition = lambda cond: empty.expand_as(cond)
    cond = torch.stack([torch.randn(5, 8), empty + 1e-6, empty])
    assert find_dropped(denoiser, cond, T[:3]).tolist() == [False, True, True]
    assert find_dropped(ConstantVelocities(), cond, T[:3]).tolist() == [False, False, False]


def sample_times(start, count):
    """Sample (t, s, which samples have an interval) of a rank's slice of a batch of 96."""
    x = torch.zeros(count, 1, 2, 2)
    random = StepRandom(Batch(x, True, seed=3, step=5, start=start, size=96))
    return MeanFlow().sample_times(Linear(), x, random)


def test_ranks_share_the_draws_of_the_global_batch():
    whole = sample_times(0, 96)
    first = sample_times(0, 40)
    second = sample_times(40, 56)
    for expected, *parts in zip(whole, first, second, strict=True):
        torch.testing.assert_close(expected, torch.cat(parts))


def test_samples_with_an_interval_are_evenly_spread():
    t, s, is_interval = sample_times(0, 96)
    assert (s <= t).all()
    assert is_interval.sum() == 24
    assert is_interval.nonzero().diff(dim=0).eq(4).all()


def test_an_interval_may_reach_the_data():
    x = torch.zeros(4000, 1, 1, 1)
    t, s, _ = MeanFlow(UShaped(), UShaped()).sample_times(Linear(), x, None)
    assert 0.4 < s.eq(0).float().mean() < 0.6
    assert (s <= t).all()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_adaptive_distance_only_scales_the_gradient(power):
    gap = torch.randn(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    AdaptiveDistance(power, 0.1)(gap).sum().backward()
    squares = gap.detach().square().flatten(1).sum(1).view(-1, 1, 1, 1)
    torch.testing.assert_close(gap.grad, 2 * gap.detach() / (squares + 0.1) ** power)


@pytest.mark.parametrize(("option", "value"), [("matching_share", 1.0), ("guidance", 0.0)])
def test_impossible_options_are_refused(option, value):
    with refused("MeanFlow", option, value):
        MeanFlow(**{option: value})


@pytest.mark.parametrize(("option", "value"), [("power", -1.0), ("floor", 0.0)])
def test_impossible_options_of_the_adaptive_distance_are_refused(option, value):
    with refused("AdaptiveDistance", option, value):
        AdaptiveDistance(**{option: value})


def test_a_one_time_network_is_refused():
    with refused("MeanFlow", "two_time true"):
        MeanFlow()(Point(Linear(), torch.zeros(1)), *torch.zeros(2, 3, 1, 2, 2))


def test_recomputation_in_the_backward_pass_is_refused():
    denoiser = Denoiser(DiT(two_time=True), Linear(), Velocity())
    with refused("model.recompute", "MeanFlow"):
        Generator(denoiser, MeanFlow(), recompute=True)
