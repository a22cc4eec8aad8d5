"""The consistency objective at the exact flow map of a Gaussian, and beside it."""

import math

import pytest
import torch

from data.batch import Batch
from models.denoiser import Denoiser
from models.guidance import Told as Scaled
from models.interpolant import Karras, Linear, SubVariancePreserving, Trigonometric, VariancePreserving
from models.nets.dit import DiT
from models.prediction import Karras as Preconditioned
from models.prediction import Noise, Velocity
from models.sampler import Walk
from tests.forms import every_interpolant, every_prediction
from tests.oracle import Flow, Point, single
from tests.students import Asked, Bent, Told, coupled, loss
from trainer.draws import Draws
from trainer.errors import Squared
from trainer.objectives import Consistency
from trainer.objectives.frozen import Averaged
from trainer.times import LogNormalSigma
from trainer.weights import EDM

FORMS = [{}, {"windows": 4}, {"drawn": True}, {"windows": 2, "drawn": True}]


@every_interpolant
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_distillation_is_at_rest_at_the_exact_map(interpolant, form):
    """Zero where a teacher of exact steps and a student of exact jumps are of the same flow, and not beside it."""
    objective = Consistency(Told(Flow(interpolant)), 16, error=Squared(), **form)
    scale = 1 + interpolant(torch.tensor(1.0))[1].item() ** 2
    assert loss(objective, Flow(interpolant)).item() < 1e-10 * scale  # t is float32
    assert loss(objective, Flow(interpolant, std=0.9)).item() > 1e-5


@every_interpolant
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_is_at_rest_at_a_single_point(interpolant, form):
    """Of one point's noise every trajectory is a chord: consistency training needs no teacher to be exact."""

    class Jumping(Point):
        jumps = True

        def __call__(self, x_t, t, cond=None, s=None):
            return super().__call__(x_t, t, cond)

    x, eps = coupled()
    x = x[:1].expand_as(eps)
    for point, low, high in ((x[:1], 0, 1e-8), (x[:1] + 0.3, 1e-4, math.inf)):
        found = Consistency(steps=16, error=Squared(), **form)(Jumping(interpolant, point), x, eps).item()
        assert low <= found < high


@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric(), SubVariancePreserving()], ids=repr)
def test_the_teachers_error_falls_with_its_order(interpolant):
    """DDIM is off by h^2 in a step of h: what an exact student still sees falls so with N, with 1 / k in k steps between."""
    deviation = {
        (n, k): loss(Consistency(Told(single(interpolant)), n, error=Squared(), solves=k), Flow(interpolant), 512).sqrt().item()
        for n, k in ((32, 1), (64, 1), (32, 2))
    }
    assert math.log2(deviation[32, 1] / deviation[64, 1]) == pytest.approx(2, abs=0.2)
    assert math.log2(deviation[32, 1] / deviation[32, 2]) == pytest.approx(1, abs=0.1)


@every_interpolant
@pytest.mark.parametrize("teacher", [True, False], ids=["distillation", "training"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_gradient_leads_back_and_is_that_of_differences(interpolant, teacher, form):
    """With the target held, which is the student itself; what is wrong is told by the jumps that end at their neighbour."""
    objective = Consistency(Told(Flow(interpolant)) if teacher else None, 8, error=Squared(), **form)
    for by in (0.2, -0.2):
        number = torch.tensor(by, dtype=torch.float64, requires_grad=True)
        found = torch.autograd.grad(loss(objective, Bent(interpolant, number, by)), number)[0].item()
        above, below = (loss(objective, Bent(interpolant, by + h, by)).item() for h in (1e-3, -1e-3))
        assert found == pytest.approx((above - below) / 2e-3, rel=1e-4, abs=1e-6)
        assert found * by > 0 or not teacher  # without one a draw's own gap adds to it


@every_interpolant
@every_prediction
@pytest.mark.parametrize("taught", [True, False])
def test_a_jump_to_where_it_starts_is_the_state_itself(interpolant, prediction, taught):
    """f(x_e, e) = x_e (2303.01469, section 3), whatever the network says: no c_skip or c_out is needed."""

    class Wild(torch.nn.Module):
        jumps = taught

        def forward(self, x_t, clock, cond=None, until=None):
            return torch.sin(7 * x_t) + 3

    x_t, t = torch.randn(9, 1, 2, 2, dtype=torch.float64), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    jump = Walk(Denoiser(Wild(), interpolant, prediction)).ddim(x_t, t, t)
    torch.testing.assert_close(jump, x_t, rtol=1e-6, atol=1e-6)


def test_jumps_of_karras_row_have_the_scalings_of_consistency_models():
    """f = c_skip x_t + c_out F (2303.01469, appendix C): c_out to the digit, c_skip but for sigma_min, which is .002."""
    interpolant, d = Karras(), 0.5
    t, e = torch.linspace(0.01, 1, 50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    sigma, least = interpolant(t)[1], interpolant(e)[1]

    def jump(x_t, y):
        x_t, y = (torch.full((50, 1), v, dtype=torch.float64) for v in (x_t, y))
        return interpolant.mix(*Preconditioned(d).solve(interpolant, y, x_t, t), e).flatten()

    torch.testing.assert_close(jump(0.0, -1.0).abs(), d * (sigma - least) / torch.hypot(sigma, torch.full_like(sigma, d)))
    torch.testing.assert_close(jump(1.0, 0.0), d**2 / ((sigma - least) ** 2 + d**2), rtol=0, atol=0.005)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_times_are_neighbours_and_ends_are_edges(form):
    n, windows = 12, form.get("windows", 1)
    asked = Asked(Flow(Linear()))
    loss(Consistency(Told(Flow(Linear())), n, **form), asked, 512)
    (t, e, graded), (s, end, held) = asked.calls
    assert graded and not held and torch.equal(e, end)
    i, j, k = ((v * n).round() for v in (t, s, e))
    torch.testing.assert_close(torch.stack([i, j, k]) / n, torch.stack([t, s, e]))
    assert set(i.tolist()) == set(range(1, n + 1)) and (e < t).all()
    assert (((i - j) == 1) | ((i == j) & (i - k == 1))).all(), "neighbours; where the jump has arrived nothing is asked"
    edge = (i - 1) // (n // windows) * (n // windows)
    if form.get("drawn"):
        assert (k >= edge).all() and set((k - edge).tolist()) == set(range(n // windows))
    else:
        assert torch.equal(k, edge)


def test_drawn_ends_are_no_function_of_the_time():
    """Both stratified, place by place in the batch, they would be."""
    batch = Batch(torch.zeros(256, 1, 1, 1), True, seed=1, step=2, size=256)
    t, _, e = Consistency(steps=8, drawn=True)._times(Linear(), batch.x, Draws(batch))
    assert t.mul(8).long().bincount().tolist() == [0] + [32] * 8
    assert set((8 * e[t == 1]).tolist()) == set(range(8))


def test_the_grid_doubles_with_the_steps_of_training():
    objective = Consistency(steps=4, windows=2, doublings=3, every=10)

    def spacing(step):
        batch = Batch(torch.zeros(64, 1, 1, 1), True, seed=1, step=step, size=64)
        t, s, _ = objective._times(Linear(), batch.x, Draws(batch))
        return (t - s).mean().item()

    assert [round(1 / spacing(step)) for step in (0, 9, 10, 25, 30, 1000)] == [4, 4, 8, 16, 32, 32]


def test_errors_count_more_as_neighbours_come_closer():
    """As 1 / (t - s): at N = 8 from 4 those of 8 twice."""
    batch = Batch(torch.zeros(64, 1, 1, 1), True, seed=1, step=10, size=64)
    x, eps = coupled()
    found = [
        Consistency(Told(single(Linear())), steps, doublings=more, every=10)(Flow(Linear()), x, eps, None, Draws(batch)).item()
        for steps, more in ((4, 1), (8, 0))
    ]
    assert found[0] == pytest.approx(2 * found[1], rel=1e-5)


def test_weights_learn_under_autocast():
    """Its cache must not hand weights that were cast for the target, without a gradient, to the student."""
    net = DiT(size=4, channels=1, patch=2, width=16, depth=1, heads=2)
    x, eps = torch.randn(2, 8, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        Consistency(steps=8)(Denoiser(net, Linear(), Velocity()), x, eps).backward()
    assert net.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("teacher", [True, False])
def test_the_cost_is_the_papers(teacher):
    """One evaluation of the student with a gradient, one without; one of the teacher (2303.01469, algorithms 2 and 3)."""
    student, told = Asked(Flow(Linear())), Asked(Flow(Linear()))
    loss(Consistency(Told(told) if teacher else None), student)
    assert [graded for *_, graded in student.calls] == [True, False]
    assert [graded for *_, graded in told.calls] == [False] * teacher


def test_a_network_that_reads_one_time_jumps_by_ddim():
    """Gradients reach it, its weights count, and the times seen are those of the law."""
    net = DiT(size=4, channels=1, patch=2, width=16, depth=1, heads=2)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    objective = Consistency(steps=64, times=LogNormalSigma(), weight=EDM())
    x, eps = torch.randn(2, 64, 1, 4, 4)
    found = objective(Denoiser(net, VariancePreserving(), Velocity()), x, eps)
    found.backward()
    times, errors = objective.seen
    assert all(weight.grad is not None for weight in net.blocks.parameters()) and net.embed.weight.grad.abs().sum() > 0
    assert times.shape == errors.shape == (64,) and errors.mean().item() == pytest.approx(found.item(), rel=1e-5)
    assert times.mean() < 0.4 and times.unique().numel() < 64


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Consistency(steps=0), "steps 0, windows 1, solves 1 and every 1000 must be at least 1"),
        (lambda: Consistency(doublings=-1), "doublings -1 at least 0"),
        (lambda: Consistency(steps=10, windows=4), "steps is 10, no multiple of windows, 4"),
        (lambda: loss(Consistency(drawn=True), single(Linear())), "drawn is true, but the network reads one time; build it"),
        (lambda: loss(Consistency(), Denoiser(DiT(2, 1, 2, 16, 1, 2), Linear(), Noise())), "singular on Linear"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, said):
    with pytest.raises(ValueError, match=said) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_the_target_may_be_the_students_average():
    """Of weights like its own it is the student's own target; of others it is theirs, and no gradient reaches them."""
    torch.manual_seed(0)
    student, other = (Denoiser(DiT(2, 1, 1, 16, 1, 2), Linear(), Velocity()).double() for _ in range(2))
    for value in (*student.parameters(), *other.parameters()):
        torch.nn.init.normal_(value, std=0.1)
    plain, own = Consistency(steps=8, error=Squared()), Consistency(steps=8, error=Squared(), target=Averaged())
    with pytest.raises(ValueError, match="give it the callback EMA"):
        loss(own, student)
    student.averages = {key: value.clone() for key, value in student.state_dict().items()}
    assert torch.equal(loss(own, student), loss(plain, student))
    scaled = Denoiser(DiT(2, 1, 1, 16, 1, 2, scaled=True), Linear(), Velocity()).double()
    for value in scaled.parameters():
        torch.nn.init.normal_(value, std=0.1)
    scaled.averages = {key: value.clone() for key, value in scaled.state_dict().items()}
    assert torch.equal(loss(own, Scaled(scaled, 5.0)), loss(plain, Scaled(scaled, 5.0))) and own.target  # told the scale too
    student.averages = dict(other.state_dict(keep_vars=True))
    found, (x, eps), form = loss(own, student), coupled(), student.interpolant
    torch.manual_seed(0)
    t, s, e = plain._times(form, x, None)
    jump, target = (Walk(net, None).ddim(form.mix(x, eps, at), at, e) for net, at in ((student, t), (other, s)))
    target = target.where((s > e).view(-1, 1, 1, 1), x)
    torch.testing.assert_close(found, ((jump - target).square() / (8 * (t - s)).view(-1, 1, 1, 1)).mean(), rtol=1e-6, atol=0)
    found.backward()
    assert all(value.grad is None for value in other.parameters())
