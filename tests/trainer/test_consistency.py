"""The consistency objective at the exact flow map of a Gaussian, and away from it."""

import math

import pytest
import torch

from data.batch import Batch
from models.denoiser import Denoiser
from models.guidance import GuidanceConditioned
from models.interpolant import (
    EDMPath,
    Linear,
    SubVariancePreserving,
    Trigonometric,
    VariancePreserving,
)
from models.prediction import EDMPreconditioned, NoisePrediction, Velocity
from models.sampler import Trajectory
from tests.examples import every_interpolant, every_prediction
from tests.helpers.denoisers import (
    CountingDenoiser,
    FixedTeacher,
    PointJumps,
    ShiftedJumps,
    central_difference,
    derivative,
    randomize,
    seeded_batch,
    seeded_loss,
    tiny_dit,
)
from tests.helpers.refusals import refused
from tests.oracle import Flow, single
from trainer.objectives import Consistency
from trainer.objectives.parts.distances import Squared
from trainer.objectives.parts.time_distributions import LogNormalSigma
from trainer.objectives.parts.weightings import EDM
from trainer.objectives.teachers import EMATeacher
from trainer.step_random import StepRandom

OPTIONS = [{}, {"windows": 4}, {"random_end": True}, {"windows": 2, "random_end": True}]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
with_and_without_teacher = pytest.mark.parametrize(
    "has_teacher", [True, False], ids=["distillation", "training"]
)


def random_denoiser(**options):
    """Return a float64 denoiser of 2 x 2 pixels with random weights."""
    denoiser = Denoiser(tiny_dit(2, patch=1, **options), Linear(), Velocity()).double()
    randomize(denoiser, 0.1)
    return denoiser


def copied_weights(denoiser):
    return {key: value.clone() for key, value in denoiser.state_dict().items()}


def make_random(step, count):
    return StepRandom(Batch(torch.zeros(count, 1, 1, 1), True, seed=1, step=step, size=count))


@every_interpolant
@every_option
def test_distillation_has_no_loss_only_at_the_exact_map(interpolant, options):
    """The loss is zero if the teacher's exact steps and the student's exact jumps share a flow."""
    teacher = FixedTeacher(Flow(interpolant))
    objective = Consistency(teacher, 16, distance=Squared(), **options)
    noise_variance = interpolant(torch.tensor(1.0))[1].item() ** 2
    at_truth = seeded_loss(objective, Flow(interpolant)).item()
    assert at_truth < 1e-10 * (1 + noise_variance)  # t is float32
    assert seeded_loss(objective, Flow(interpolant, std=0.9)).item() > 1e-5


@every_interpolant
@every_option
def test_training_has_no_loss_only_at_a_single_point(interpolant, options):
    """All trajectories of one point are straight chords, so training needs no teacher."""
    objective = Consistency(steps=16, distance=Squared(), **options)
    x, eps = seeded_batch()
    point = x[:1]
    data = point.expand_as(eps)
    assert 0 <= objective(PointJumps(interpolant, point), data, eps).total.item() < 1e-8
    assert objective(PointJumps(interpolant, point + 0.3), data, eps).total.item() >= 1e-4


@pytest.mark.parametrize(
    "interpolant", [Linear(), Trigonometric(), SubVariancePreserving()], ids=repr
)
def test_the_loss_of_an_exact_student_falls_with_the_teachers_order(interpolant):
    """A DDIM step of length h has an error of order h^2.

    The deviation of an exact student is of order 2 in 1 / N, and of order 1 in 1 / k for k
    teacher steps between neighbours.
    """
    teacher = FixedTeacher(single(interpolant))

    def deviation(steps, teacher_steps):
        objective = Consistency(teacher, steps, distance=Squared(), teacher_steps=teacher_steps)
        return seeded_loss(objective, Flow(interpolant), 512).sqrt().item()

    coarse = deviation(32, 1)
    assert math.log2(coarse / deviation(64, 1)) == pytest.approx(2, abs=0.2)
    assert math.log2(coarse / deviation(32, 2)) == pytest.approx(1, abs=0.1)


@every_interpolant
@with_and_without_teacher
@every_option
@pytest.mark.parametrize("error", [0.2, -0.2])
def test_the_gradient_is_the_finite_difference_and_points_to_the_truth(
    interpolant, has_teacher, options, error
):
    """The target is held: it is the student itself without a gradient.

    The error shows in the jumps that end at their neighbour.
    """
    teacher = FixedTeacher(Flow(interpolant)) if has_teacher else None
    objective = Consistency(teacher, 8, distance=Squared(), **options)

    def loss(value):
        return seeded_loss(objective, ShiftedJumps(interpolant, value, error))

    slope = derivative(loss, error)
    assert slope == pytest.approx(central_difference(loss, error, 1e-3), rel=1e-4, abs=1e-6)
    if has_teacher:  # without one, the deviation of a sample's chord adds to the error
        assert slope * error > 0


@every_interpolant
@every_prediction
@pytest.mark.parametrize("two_time", [True, False])
def test_a_jump_of_no_length_returns_the_state(interpolant, prediction, two_time):
    """f(x_e, e) = x_e for any network output (Song et al. 2023, arXiv 2303.01469, section 3).

    So no c_skip and c_out are needed.
    """

    class ArbitraryNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.two_time = two_time

        def forward(self, x_t, time_input, cond=None, t_end=None):
            return torch.sin(7 * x_t) + 3

    x_t = torch.randn(9, 1, 2, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    denoiser = Denoiser(ArbitraryNet(), interpolant, prediction)
    torch.testing.assert_close(Trajectory(denoiser).ddim(x_t, t, t), x_t, rtol=1e-6, atol=1e-6)


def test_jumps_of_the_edm_preconditioned_prediction_have_the_papers_scalings():
    """f = c_skip x_t + c_out F (Song et al. 2023, arXiv 2303.01469, appendix C).

    c_out is exact; c_skip differs by terms of sigma_min, which is .002.
    """
    interpolant = EDMPath()
    data_std = 0.5
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    end = torch.zeros(50, dtype=torch.float64)
    sigma = interpolant(t)[1]
    sigma_min = interpolant(end)[1]

    def jump(state, output):
        x_t = torch.full((50, 1), state, dtype=torch.float64)
        y = torch.full((50, 1), output, dtype=torch.float64)
        x_hat, eps_hat = EDMPreconditioned(data_std).solve(interpolant, y, x_t, t)
        return interpolant.mix(x_hat, eps_hat, end).flatten()

    c_out = data_std * (sigma - sigma_min) / torch.hypot(sigma, torch.full_like(sigma, data_std))
    torch.testing.assert_close(jump(0.0, -1.0).abs(), c_out)
    c_skip = data_std**2 / ((sigma - sigma_min) ** 2 + data_std**2)
    torch.testing.assert_close(jump(1.0, 0.0), c_skip, rtol=0, atol=0.005)


@every_option
def test_times_are_neighbours_on_the_grid_and_jumps_end_inside_the_window(options):
    n = 12
    width = n // options.get("windows", 1)
    student = CountingDenoiser(Flow(Linear()))
    seeded_loss(Consistency(FixedTeacher(Flow(Linear())), n, **options), student, 512)

    # the student's call at t has a gradient, the target's at s has none, and both jump to e
    jump, target = student.calls
    assert jump.with_gradient
    assert not target.with_gradient
    assert torch.equal(jump.s, target.s)

    # t, s and e are multiples of 1 / N; every t occurs
    times = torch.stack([jump.t, target.t, jump.s])
    i, j, k = indices = (times * n).round()
    torch.testing.assert_close(indices / n, times)
    assert set(i.tolist()) == set(range(1, n + 1))
    assert (jump.s < jump.t).all()

    # t and s are neighbours; where s = e, the target is the state and t stands in for s
    neighbours = (i - j) == 1
    arrived = (i == j) & (i - k == 1)
    assert (neighbours | arrived).all()

    # e is the clean edge of the window of t, or any grid time from it on
    edge = (i - 1) // width * width
    if options.get("random_end"):
        assert (k >= edge).all()
        assert set((k - edge).tolist()) == set(range(width))
    else:
        assert torch.equal(k, edge)


def test_random_ends_are_independent_of_the_time():
    """If both were stratified by the position in the batch, e would be a function of t."""
    random = make_random(step=2, count=256)
    t, _, e = Consistency(steps=8, random_end=True).sample_times(Linear(), random.batch.x, random)
    assert t.mul(8).long().bincount().tolist() == [0] + [32] * 8
    assert set((8 * e[t == 1]).tolist()) == set(range(8))


def test_the_grid_doubles_with_the_steps_of_training():
    objective = Consistency(steps=4, windows=2, doublings=3, double_every=10)

    def grid_size(step):
        random = make_random(step, count=64)
        t, s, _ = objective.sample_times(Linear(), random.batch.x, random)
        return round(1 / (t - s).mean().item())

    assert [grid_size(step) for step in (0, 9, 10, 25, 30, 1000)] == [4, 4, 8, 16, 32, 32]


def test_errors_count_more_as_neighbours_come_closer():
    """Errors count as 1 / (t - s), relative to the first grid: twice after one doubling."""
    teacher = FixedTeacher(single(Linear()))
    doubled = Consistency(teacher, 4, doublings=1, double_every=10)
    constant = Consistency(teacher, 8, doublings=0, double_every=10)
    random = make_random(step=10, count=64)
    found = seeded_loss(doubled, Flow(Linear()), random=random).item()
    expected = 2 * seeded_loss(constant, Flow(Linear()), random=random).item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_weights_learn_under_autocast():
    """The student must not reuse autocast's weights, cast without a gradient for the target."""
    net = tiny_dit()
    x, eps = torch.randn(2, 8, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        Consistency(steps=8)(Denoiser(net, Linear(), Velocity()), x, eps).total.backward()
    assert net.out.weight.grad.abs().sum() > 0


@with_and_without_teacher
def test_a_step_costs_the_papers_evaluations(has_teacher):
    """One evaluation of the student with a gradient, one without, and one of the teacher.

    Song et al. 2023 (arXiv 2303.01469), algorithms 2 and 3.
    """
    student = CountingDenoiser(Flow(Linear()))
    teacher = CountingDenoiser(Flow(Linear()))
    seeded_loss(Consistency(FixedTeacher(teacher) if has_teacher else None), student)
    assert [call.with_gradient for call in student.calls] == [True, False]
    assert [call.with_gradient for call in teacher.calls] == ([False] if has_teacher else [])


def test_a_one_time_network_jumps_by_ddim():
    """Gradients reach the network, the weight counts, and times follow their distribution."""
    net = tiny_dit()
    randomize(net, 0.1)
    objective = Consistency(steps=64, times=LogNormalSigma(), weighting=EDM())
    x, eps = torch.randn(2, 64, 1, 4, 4)
    loss = objective(Denoiser(net, VariancePreserving(), Velocity()), x, eps)
    loss.total.backward()

    assert all(parameter.grad is not None for parameter in net.blocks.parameters())
    assert net.embed.weight.grad.abs().sum() > 0

    times, errors = loss.per_sample
    assert times.shape == errors.shape == (64,)
    assert errors.mean().item() == pytest.approx(loss.total.item(), rel=1e-5)
    assert times.mean() < 0.4
    assert times.unique().numel() < 64


@pytest.mark.parametrize("option", ["steps", "windows", "teacher_steps", "double_every"])
def test_counts_must_be_at_least_one(option):
    with refused("Consistency", option, 0, 1):
        Consistency(**{option: 0})


def test_negative_doublings_are_refused():
    with refused("Consistency", "doublings", -1, 0):
        Consistency(doublings=-1)


def test_windows_must_divide_the_steps():
    with refused("Consistency", "steps", 10, "windows", 4):
        Consistency(steps=10, windows=4)


def test_random_ends_need_a_two_time_network():
    with refused("Consistency", "random_end", "two_time true"):
        seeded_loss(Consistency(random_end=True), single(Linear()))


def test_a_prediction_that_is_singular_at_the_noise_is_refused():
    denoiser = Denoiser(tiny_dit(2), Linear(), NoisePrediction())
    with refused("Noise", "Linear", "t = 1"):
        seeded_loss(Consistency(), denoiser)


def test_an_average_as_the_target_needs_a_run_that_keeps_one():
    objective = Consistency(steps=8, target=EMATeacher())
    with refused("EMA", "trainer.num_sanity_val_steps", 0):
        seeded_loss(objective, random_denoiser())


def test_an_average_that_equals_the_student_gives_the_students_target():
    torch.manual_seed(0)
    student = random_denoiser()
    student.averages = copied_weights(student)
    plain = Consistency(steps=8, distance=Squared())
    averaged = Consistency(steps=8, distance=Squared(), target=EMATeacher())
    assert torch.equal(seeded_loss(averaged, student), seeded_loss(plain, student))


def test_the_average_of_a_student_that_reads_a_scale_gets_it_too():
    torch.manual_seed(0)
    denoiser = random_denoiser(guidance_embedded=True)
    denoiser.averages = copied_weights(denoiser)
    plain = Consistency(steps=8, distance=Squared())
    averaged = Consistency(steps=8, distance=Squared(), target=EMATeacher())
    student = GuidanceConditioned(denoiser, 5.0)
    assert torch.equal(seeded_loss(averaged, student), seeded_loss(plain, student))


def test_an_average_of_other_weights_gives_their_target_without_a_gradient():
    torch.manual_seed(0)
    student = random_denoiser()
    other = random_denoiser()
    student.averages = dict(other.state_dict(keep_vars=True))
    averaged = Consistency(steps=8, distance=Squared(), target=EMATeacher())
    found = seeded_loss(averaged, student)

    # the same loss, written out
    interpolant = student.interpolant
    x, eps = seeded_batch()
    t, s, e = Consistency(steps=8, distance=Squared()).sample_times(interpolant, x, None)
    jump = Trajectory(student).ddim(interpolant.mix(x, eps, t), t, e)
    target = Trajectory(other).ddim(interpolant.mix(x, eps, s), s, e)
    target = target.where((s > e).view(-1, 1, 1, 1), x)
    errors = (jump - target).square() / (8 * (t - s)).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, errors.mean(), rtol=1e-6, atol=0)

    found.backward()
    assert all(parameter.grad is None for parameter in other.parameters())
