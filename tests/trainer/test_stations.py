"""Step maps on stations: exact on pairs and on trajectories, and what becomes of them on independent draws."""

import math

import pytest
import torch

from data.batch import Batch
from models.interpolant import Linear, Trigonometric, VariancePreserving, expand
from models.prediction import Data, Noise, Velocity
from models.sampler import DDIM, edges
from tests.forms import every_interpolant
from tests.oracle import Flow, single
from tests.taught import Asked, Taught
from trainer.draws import Draws
from trainer.errors import PseudoHuber
from trainer.objectives import Stations

TIMES = [1.0, 0.6, 0.35, 0.0]
COLLAPSE = {1: 0.0, 2: 0.5, 4: 0.72, 8: 0.85}


class Affine:
    """x_hat = a_k + b_k x_t at the k-th of K stations: two numbers each, `weights` (K, 2)."""

    def __init__(self, interpolant, times, weights):
        self.interpolant, self.times, self.weights = interpolant, torch.tensor(times[:-1]), weights

    def __call__(self, x_t, t, cond=None):
        a, b = self.weights[(t.float()[:, None] - self.times).abs().argmin(1)].T
        x_hat = expand(a, x_t) + expand(b, x_t) * x_t
        alpha, sigma = (expand(v, x_t) for v in self.interpolant(t))
        return x_hat, (x_t - alpha * x_hat) / sigma


def trained(objective, interpolant, x, eps, times):
    """Return the affine denoiser at the objective's least value: it is quadratic, so that one Newton step ends there."""

    def loss(weights):
        torch.manual_seed(0)
        return objective(Affine(interpolant, times, weights), x, eps)

    start = torch.zeros(len(times) - 1, 2, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(loss, start).flatten()
    curvature = torch.autograd.functional.hessian(loss, start).view(start.numel(), -1)
    best = start - torch.linalg.solve(curvature, slope).view_as(start)
    assert torch.autograd.functional.jacobian(loss, best).abs().max() < 1e-8
    return Affine(interpolant, times, best)


def walked(denoiser, times, n=20_000):
    eps = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return eps, DDIM(len(times) - 1, times)(denoiser, eps)


@pytest.mark.parametrize("count", COLLAPSE)
def test_the_collapse_of_independent_draws_in_closed_form(count):
    """The best map is one Euler step: on N(0, 1) a factor S_s / S_t cos(theta_t - theta_s), theta = atan2(sigma, alpha)."""
    alpha, sigma = Linear()(torch.tensor(edges(count), dtype=torch.float64))
    theta, length = torch.atan2(sigma, alpha), torch.hypot(alpha, sigma)
    left = (length[1:] / length[:-1] * theta.diff().cos()).prod().item()
    assert left == pytest.approx(COLLAPSE[count], abs=5e-3)
    eps, x = walked(single(Linear(), 0.0, 1.0), edges(count), 100)
    torch.testing.assert_close(x, left * eps)


@pytest.mark.parametrize("count", COLLAPSE)
def test_the_collapse_of_independent_draws_in_training(count):
    x, eps = torch.randn(2, 40_000, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    naive = trained(Stations(count), Linear(), x, eps, edges(count))
    assert walked(naive, edges(count))[1].std().item() == pytest.approx(COLLAPSE[count], abs=0.02)


@pytest.mark.parametrize("count", COLLAPSE)
@pytest.mark.parametrize("interpolant", [Linear(), Trigonometric()], ids=repr)
def test_pairs_are_learnt_exactly(count, interpolant):
    eps = torch.randn(400, 1, 1, 1, dtype=torch.float64)
    learnt = trained(Stations(count), interpolant, 0.5 + 0.7 * eps, eps, edges(count))
    eps, x = walked(learnt, edges(count))
    torch.testing.assert_close(x, 0.5 + 0.7 * eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interpolant", [Linear(), VariancePreserving()], ids=repr)
def test_trajectories_are_learnt_exactly_from_noise_alone(interpolant):
    """The data, here nonsense, are not looked at."""
    eps = torch.randn(400, 1, 1, 1, dtype=torch.float64)
    flow = Flow(interpolant)
    learnt = trained(Stations(TIMES, Asked(flow), steps=1), interpolant, torch.full_like(eps, math.nan), eps, TIMES)
    eps, x = walked(learnt, TIMES)
    start = interpolant.mix(torch.zeros_like(eps), eps, torch.ones(()))
    one, zero = torch.ones(len(eps), dtype=torch.float64), torch.zeros(len(eps), dtype=torch.float64)
    torch.testing.assert_close(x, flow.map(start, one, zero), rtol=1e-5, atol=1e-5)


def loss(objective, denoiser, n=64, cond=None, draws=None):
    torch.manual_seed(0)
    x, eps = torch.randn(2, n, 1, 2, 2, dtype=torch.float64)
    return objective(denoiser, x, eps, cond, draws)


@every_interpolant
def test_the_loss_is_zero_at_the_truth_and_leads_to_it(interpolant):
    """Zero but for rounding; beside it the gradient points back, and is the finite difference."""
    flow, objective = Flow(interpolant), Stations(TIMES, Asked(Flow(interpolant)), steps=1)
    by = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    beside = loss(objective, Taught(interpolant, flow, TIMES, by))
    assert loss(objective, Taught(interpolant, flow, TIMES)) < 1e-6 * beside
    (slope,) = torch.autograd.grad(beside, by)
    ahead, behind = (loss(objective, Taught(interpolant, flow, TIMES, 0.3 + h)) for h in (1e-4, -1e-4))
    assert slope > 0 and slope.item() == pytest.approx((ahead - behind).item() / 2e-4, rel=1e-3)


@pytest.mark.parametrize("more", [{"error": PseudoHuber()}, {"measure": Data()}], ids=" ".join)
def test_errors_and_rows_are_those_of_matching(more):
    objective = Stations(TIMES, Asked(Flow(Linear())), steps=1, **more)
    found = loss(objective, Taught(Linear(), Flow(Linear()), TIMES, 0.2))
    times, errors = objective.seen
    assert set(times.tolist()) == set(torch.tensor(TIMES[:-1]).tolist()) and found.item() == pytest.approx(errors.mean().item())


def test_students_that_jump_learn_the_jump():
    """The exact jumps of the flow have no loss at all, on its own trajectories."""
    assert loss(Stations(TIMES, Asked(Flow(Trigonometric())), steps=1), Flow(Trigonometric())) < 1e-10


def test_each_sample_is_walked_as_far_as_it_needs():
    """Teacher: steps x (k + 1) for the k-th station, (K + 1) / 2 on average; student: one. And its condition goes with it."""
    teacher, told = Asked(single(Linear())), []
    teacher.denoiser = lambda x_t, t, cond: told.append(cond) or single(Linear())(x_t, t)
    learner, batch = Asked(single(Linear())), Batch(torch.zeros(90, 1, 2, 2), True, size=90)
    loss(Stations(TIMES, teacher, steps=5), learner, 90, torch.arange(90), Draws(batch))
    assert learner.asked == 90 and teacher.asked == 5 * 90 * 2
    assert [cond.tolist() for cond in told[::5]] == [list(range(90)), list(range(30, 90)), list(range(60, 90))]
    learner.asked = 0
    loss(Stations(TIMES), learner, 8)
    assert learner.asked == 8


def test_bad_input_is_named():
    for stations in (0, [0.9, 0.0], [1.0, 0.5]):
        with pytest.raises(ValueError, match="Stations: stations"):
            Stations(stations)
    with pytest.raises(ValueError, match="Stations: steps is 0"):
        Stations(steps=0)
    for measure, prediction in ((Noise(), Velocity()), (None, Noise())):
        with pytest.raises(ValueError, match=r"Noise\(\) is singular on Linear.* at t = 1") as refused:
            loss(Stations(measure=measure), Taught(Linear(), Flow(Linear()), TIMES, prediction=prediction))
        assert "\n" not in str(refused.value)
