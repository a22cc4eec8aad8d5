"""Shortcut models against the exact jumps of a Gaussian and of a point."""

import pytest
import torch

from data.batch import Batch
from models.denoiser import Denoiser
from models.interpolant import Linear, expand
from models.prediction import Velocity
from tests.examples import every_interpolant
from tests.helpers.denoisers import (
    CountingDenoiser,
    PointJumps,
    ShiftedVelocity,
    central_difference,
    derivative,
    randomize,
    tiny_dit,
)
from tests.helpers.refusals import refused
from tests.oracle import Flow, Point
from trainer.objectives import Shortcut
from trainer.step_random import StepRandom


def grid_of_steps(objective, halvings):
    """Return the times of twelve steps of length 2^-halvings."""
    position = torch.arange(12).double() / 12
    size = torch.full_like(position, (halvings + 0.5) / objective.halvings)
    return objective.step_times(size, position)


def test_step_lengths_are_powers_of_two_and_equally_likely():
    t, _, end = Shortcut(halvings=3).step_times(torch.rand(6000), torch.rand(6000))
    lengths, counts = (t - end).mul(8).round().unique(return_counts=True)
    assert lengths.tolist() == [2, 4, 8]
    assert counts.min() > 1800


def test_steps_start_on_the_multiples_of_their_length():
    t, middle, end = Shortcut(halvings=3).step_times(torch.rand(6000), torch.rand(6000))
    torch.testing.assert_close((t + end) / 2, middle, rtol=0, atol=1e-5)
    multiple = end / (t - end)
    torch.testing.assert_close(multiple, multiple.round(), rtol=0, atol=1e-3)
    assert end.min() == 0
    assert t.max() < 1


@every_interpolant
@pytest.mark.parametrize("halvings", [0, 2, 5])
def test_two_exact_jumps_are_one(interpolant, halvings):
    objective = Shortcut()
    flow = Flow(interpolant)
    step = grid_of_steps(objective, halvings)
    t, _, end = step
    x_t = torch.randn(12, 1, 2, 2, dtype=torch.float64)
    x, eps = objective.chord(flow, x_t, step, None)
    torch.testing.assert_close(interpolant.mix(x, eps, end), flow.map(x_t, t, end))
    torch.testing.assert_close(interpolant.mix(x, eps, t), x_t)


@pytest.mark.parametrize("halvings", [0, 3, 6])
def test_on_linear_the_target_is_the_mean_of_two_velocities(halvings):
    """s(x, t, 2d) = (s(x, t, d) + s(x', t - d, d)) / 2, where the smallest d is replaced by 0.

    Frans et al. 2024 (arXiv 2410.12557), eq. 4.
    """
    net = tiny_dit(channels=2, two_time=True)
    randomize(net, 0.2)
    denoiser = Denoiser(net, Linear(), Velocity())
    objective = Shortcut()
    step = grid_of_steps(objective, halvings)
    t, middle, end = step
    smallest = halvings == 6
    x_t = torch.randn(12, 2, 4, 4, dtype=torch.float64)

    def velocity(x, start, stop):
        x_hat, eps_hat = denoiser(x, start, None, start if smallest else stop)
        return Velocity().target(Linear(), x_hat, eps_hat, start)

    first = velocity(x_t, t, middle)
    x_middle = x_t - expand(t - middle, x_t) * first
    second = velocity(x_middle, middle, end)
    x, eps = objective.chord(denoiser, x_t, step, None)
    mean = (first + second) / 2
    torch.testing.assert_close(eps - x, mean, rtol=1e-3, atol=1e-3)  # t ends 1e-5 before 1


@every_interpolant
def test_the_loss_is_zero_only_at_the_truth(interpolant):
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    eps = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    data = x.expand_as(eps)
    objective = Shortcut(measure=Velocity())
    assert objective(PointJumps(interpolant, x), data, eps).total < 1e-9
    assert objective(PointJumps(interpolant, x + 0.1), data, eps).total > 1e-4


@every_interpolant
def test_a_step_costs_the_papers_evaluations(interpolant):
    """One for each sample, and two more for one sample in four.

    Frans et al. 2024 (arXiv 2410.12557), section 3.2.
    """
    student = CountingDenoiser(PointJumps(interpolant, torch.zeros(1, 1, 2, 2).double()))
    x, eps = torch.randn(2, 64, 1, 2, 2, dtype=torch.float64)
    Shortcut(measure=Velocity())(student, x, eps)
    assert student.evaluated == 64 + 2 * 16


@every_interpolant
@pytest.mark.parametrize("error", [-1.0, 1.0])
def test_the_gradient_points_to_the_truth_and_does_not_reach_the_half_jumps(interpolant, error):
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 20_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    held_error = torch.tensor(error, dtype=torch.float64)

    def loss(value):
        value = torch.as_tensor(value, dtype=torch.float64)
        student = ShiftedVelocity(interpolant, value, held_error)
        torch.manual_seed(1)
        return Shortcut()(student, 0.5 + 0.7 * z, eps).total

    slope = derivative(loss, error)
    assert slope == pytest.approx(central_difference(loss, error, 1e-3), rel=1e-5)
    assert slope * error > 0


def test_ranks_share_the_work_of_the_global_batch():
    """In any slices, the same samples learn from jumps, at the same times."""
    x = torch.randn(96, 1, 2, 2)
    eps = torch.randn(96, 1, 2, 2)

    def times_and_errors(first, last):
        objective = Shortcut()
        random = StepRandom(Batch(x[first:last], True, seed=3, step=5, start=first, size=96))
        return objective(Flow(Linear()), x[first:last], eps[first:last], None, random).per_sample

    whole = times_and_errors(0, 96)
    slices = zip(times_and_errors(0, 30), times_and_errors(30, 96), strict=True)
    for expected, parts in zip(whole, slices, strict=True):
        torch.testing.assert_close(torch.cat(parts), expected)


@pytest.mark.parametrize(
    ("option", "value", "limit"), [("bootstrap_every", 1, 2), ("halvings", 0, 1)]
)
def test_impossible_options_are_refused(option, value, limit):
    with refused("Shortcut", option, value, limit):
        Shortcut(**{option: value})


def test_a_one_time_network_is_refused():
    with refused("Shortcut", "two_time true"):
        Shortcut()(Point(Linear(), torch.zeros(1)), *torch.zeros(2, 3, 1, 2, 2))
