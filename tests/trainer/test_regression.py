"""One-step regression against the exact map of a Gaussian."""

import pytest
import torch

from models.interpolant import Linear
from models.prediction import NoisePrediction
from models.sampler import DDIM
from tests.examples import every_interpolant
from tests.helpers.denoisers import ChordStudent, CountingDenoiser, central_difference, derivative
from tests.helpers.refusals import refused
from tests.oracle import Flow
from trainer.objectives import Regression
from trainer.objectives.parts.distances import AdaptiveDistance, Distance, PseudoHuber, Squared

# the weight of the adaptive distance is not differentiated, so its gradient is no finite difference
DISTANCES = [cls() for cls in Distance.__subclasses__() if cls is not AdaptiveDistance]
every_distance = pytest.mark.parametrize(
    "distance", DISTANCES, ids=lambda distance: type(distance).__name__
)


def exact_student(interpolant, error=0.0, **options):
    return ChordStudent(interpolant, Flow(interpolant), [1.0, 0.0], error, **options)


def make_pairs(interpolant, n=64):
    """Return samples of the exact flow and their noises; it starts where samplers start."""
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(n, 1, 2, 2, generator=generator, dtype=torch.float64)
    one = torch.ones(n, dtype=torch.float64)
    x_1 = interpolant.mix(torch.zeros_like(eps), eps, one)
    return Flow(interpolant).map(x_1, one, torch.zeros_like(one)), eps


@every_interpolant
@every_distance
@pytest.mark.parametrize("make", [exact_student, Flow], ids=["one time", "two times"])
def test_the_loss_is_zero_up_to_rounding_at_the_truth(interpolant, distance, make):
    x, eps = make_pairs(interpolant)
    objective = Regression(distance)
    wrong = objective(exact_student(interpolant, 0.3), x, eps).total
    assert objective(make(interpolant), x, eps).total < 1e-6 * wrong


@every_interpolant
@every_distance
def test_the_gradient_is_the_finite_difference_and_points_to_the_truth(interpolant, distance):
    x, eps = make_pairs(interpolant)
    objective = Regression(distance)

    def loss(error):
        return objective(exact_student(interpolant, error), x, eps).total

    slope = derivative(loss, 0.3)
    assert slope > 0
    assert slope == pytest.approx(central_difference(loss, 0.3, 1e-4), rel=1e-3)


@every_interpolant
def test_the_error_is_that_of_one_sampler_step(interpolant):
    x, eps = make_pairs(interpolant)
    student = exact_student(interpolant, 0.2)
    objective = Regression()
    loss = objective(student, x, eps)
    expected = (DDIM(1)(student, eps) - x).square()
    torch.testing.assert_close(loss.total, expected.mean(), rtol=1e-6, atol=1e-12)

    times, errors = loss.per_sample
    assert (times == 1).all()
    torch.testing.assert_close(errors, expected.flatten(1).mean(1), rtol=1e-6, atol=1e-12)


class ConstantDenoiser:
    """A denoiser on Linear that predicts the same data for every state."""

    interpolant = Linear()

    def __init__(self, value):
        self.value = value

    def __call__(self, x_t, t, cond=None):
        return self.value.expand_as(x_t), x_t


def test_independent_data_and_noise_teach_the_mean():
    """On N(.5, .7^2) the best map in one step is the constant .5, with the loss .7^2."""
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 20_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    z = (z - z.mean()) / z.std(correction=0)
    mean = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    loss = Regression()(ConstantDenoiser(mean), 0.5 + 0.7 * z, eps).total
    (slope,) = torch.autograd.grad(loss, mean)
    assert loss.item() == pytest.approx(0.49)
    assert abs(slope.item()) < 1e-9


def perceptual(x_hat, x):
    """Stand in for a perceptual distance, (B,): the sum of the absolute errors."""
    return (x_hat - x).abs().flatten(1).sum(1)


def test_the_perceptual_distance_is_added_sample_by_sample():
    x, eps = make_pairs(Linear(), 8)
    student = exact_student(Linear(), 0.2)
    plain = Regression(PseudoHuber())(student, x, eps)
    both = Regression(PseudoHuber(), perceptual)(student, x, eps)
    assert (both.total - plain.total).item() == pytest.approx(4 * 0.2)
    added = both.per_sample.distances - plain.per_sample.distances
    assert added.mean().item() == pytest.approx(4 * 0.2)


def test_the_distance_and_the_perceptual_distance_are_parts_of_the_loss():
    x, eps = make_pairs(Linear(), 8)
    student = exact_student(Linear(), 0.2)
    plain = Regression(PseudoHuber())(student, x, eps)
    both = Regression(PseudoHuber(), perceptual)(student, x, eps)
    assert plain.parts == {}
    assert torch.equal(both.parts["distance"], plain.total)
    assert both.parts["perceptual"].item() == pytest.approx(4 * 0.2)


@pytest.mark.parametrize("added", [None, perceptual], ids=["plain", "perceptual"])
def test_a_step_costs_one_evaluation(added):
    x, eps = make_pairs(Linear(), 8)
    student = CountingDenoiser(exact_student(Linear(), 0.2))
    Regression(PseudoHuber(), added)(student, x, eps)
    assert student.evaluated == 8


def test_a_prediction_that_is_singular_at_the_noise_is_refused():
    x, eps = make_pairs(Linear())
    student = exact_student(Linear(), prediction=NoisePrediction())
    with refused(NoisePrediction(), "Linear", "t = 1"):
        Regression(Squared())(student, x, eps)
