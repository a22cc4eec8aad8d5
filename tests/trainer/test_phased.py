"""Phased rectification against the exact map of a Gaussian."""

import pytest
import torch

from data.batch import Batch
from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear, VariancePreserving
from models.prediction import NoisePrediction, Velocity
from models.sampler import DDIM, window_grid
from models.windows import Piecewise, WindowNoise, window
from tests.examples import INTERPOLANTS
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
from tests.helpers.teachers import SHAPE, save_teacher, small_denoiser
from tests.oracle import Flow, single
from trainer.objectives import Phased
from trainer.objectives.parts.distances import PseudoHuber
from trainer.objectives.parts.time_distributions import UShaped
from trainer.objectives.parts.weightings import MinSNR
from trainer.objectives.teachers import FrozenTeacher
from trainer.step_random import StepRandom

EDGES = [1.0, 0.6, 0.35, 0.0]
TEACHERS = [path for path in INTERPOLANTS if not isinstance(path, Piecewise)]
every_interpolant = pytest.mark.parametrize("interpolant", TEACHERS, ids=repr)
both_methods = pytest.mark.parametrize("piecewise", [False, True], ids=["first-order", "piecewise"])


def exact_teacher(interpolant):
    return FixedTeacher(Flow(interpolant))


def exact_student(interpolant, piecewise, **options):
    """Return the exact student of first-order rectification, or of PeRFlow (piecewise)."""
    path = Piecewise(interpolant, EDGES) if piecewise else interpolant
    return ChordStudent(path, Flow(interpolant), EDGES, **options)


def sample_both(steps, grid, student, interpolant):
    """Return DDIM samples of a student, and those of the exact flow from the same noise."""
    x_1 = torch.randn(9, 1, 2, 2, dtype=torch.float64)
    one = torch.ones(9, dtype=torch.float64)
    found = DDIM(steps, grid).integrate(student, x_1)[-1]
    return found, Flow(interpolant).map(x_1, one, torch.zeros_like(one))


@every_interpolant
@both_methods
def test_the_loss_is_zero_up_to_rounding_at_the_truth(interpolant, piecewise):
    objective = Phased(exact_teacher(interpolant), EDGES, steps=1, times=UShaped())
    wrong = seeded_loss(objective, exact_student(interpolant, piecewise, error=0.3))
    assert seeded_loss(objective, exact_student(interpolant, piecewise)) < 1e-6 * wrong
    assert seeded_loss(objective, exact_student(interpolant, piecewise, error=-0.3)) > 1e-3


@every_interpolant
@both_methods
def test_the_gradient_is_the_finite_difference_and_points_to_the_truth(interpolant, piecewise):
    objective = Phased(exact_teacher(interpolant), EDGES, steps=1, times=UShaped())

    def loss(error):
        return seeded_loss(objective, exact_student(interpolant, piecewise, error=error))

    slope = derivative(loss, 0.3)
    assert slope > 0
    assert slope == pytest.approx(central_difference(loss, 0.3, 1e-4), rel=1e-3)


@every_interpolant
@both_methods
@pytest.mark.parametrize("steps", [3, 4, 9])
def test_steps_on_the_edges_give_the_teachers_samples(interpolant, piecewise, steps):
    """M steps on the edges of M windows are exact, and so are more steps that include the edges."""
    student = exact_student(interpolant, piecewise, prediction=Velocity())
    found, expected = sample_both(steps, window_grid(steps, EDGES), student, interpolant)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


PERFLOW = {"velocity": Velocity(), "ddim_eps": NoisePrediction(), "diff_eps": WindowNoise(EDGES)}
perflows_predictions = pytest.mark.parametrize("prediction", PERFLOW.values(), ids=PERFLOW)


@perflows_predictions
def test_the_loss_of_each_of_perflows_predictions_is_its_squared_error(prediction):
    """The student predicts it on VP."""
    interpolant = VariancePreserving()
    objective = Phased(exact_teacher(interpolant), EDGES, steps=1)
    exact = exact_student(interpolant, True, prediction=prediction)
    assert seeded_loss(objective, exact) < 1e-9
    wrong = exact_student(interpolant, True, prediction=prediction, error=0.1)
    assert seeded_loss(objective, wrong).item() == pytest.approx(0.01, rel=1e-2)


@perflows_predictions
def test_each_of_perflows_predictions_samples_in_as_few_steps_as_windows(prediction):
    interpolant = VariancePreserving()
    student = exact_student(interpolant, True, prediction=prediction)
    found, expected = sample_both(3, EDGES, student, interpolant)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_more_solver_steps_come_nearer_to_the_exact_map():
    teacher = FixedTeacher(single(VariancePreserving()))
    student = exact_student(VariancePreserving(), False)

    def loss(steps):
        return seeded_loss(Phased(teacher, EDGES, steps), student).item()

    assert loss(1) > 4 * loss(4) > 16 * loss(16)


@pytest.mark.parametrize(
    "options",
    [{"weighting": MinSNR()}, {"distance": PseudoHuber()}, {"measure": NoisePrediction()}],
    ids=" ".join,
)
def test_times_and_errors_of_the_samples_are_recorded_as_in_matching(options):
    objective = Phased(exact_teacher(VariancePreserving()), 4, steps=1, **options)
    loss = seeded_result(objective, exact_student(VariancePreserving(), False, error=0.2), 256)
    times, errors = loss.per_sample
    assert times.shape == errors.shape == (256,)
    assert loss.total.item() == pytest.approx(errors.mean().item(), rel=1e-6)
    assert times.min() > 0
    assert times.max() < 1


@pytest.mark.parametrize("window_index", range(3))
def test_windows_are_equally_likely_and_times_in_each_follow_the_distribution(window_index):
    batch = Batch(torch.zeros(4096, 1, 1, 1), True, seed=3, step=5, size=4096)
    objective = Phased(exact_teacher(Linear()), EDGES, steps=1, times=UShaped())
    eps = torch.randn(4096, 1, 1, 1)
    loss = objective(exact_student(Linear(), False), batch.x, eps, None, StepRandom(batch))
    times = loss.per_sample.times

    s, e = EDGES[window_index : window_index + 2]
    inside = times[(times > e) & (times <= s)]
    assert len(inside) == pytest.approx(4096 / 3, abs=2)

    fraction = ((inside - e) / (s - e)).double()
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(fraction.quantile(u), UShaped()(u), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("scale", "teacher_calls"), [(1.0, 10), (3.0, 20)])
def test_a_step_costs_the_papers_evaluations(scale, teacher_calls):
    """The teacher's DDIM steps, twice with guidance, and one evaluation of the student."""
    teacher = CountingDenoiser(single(Linear()))
    student = CountingDenoiser(exact_student(Linear(), False))
    objective = Phased(FixedTeacher(Guided(teacher, scale)), EDGES, steps=10)
    seeded_loss(objective, student, 8)
    assert student.evaluated == 8
    assert teacher.evaluated == 8 * teacher_calls


def test_a_two_time_student_jumps_to_the_windows_clean_edge():
    student = CountingDenoiser(Flow(Linear()))
    loss = seeded_loss(Phased(exact_teacher(Linear()), EDGES, steps=1), student)
    (call,) = student.calls
    assert torch.equal(call.s, window(call.t, EDGES)[1])
    assert loss > 1e-4  # its jump starts on a trajectory, the target on the chord


@pytest.mark.parametrize("windows", [0, [0.9, 0.0], [1.0, 0.2]], ids=str)
def test_impossible_windows_are_refused(windows):
    with refused("Phased", "windows"):
        Phased(exact_teacher(Linear()), windows)


def test_no_solver_steps_are_refused():
    with refused("Phased", "steps", 0, 1):
        Phased(exact_teacher(Linear()), steps=0)


OTHER_WINDOWS = {
    "interpolant": ChordStudent(Piecewise(Linear(), 5), Flow(Linear()), EDGES),
    "prediction": exact_student(Linear(), False, prediction=WindowNoise(2)),
}


@pytest.mark.parametrize("student", OTHER_WINDOWS.values(), ids=OTHER_WINDOWS)
def test_a_student_with_other_windows_is_refused(student):
    with refused("Phased", "windows", EDGES):
        seeded_loss(Phased(exact_teacher(Linear()), EDGES), student)


@pytest.fixture
def run(tmp_path):
    """The run of a teacher on VP."""
    net = small_denoiser().net
    return save_teacher(tmp_path / "teacher", Denoiser(net, VariancePreserving(), Velocity()))


def test_a_teacher_on_another_interpolant_is_refused(run):
    objective = Phased(FrozenTeacher(run))
    with refused(run, "VariancePreserving", "Linear"):
        seeded_loss(objective, exact_student(Linear(), False))


def test_a_piecewise_student_may_learn_from_a_teacher_on_the_plain_interpolant(run):
    teacher = FrozenTeacher(run)
    student = Denoiser(teacher.denoiser.net, Piecewise(VariancePreserving(), 4), WindowNoise(4))
    x, eps = torch.randn(2, 4, *SHAPE)
    assert Phased(teacher, 4, steps=2)(student, x, eps).total.isfinite()
