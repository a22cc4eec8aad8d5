"""Progressive distillation at students whose one step is two of their teacher's, and elsewhere."""

import pytest
import torch

from models.interpolant import Linear, Trigonometric, VariancePreserving, expand
from models.sampler import DDIM
from tests.examples import every_interpolant
from tests.helpers.denoisers import (
    CountingDenoiser,
    FixedTeacher,
    ShiftedJumps,
    central_difference,
    derivative,
    seeded_batch,
    seeded_loss,
    seeded_result,
)
from tests.helpers.refusals import refused
from tests.oracle import Flow, single
from trainer.objectives import Progressive
from trainer.objectives.parts.weightings import EDM, TruncatedSNR


class HalvedStudent:
    """The perfect student of a round: it predicts the chord through two steps of 1 / 2N.

    Args:
        teacher: the denoiser that takes the two steps.
        steps: N, the student's steps.
    """

    def __init__(self, teacher, steps):
        self.teacher = teacher
        self.steps = steps
        self.interpolant = teacher.interpolant

    def __call__(self, x_t, t, cond=None):
        s = (t - 1 / self.steps).clamp(min=0)
        middle = (t + s) / 2
        x_middle = self.interpolant.mix(*self.teacher(x_t, t), middle)
        x_s = self.interpolant.mix(*self.teacher(x_middle, middle), s)
        return self.interpolant.solve_pair(x_t, t, x_s, s)


@every_interpolant
def test_the_loss_is_zero_only_at_the_exact_map(interpolant):
    """Two exact steps make one; a flow of another standard deviation has a loss."""
    objective = Progressive(FixedTeacher(Flow(interpolant)), 8, EDM(1.0))
    noise_variance = interpolant(torch.tensor(1.0))[1].item() ** 2
    at_truth = seeded_loss(objective, Flow(interpolant)).item()
    assert at_truth < 1e-8 * (1 + noise_variance)  # t is float32
    assert seeded_loss(objective, Flow(interpolant, std=0.9)).item() > 1e-4


@every_interpolant
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_the_loss_is_zero_if_one_step_is_two_of_the_teachers(interpolant, steps):
    """The teacher's DDIM steps are not exact: the student learns the steps that it takes."""
    teacher = single(interpolant)
    found = seeded_loss(Progressive(FixedTeacher(teacher), steps), HalvedStudent(teacher, steps))
    weight = TruncatedSNR().of_data(interpolant, torch.tensor(1 / steps)).item()
    assert found.item() < 1e-8 * (1 + weight)


def test_the_target_is_the_papers():
    """x~ = (z_s - sigma_s / sigma_t z_t) / (alpha_s - sigma_s / sigma_t alpha_t).

    Salimans and Ho 2022 (arXiv 2202.00512), appendix G.
    """
    interpolant = VariancePreserving()
    teacher = single(interpolant)
    x_t, _ = seeded_batch()
    t = torch.linspace(0.3, 0.9, 64, dtype=torch.float64)
    middle = t - 0.125
    s = t - 0.25

    # two DDIM steps of the teacher
    x_middle = interpolant.mix(*teacher(x_t, t), middle)
    x_s = interpolant.mix(*teacher(x_middle, middle), s)

    # the paper's formula
    alpha_t, sigma_t = (expand(value, x_t) for value in interpolant(t))
    alpha_s, sigma_s = (expand(value, x_t) for value in interpolant(s))
    ratio = sigma_s / sigma_t
    target = (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)

    x_hat, _ = HalvedStudent(teacher, 4)(x_t, t)
    torch.testing.assert_close(x_hat, target)


@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric(), VariancePreserving()], ids=repr)
def test_rounds_lead_from_many_steps_to_one(interpolant):
    """After k rounds one step of the last student is 2^k steps of the first teacher."""
    _, eps = seeded_batch()
    teacher = single(interpolant)
    student = teacher
    for steps in (4, 2, 1):
        student = HalvedStudent(student, steps)
    torch.testing.assert_close(DDIM(1)(student, eps), DDIM(8)(teacher, eps))


@every_interpolant
@pytest.mark.parametrize("error", [0.2, -0.2])
def test_the_gradient_is_the_finite_difference_and_points_to_the_truth(interpolant, error):
    objective = Progressive(FixedTeacher(Flow(interpolant)), 8)

    def loss(value):
        return seeded_loss(objective, ShiftedJumps(interpolant, value, 0))

    slope = derivative(loss, error)
    assert slope == pytest.approx(central_difference(loss, error, 1e-3), rel=1e-4)
    assert slope * error > 0


def test_a_step_costs_the_papers_evaluations():
    """One evaluation of the student at i / N, and two of the teacher, half a step apart.

    Salimans and Ho 2022 (arXiv 2202.00512), algorithm 2.
    """
    student = CountingDenoiser(Flow(Linear()))
    teacher = CountingDenoiser(Flow(Linear()))
    objective = Progressive(FixedTeacher(teacher), 4)
    loss = seeded_result(objective, student, 256)

    (call,) = student.calls
    assert call.with_gradient
    assert sorted(set(call.t.tolist())) == [0.25, 0.5, 0.75, 1]

    first, second = teacher.calls
    assert not first.with_gradient
    assert not second.with_gradient
    assert torch.equal(first.t, call.t)
    torch.testing.assert_close(second.t, call.t - 1 / 8)

    times, errors = loss.per_sample
    assert torch.equal(times, call.t)
    assert errors.shape == (256,)


def test_no_steps_are_refused():
    with refused("Progressive", "steps", 0, 1):
        Progressive(FixedTeacher(Flow(Linear())), 0)
