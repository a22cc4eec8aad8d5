"""Step maps: exact on pairs and on trajectories; the collapse on independent data and noise."""

import math

import pytest
import torch

from data.batch import Batch
from models.interpolant import Linear, Trigonometric, VariancePreserving, expand
from models.prediction import Data, NoisePrediction, Velocity
from models.sampler import DDIM, window_edges
from tests.examples import every_interpolant
from tests.helpers.denoisers import (
    ChordStudent,
    CountingDenoiser,
    FixedTeacher,
    central_difference,
    derivative,
    seeded_loss,
    seeded_result,
)
from tests.helpers.refusals import refused
from tests.oracle import Flow, single
from trainer.objectives import StepMaps
from trainer.objectives.parts.distances import PseudoHuber
from trainer.step_random import StepRandom

TIMES = [1.0, 0.6, 0.35, 0.0]
COLLAPSE = {1: 0.0, 2: 0.5, 4: 0.72, 8: 0.85}  # steps -> std that is left of N(0, 1) on Linear


class AffineDenoiser:
    """x_hat = a_k + b_k x_t at the k-th of K times.

    Args:
        interpolant: the interpolant of the states.
        times: the K times of the steps, and the last one's end.
        weights: a_k and b_k, shape (K, 2).
    """

    def __init__(self, interpolant, times, weights):
        self.interpolant = interpolant
        self.times = torch.tensor(times[:-1])
        self.weights = weights

    def __call__(self, x_t, t, cond=None):
        nearest = (t.float()[:, None] - self.times).abs().argmin(1)
        a, b = self.weights[nearest].T
        x_hat = expand(a, x_t) + expand(b, x_t) * x_t
        alpha, sigma = (expand(value, x_t) for value in self.interpolant(t))
        return x_hat, (x_t - alpha * x_hat) / sigma


def train_affine(objective, interpolant, x, eps, times):
    """Return the affine denoiser with the least loss: the loss is quadratic, one Newton step."""

    def loss(weights):
        torch.manual_seed(0)
        return objective(AffineDenoiser(interpolant, times, weights), x, eps).total

    start = torch.zeros(len(times) - 1, 2, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, start).flatten()
    curvature = torch.autograd.functional.hessian(loss, start).view(start.numel(), -1)
    best = start - torch.linalg.solve(curvature, slope).view_as(start)
    assert torch.autograd.functional.jacobian(loss, best).abs().max() < 1e-8
    return AffineDenoiser(interpolant, times, best)


def sample(denoiser, times, n=20_000):
    """Return noises, and the samples of DDIM steps between the times."""
    generator = torch.Generator().manual_seed(7)
    eps = torch.randn(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    return eps, DDIM(len(times) - 1, times)(denoiser, eps)


@pytest.mark.parametrize("count", COLLAPSE)
def test_independent_draws_collapse_by_the_formula(count):
    """The best map is one Euler step.

    It scales N(0, 1) by S_s / S_t cos(theta_t - theta_s), where theta = atan2(sigma, alpha).
    """
    alpha, sigma = Linear()(torch.tensor(window_edges(count), dtype=torch.float64))
    theta = torch.atan2(sigma, alpha)
    length = torch.hypot(alpha, sigma)
    factor = (length[1:] / length[:-1] * theta.diff().cos()).prod().item()
    assert factor == pytest.approx(COLLAPSE[count], abs=5e-3)

    eps, x = sample(single(Linear(), 0.0, 1.0), window_edges(count), 100)
    torch.testing.assert_close(x, factor * eps)


@pytest.mark.parametrize("count", COLLAPSE)
def test_the_collapse_of_independent_draws_in_training(count):
    generator = torch.Generator().manual_seed(1)
    x, eps = torch.randn(2, 40_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    student = train_affine(StepMaps(count), Linear(), x, eps, window_edges(count))
    _, samples = sample(student, window_edges(count))
    assert samples.std().item() == pytest.approx(COLLAPSE[count], abs=0.02)


@pytest.mark.parametrize("count", COLLAPSE)
@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric()], ids=repr)
def test_pairs_are_learnt_exactly(count, interpolant):
    eps = torch.randn(400, 1, 1, 1, dtype=torch.float64)
    student = train_affine(StepMaps(count), interpolant, 0.5 + 0.7 * eps, eps, window_edges(count))
    eps, x = sample(student, window_edges(count))
    torch.testing.assert_close(x, 0.5 + 0.7 * eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interpolant", [Linear(), VariancePreserving()], ids=repr)
def test_trajectories_are_learnt_exactly_from_noise_alone(interpolant):
    """With a teacher the data are not read; they are nan."""
    flow = Flow(interpolant)
    eps = torch.randn(400, 1, 1, 1, dtype=torch.float64)
    data = torch.full_like(eps, math.nan)
    objective = StepMaps(TIMES, FixedTeacher(flow), steps=1)
    student = train_affine(objective, interpolant, data, eps, TIMES)

    eps, x = sample(student, TIMES)
    one = torch.ones(len(eps), dtype=torch.float64)
    start = interpolant.mix(torch.zeros_like(eps), eps, torch.ones(()))
    expected = flow.map(start, one, torch.zeros_like(one))
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def exact_student(interpolant, error=0.0, **options):
    return ChordStudent(interpolant, Flow(interpolant), TIMES, error, **options)


@every_interpolant
def test_the_loss_is_zero_up_to_rounding_at_the_truth(interpolant):
    objective = StepMaps(TIMES, FixedTeacher(Flow(interpolant)), steps=1)
    wrong = seeded_loss(objective, exact_student(interpolant, 0.3))
    assert seeded_loss(objective, exact_student(interpolant)) < 1e-6 * wrong


@every_interpolant
def test_the_gradient_is_the_finite_difference_and_points_to_the_truth(interpolant):
    objective = StepMaps(TIMES, FixedTeacher(Flow(interpolant)), steps=1)

    def loss(error):
        return seeded_loss(objective, exact_student(interpolant, error))

    slope = derivative(loss, 0.3)
    assert slope > 0
    assert slope == pytest.approx(central_difference(loss, 0.3, 1e-4), rel=1e-3)


@pytest.mark.parametrize(
    "options", [{"distance": PseudoHuber()}, {"measure": Data()}], ids=" ".join
)
def test_times_and_errors_of_the_samples_are_recorded_as_in_matching(options):
    objective = StepMaps(TIMES, FixedTeacher(Flow(Linear())), steps=1, **options)
    loss = seeded_result(objective, exact_student(Linear(), 0.2))
    times, errors = loss.per_sample
    assert set(times.tolist()) == set(torch.tensor(TIMES[:-1]).tolist())
    assert loss.total.item() == pytest.approx(errors.mean().item())


def test_two_time_students_learn_the_jump():
    """The exact jumps of the flow have no loss on its trajectories."""
    flow = Flow(Trigonometric())
    assert seeded_loss(StepMaps(TIMES, FixedTeacher(flow), steps=1), flow) < 1e-10


def test_the_teacher_carries_each_sample_only_as_far_as_needed():
    """The teacher takes steps x (k + 1) evaluations for the k-th time: (K + 1) / 2 on average.

    A sample's condition goes with it.
    """
    teacher = CountingDenoiser(single(Linear()))
    batch = Batch(torch.zeros(90, 1, 2, 2), True, size=90)
    objective = StepMaps(TIMES, FixedTeacher(teacher), steps=5)
    seeded_loss(objective, exact_student(Linear()), 90, torch.arange(90), StepRandom(batch))

    assert teacher.evaluated == 5 * 90 * 2
    conditions = [call.cond.tolist() for call in teacher.calls[::5]]
    assert conditions == [list(range(90)), list(range(30, 90)), list(range(60, 90))]


@pytest.mark.parametrize("has_teacher", [True, False])
def test_a_step_costs_one_evaluation_of_the_student(has_teacher):
    teacher = FixedTeacher(single(Linear())) if has_teacher else None
    student = CountingDenoiser(exact_student(Linear()))
    seeded_loss(StepMaps(TIMES, teacher), student, 8)
    assert student.evaluated == 8


@pytest.mark.parametrize("times", [0, [0.9, 0.0], [1.0, 0.5]], ids=str)
def test_impossible_times_are_refused(times):
    with refused("StepMaps", "maps"):
        StepMaps(times)


def test_no_solver_steps_are_refused():
    with refused("StepMaps", "steps", 0, 1):
        StepMaps(steps=0)


@pytest.mark.parametrize(
    ("measure", "prediction"), [(NoisePrediction(), Velocity()), (None, NoisePrediction())]
)
def test_a_prediction_that_is_singular_at_the_noise_is_refused(measure, prediction):
    student = exact_student(Linear(), prediction=prediction)
    with refused(NoisePrediction(), "Linear", "t = 1"):
        seeded_loss(StepMaps(measure=measure), student)
