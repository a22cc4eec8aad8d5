"""One-step regression against the exact map of a Gaussian."""

import pytest
import torch

from models.interpolant import Linear
from models.prediction import Noise
from models.sampler import DDIM
from tests.forms import every_interpolant
from tests.oracle import Flow
from tests.taught import Asked, Taught
from trainer.errors import Adaptive, Error, PseudoHuber, Squared
from trainer.objectives import Regression

ERRORS = [cls() for cls in Error.__subclasses__() if cls is not Adaptive]  # whose weight is not differentiated


def pairs(interpolant, n=64):
    """Return noises and where the exact flow carries them from where samplers start."""
    eps = torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, zero = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    return Flow(interpolant).map(interpolant.mix(torch.zeros_like(eps), eps, one), one, zero), eps


@every_interpolant
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_the_loss_is_zero_at_the_truth_and_leads_to_it(interpolant, error):
    """Zero but for rounding, with jumps and without; beside it the gradient points back, and is the finite difference."""
    (x, eps), objective, flow = pairs(interpolant), Regression(error), Flow(interpolant)
    by = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    beside = objective(Taught(interpolant, flow, [1.0, 0.0], by), x, eps)
    for truth in (Taught(interpolant, flow, [1.0, 0.0]), flow):
        assert objective(truth, x, eps) < 1e-6 * beside
    (slope,) = torch.autograd.grad(beside, by)
    ahead, behind = (objective(Taught(interpolant, flow, [1.0, 0.0], 0.3 + h), x, eps) for h in (1e-4, -1e-4))
    assert slope > 0 and slope.item() == pytest.approx((ahead - behind).item() / 2e-4, rel=1e-3)


@every_interpolant
def test_the_error_is_that_of_a_samplers_one_step(interpolant):
    x, eps = pairs(interpolant)
    learner = Taught(interpolant, Flow(interpolant), [1.0, 0.0], 0.2)
    expected = (DDIM(1)(learner, eps) - x).square()
    objective = Regression()
    torch.testing.assert_close(objective(learner, x, eps), expected.mean(), rtol=1e-6, atol=1e-12)
    times, errors = objective.seen
    assert (times == 1).all()
    torch.testing.assert_close(errors, expected.flatten(1).mean(1), rtol=1e-6, atol=1e-12)


def test_independent_draws_teach_the_mean():
    """The best that one step can do: on N(.5, .7^2) the constant .5, at the loss .7^2."""

    class Constant:
        interpolant = Linear()

        def __init__(self, value):
            self.value = value

        def __call__(self, x_t, t, cond=None):
            return self.value.expand_as(x_t), x_t

    x, eps = torch.randn(2, 20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.mean()) / x.std(correction=0)
    mean = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = Regression()(Constant(mean), 0.5 + 0.7 * x, eps)
    (slope,) = torch.autograd.grad(loss, mean)
    assert loss.item() == pytest.approx(0.49) and abs(slope.item()) < 1e-9


def test_lpips_is_added_sample_by_sample_and_a_step_costs_one_evaluation():
    x, eps = pairs(Linear(), 8)
    learner = Asked(Taught(Linear(), Flow(Linear()), [1.0, 0.0], 0.2))
    plain, both = Regression(PseudoHuber()), Regression(PseudoHuber(), lambda x_hat, x: (x_hat - x).abs().flatten(1).sum(1))
    gap = both(learner, x, eps) - plain(learner, x, eps)
    assert learner.asked == 2 * 8
    assert gap.item() == pytest.approx(4 * 0.2) and (both.seen[1] - plain.seen[1]).mean().item() == pytest.approx(4 * 0.2)


def test_a_prediction_that_says_nothing_at_the_noise_is_named():
    x, eps = pairs(Linear())
    with pytest.raises(ValueError, match=r"Noise\(\) is singular on Linear.* at t = 1") as refused:
        Regression(Squared())(Taught(Linear(), Flow(Linear()), [1.0, 0.0], prediction=Noise()), x, eps)
    assert "\n" not in str(refused.value)
