"""Phased rectification against the exact map of a Gaussian."""

import pytest
import torch

from data.batch import Batch
from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear, VariancePreserving
from models.nets.dit import DiT
from models.prediction import Noise, Velocity
from models.sampler import DDIM, through
from models.windows import Piecewise, WindowNoise, window
from tests.forms import INTERPOLANTS
from tests.oracle import Flow, single
from tests.taught import Asked, Taught
from trainer.draws import Draws
from trainer.errors import PseudoHuber
from trainer.objectives import Phased
from trainer.objectives.frozen import Frozen
from trainer.times import UShaped
from trainer.weights import MinSNR

EDGES = [1.0, 0.6, 0.35, 0.0]
TEACHERS = [form for form in INTERPOLANTS if not isinstance(form, Piecewise)]
every_interpolant = pytest.mark.parametrize("interpolant", TEACHERS, ids=repr)
both = pytest.mark.parametrize("straight", [False, True], ids=["first-order", "piecewise"])


def student(interpolant, straight, **more):
    return Taught(Piecewise(interpolant, EDGES) if straight else interpolant, Flow(interpolant), EDGES, **more)


def loss(objective, denoiser, n=64, seed=0):
    torch.manual_seed(seed)
    x, eps = torch.randn(2, n, 1, 2, 2, dtype=torch.float64)
    return objective(denoiser, x, eps)


@every_interpolant
@both
def test_the_loss_is_zero_at_the_truth_and_leads_to_it(interpolant, straight):
    """Zero but for rounding; beside it the gradient points back, and is the finite difference."""
    objective = Phased(Asked(Flow(interpolant)), EDGES, steps=1, times=UShaped())
    by = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    beside = loss(objective, student(interpolant, straight, by=by))
    assert loss(objective, student(interpolant, straight)) < 1e-6 * beside
    (slope,) = torch.autograd.grad(beside, by)
    h = 1e-4
    ahead, behind = (loss(objective, student(interpolant, straight, by=0.3 + sign * h)) for sign in (1, -1))
    assert slope > 0 and slope.item() == pytest.approx((ahead - behind).item() / (2 * h), rel=1e-3)
    assert loss(objective, student(interpolant, straight, by=-0.3)) > 1e-3


@every_interpolant
@both
def test_steps_on_the_edges_draw_what_the_teacher_draws(interpolant, straight):
    """M steps on the edges of M windows are exact, from t = 1 to 0; and so, for either form, are more that step on them."""
    x_1, flow = torch.randn(9, 1, 2, 2, dtype=torch.float64), Flow(interpolant)
    one, zero = torch.ones(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    for steps in (3, 4, 9):
        found = DDIM(steps, through(steps, EDGES)).walk(student(interpolant, straight, prediction=Velocity()), x_1)[-1]
        torch.testing.assert_close(found, flow.map(x_1, one, zero), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("row", [Velocity(), Noise(), WindowNoise(EDGES)], ids=["velocity", "ddim_eps", "diff_eps"])
def test_perflows_three_forms(row):
    """Its student's error is that of its own row, on VP; each is zero at its truth, and its truth draws in M steps."""
    taught = student(VariancePreserving(), True, prediction=row)
    objective = Phased(Asked(Flow(VariancePreserving())), EDGES, steps=1)
    assert loss(objective, taught) < 1e-9
    moved = student(VariancePreserving(), True, prediction=row, by=0.1)
    assert loss(objective, moved).item() == pytest.approx(0.01, rel=1e-2)
    x_1 = torch.randn(9, 1, 2, 2, dtype=torch.float64)
    one, zero = torch.ones(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)
    found = DDIM(3, EDGES).walk(taught, x_1)[-1]
    torch.testing.assert_close(found, Flow(VariancePreserving()).map(x_1, one, zero), rtol=1e-6, atol=1e-6)


def test_more_solver_steps_come_nearer_to_the_exact_map():
    taught = student(VariancePreserving(), False)
    losses = [loss(Phased(Asked(single(VariancePreserving())), EDGES, steps), taught).item() for steps in (1, 4, 16)]
    assert losses[0] > 4 * losses[1] > 16 * losses[2]


@pytest.mark.parametrize("more", [{"weight": MinSNR()}, {"error": PseudoHuber()}, {"measure": Noise()}], ids=" ".join)
def test_times_weights_and_errors_are_those_of_matching(more):
    objective = Phased(Asked(Flow(VariancePreserving())), 4, steps=1, **more)
    found = loss(objective, student(VariancePreserving(), False, by=0.2), 256)
    times, errors = objective.seen
    assert times.shape == errors.shape == (256,) and found.item() == pytest.approx(errors.mean().item(), rel=1e-6)
    assert 0 < times.min() and times.max() < 1


def test_windows_are_drawn_evenly_and_the_law_holds_inside_each():
    batch = Batch(torch.zeros(4096, 1, 1, 1), True, seed=3, step=5, size=4096)
    objective = Phased(Asked(Flow(Linear())), EDGES, steps=1, times=UShaped())
    objective(student(Linear(), False), batch.x, torch.randn(4096, 1, 1, 1), None, Draws(batch))
    times = objective.seen[0]
    for s, e in zip(EDGES[:-1], EDGES[1:]):
        inside = times[(times > e) & (times <= s)]
        assert len(inside) == pytest.approx(4096 / 3, abs=2)
        place = ((inside - e) / (s - e)).double()
        u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        torch.testing.assert_close(place.quantile(u), UShaped()(u), atol=2e-3, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_step_costs_what_the_papers_need(scale):
    """The teacher's DDIM steps, twice with guidance, and one evaluation of the student."""
    teacher = Asked(single(Linear()))
    teacher.on = lambda student, like, interpolant=None: Guided(teacher, scale)
    learner = Asked(Taught(Linear(), Flow(Linear()), EDGES))
    loss(Phased(teacher, EDGES, steps=10), learner, 8)
    assert learner.asked == 8 and teacher.asked == 8 * 10 * (1 + (scale != 1))


def test_students_that_jump_are_asked_for_the_windows_clean_end():
    asked = []

    class Jumping(Flow):
        def __call__(self, x_t, t, cond=None, s=None):
            asked.append((t, s))
            return super().__call__(x_t, t, cond, s)

    found = loss(Phased(Asked(Flow(Linear())), EDGES, steps=1), Jumping(Linear()))
    ((t, s),) = asked
    assert torch.equal(s, window(t, EDGES)[1]) and found > 1e-4  # of the trajectory's own state, not of the chord's


def test_bad_input_is_named(tmp_path):
    teacher = Asked(Flow(Linear()))
    for windows in (0, [0.9, 0.0], [1.0, 0.2]):
        with pytest.raises(ValueError, match="windows"):
            Phased(teacher, windows)
    with pytest.raises(ValueError, match="steps is 0"):
        Phased(teacher, steps=0)
    for other in (Taught(Piecewise(Linear(), 5), Flow(Linear()), EDGES), student(Linear(), False, prediction=WindowNoise(2))):
        with pytest.raises(ValueError, match=r"Phased: windows are \[1.0, .*make them equal"):
            loss(Phased(teacher, EDGES), other)


def test_a_teacher_on_another_interpolant_is_refused(monkeypatch):
    own = Denoiser(DiT(size=4, channels=1, patch=2, width=16, depth=1, heads=2), VariancePreserving(), Velocity())
    monkeypatch.setattr("models.teacher.load", lambda run: (own, None, None))
    frozen = Frozen("somewhere")
    with pytest.raises(ValueError, match="somewhere: the teacher is on VariancePreserving.*the student on Linear"):
        loss(Phased(frozen), student(Linear(), False))
    x, eps = torch.randn(2, 4, 1, 4, 4)
    learner = Denoiser(own.net, Piecewise(VariancePreserving(), 4), WindowNoise(4))
    assert Phased(frozen, 4, steps=2)(learner, x, eps).isfinite()
