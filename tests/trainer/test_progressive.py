"""Progressive distillation at students whose one step is two of their teacher's, and beside them."""

import pytest
import torch

from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.sampler import DDIM
from tests.forms import every_interpolant
from tests.oracle import Flow, single
from tests.students import Asked, Bent, Told, coupled, loss
from trainer.objectives import Progressive
from trainer.weights import EDM, TruncatedSNR


class Halved:
    """The student of a round at its end: it says the data and the noise of the chord through two steps of 1 / 2N."""

    def __init__(self, teacher, steps):
        self.teacher, self.steps, self.interpolant = teacher, steps, teacher.interpolant

    def __call__(self, x_t, t, cond=None):
        s = (t - 1 / self.steps).clamp(min=0)
        x_s = self.interpolant.mix(*self.teacher(x_t, t), (t + s) / 2)
        x_s = self.interpolant.mix(*self.teacher(x_s, (t + s) / 2), s)
        return self.interpolant.unmix(x_t, t, x_s, s)


@every_interpolant
def test_it_is_at_rest_at_the_exact_map(interpolant):
    """Two exact steps make one; a flow of another deviation is not at rest."""
    objective = Progressive(Told(Flow(interpolant)), 8, EDM(1.0))
    scale = 1 + interpolant(torch.tensor(1.0))[1].item() ** 2
    assert loss(objective, Flow(interpolant)).item() < 1e-8 * scale  # t is float32
    assert loss(objective, Flow(interpolant, std=0.9)).item() > 1e-4


@every_interpolant
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_it_is_at_rest_where_one_step_is_two(interpolant, steps):
    """With a teacher whose DDIM steps are not exact: its own steps are what is learnt."""
    found = loss(Progressive(Told(single(interpolant)), steps), Halved(single(interpolant), steps)).item()
    assert found < 1e-8 * (1 + TruncatedSNR().of_data(interpolant, torch.tensor(1 / steps)).item())


def test_the_target_is_the_papers():
    """x~ = (z_s - sigma_s / sigma_t z_t) / (alpha_s - sigma_s / sigma_t alpha_t) (2202.00512, appendix G)."""
    interpolant, x_t, t = VariancePreserving(), coupled()[0], torch.linspace(0.3, 0.9, 64, dtype=torch.float64)
    (a, b), (c, d) = ([v.view(-1, 1, 1, 1) for v in interpolant(time)] for time in (t, t - 0.25))
    middle = interpolant.mix(*single(interpolant)(x_t, t), t - 0.125)
    x_s = interpolant.mix(*single(interpolant)(middle, t - 0.125), t - 0.25)
    torch.testing.assert_close(Halved(single(interpolant), 4)(x_t, t)[0], (x_s - d / b * x_t) / (c - d / b * a))


@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric(), VariancePreserving()], ids=repr)
def test_rounds_lead_from_many_steps_to_one(interpolant):
    """After k rounds one step of the last student draws what 2^k steps of the first teacher drew."""
    eps, teacher = coupled()[1], single(interpolant)
    student = teacher
    for steps in (4, 2, 1):
        student = Halved(student, steps)
    torch.testing.assert_close(DDIM(1)(student, eps), DDIM(8)(teacher, eps))


@every_interpolant
def test_the_gradient_leads_back_and_is_that_of_differences(interpolant):
    objective = Progressive(Told(Flow(interpolant)), 8)
    for by in (0.2, -0.2):
        number = torch.tensor(by, dtype=torch.float64, requires_grad=True)
        found = torch.autograd.grad(loss(objective, Bent(interpolant, number, 0)), number)[0].item()
        above, below = (loss(objective, Bent(interpolant, by + h, 0)).item() for h in (1e-3, -1e-3))
        assert found == pytest.approx((above - below) / 2e-3, rel=1e-4) and found * by > 0


def test_the_cost_and_the_times_are_the_papers():
    """One evaluation of the student at i / N, two of the teacher there and half a step on (2202.00512, algorithm 2)."""
    student, told = Asked(Flow(Linear())), Asked(Flow(Linear()))
    objective = Progressive(Told(told), 4)
    loss(objective, student, 256)
    ((t, _, graded),) = student.calls
    assert graded and sorted(set(t.tolist())) == [0.25, 0.5, 0.75, 1]
    assert [held for *_, held in told.calls] == [False, False] and torch.equal(told.calls[0][0], t)
    torch.testing.assert_close(told.calls[1][0], t - 1 / 8)
    times, errors = objective.seen
    assert torch.equal(times, t) and errors.shape == (256,)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps is 0, it must be at least 1"):
        Progressive(Told(Flow(Linear())), 0)
