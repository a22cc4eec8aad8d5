"""Weightings and distances of the matching objective against closed forms."""

import math

import pytest
import torch

from models.denoiser import Denoiser
from models.interpolant import Linear, VarianceExploding, VariancePreserving
from models.nets.mlp import MLP
from models.nets.unit_variance import UnitVariance
from models.prediction import Data, NoisePrediction, Score, Velocity, VPrediction
from tests.examples import PREDICTIONS, every_interpolant, every_prediction
from tests.helpers.denoisers import seeded_loss, seeded_result
from tests.helpers.refusals import refused
from tests.oracle import Mixture, single
from trainer.objectives import Matching
from trainer.objectives.parts.distances import Distance, PseudoHuber, Squared
from trainer.objectives.parts.time_distributions import LogitNormal
from trainer.objectives.parts.weightings import EDM, SNR, InverseVariance, MinSNR, Weighting

WEIGHTINGS = [cls() for cls in Weighting.__subclasses__()]
DISTANCES = [cls() for cls in Distance.__subclasses__()]
TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def class_name(value):
    return type(value).__name__


every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS, ids=class_name)
every_distance = pytest.mark.parametrize("distance", DISTANCES, ids=class_name)


@every_weighting
@every_interpolant
def test_a_weighted_loss_is_the_same_in_every_prediction(weighting, interpolant):
    denoiser = single(interpolant)
    losses = [
        seeded_loss(Matching(LogitNormal(), prediction, weighting), denoiser, 512).item()
        for prediction in PREDICTIONS
    ]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)  # t is float32


@every_weighting
@every_interpolant
@every_prediction
def test_weights_are_positive_and_finite(weighting, interpolant, prediction):
    weights = weighting(interpolant, prediction, TIMES)
    assert weights.shape == TIMES.shape
    assert weights.isfinite().all()
    assert (weights > 0).all()


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_min_snr_in_each_prediction_of_the_paper(gamma):
    """On VP: min(SNR, g) for x, min(SNR, g) / SNR for eps, min(SNR, g) / (SNR + 1) for v.

    Hang et al. 2023 (arXiv 2303.09556), section 3.4.
    """
    interpolant = VariancePreserving()
    weighting = MinSNR(gamma)
    alpha, sigma = interpolant(TIMES)
    snr = (alpha / sigma) ** 2
    clamped = snr.clamp(max=gamma)
    torch.testing.assert_close(weighting(interpolant, Data(), TIMES), clamped)
    torch.testing.assert_close(weighting(interpolant, NoisePrediction(), TIMES), clamped / snr)
    torch.testing.assert_close(weighting(interpolant, VPrediction(), TIMES), clamped / (snr + 1))


@every_interpolant
def test_weights_of_two_predictions_are_inverse_to_their_squared_errors(interpolant):
    """|du|^2 = (D / sigma)^2 |dx|^2 = (D / alpha)^2 |deps|^2, D = alpha' sigma - alpha sigma'."""
    alpha, sigma = interpolant(TIMES)
    alpha_rate, sigma_rate = interpolant.derivatives(TIMES)
    determinant = alpha_rate * sigma - alpha * sigma_rate
    of_velocity = SNR()(interpolant, Velocity(), TIMES)
    of_data = SNR()(interpolant, Data(), TIMES)
    of_noise = SNR()(interpolant, NoisePrediction(), TIMES)
    torch.testing.assert_close(of_data / of_velocity, (determinant / sigma) ** 2)
    torch.testing.assert_close(of_noise / of_velocity, (determinant / alpha) ** 2)


@every_interpolant
def test_snr_is_the_plain_loss_of_noise(interpolant):
    weights = SNR()(interpolant, NoisePrediction(), TIMES)
    torch.testing.assert_close(weights, torch.ones_like(TIMES))


@pytest.mark.parametrize(
    ("interpolant", "prediction"),
    [(Linear(), Velocity()), (VariancePreserving(), VPrediction())],
    ids=repr,
)
def test_the_inverse_variance_is_the_plain_loss_of_both_velocities(interpolant, prediction):
    weights = InverseVariance()(interpolant, prediction, TIMES)
    torch.testing.assert_close(weights, torch.ones_like(TIMES))


@pytest.mark.parametrize("data_std", [0.5, 1.0])
def test_edm_is_the_inverse_of_its_output_scale(data_std):
    """lambda(s) = 1 / c_out^2, c_out = s d / sqrt(s^2 + d^2).

    Karras et al. 2022 (arXiv 2206.00364), table 1.
    """
    alpha, sigma = Linear()(TIMES)
    s = sigma / alpha
    c_out = s * data_std / (s**2 + data_std**2).sqrt()
    torch.testing.assert_close(EDM(data_std)(Linear(), Data(), TIMES), c_out**-2)


class ShiftedDenoiser:
    """A denoiser with an error in x_hat, and in eps_hat so that both still make up x_t."""

    def __init__(self, denoiser, error):
        self.denoiser = denoiser
        self.interpolant = denoiser.interpolant
        self.error = error

    def __call__(self, x_t, t, cond=None):
        x_hat = self.denoiser(x_t, t)[0] + self.error
        alpha, sigma = (value.double().view(-1, 1, 1, 1) for value in self.interpolant(t))
        return x_hat, (x_t - alpha * x_hat) / sigma


@every_interpolant
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
def test_the_exact_denoiser_has_the_least_loss_in_every_prediction(interpolant, prediction):
    exact = Mixture(interpolant, [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6])

    # samples of the mixture
    generator = torch.Generator().manual_seed(0)
    modes = torch.rand(4000, 1, 1, 1, generator=generator) < 0.4
    z, eps = torch.randn(2, 4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = torch.where(modes, -1 + 0.4 * z, 1.5 + 0.6 * z)

    def loss(error):
        torch.manual_seed(1)  # not the seed of the modes
        objective = Matching(LogitNormal(0.5, 0.5), prediction)
        return objective(ShiftedDenoiser(exact, error), x, eps).total.item()

    below = loss(-0.15)
    least = loss(0.0)
    above = loss(0.15)
    assert least < min(below, above)

    # the minimum of the parabola through the three lies within .075, the noise of 4,000 samples
    assert abs(above - below) < above + below - 2 * least


def test_the_default_is_the_plain_squared_error_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 37, 3, 5, 5, generator=generator)
    denoiser = single(VariancePreserving())
    interpolant = denoiser.interpolant
    objective = Matching(measure=NoisePrediction())
    torch.manual_seed(3)
    found = objective(denoiser, x, eps)

    # the same, written out
    torch.manual_seed(3)
    t = torch.rand(37).clamp(1e-5, 1 - 1e-5)
    x_hat, eps_hat = denoiser(interpolant.mix(x, eps, t), t)
    squares = NoisePrediction().target(interpolant, x_hat - x, eps_hat - eps, t).square()

    assert torch.equal(found.total, squares.mean())
    times, errors = found.per_sample
    assert torch.equal(times, t)
    assert torch.equal(errors, squares.flatten(1).mean(1))


@every_distance
@pytest.mark.parametrize("weighting", [None, MinSNR()], ids=class_name)
def test_the_loss_is_the_mean_of_the_recorded_errors(distance, weighting):
    objective = Matching(LogitNormal(), None, weighting, distance)
    loss = seeded_result(objective, single(Linear()))
    times, errors = loss.per_sample
    assert times.shape == errors.shape == (64,)
    assert loss.total.item() == pytest.approx(errors.mean().item(), rel=1e-6)
    assert loss.total > 0


@every_distance
def test_the_distance_of_no_error_is_zero(distance):
    found = distance(torch.zeros(3, 1, 2, 2)).flatten(1).mean(1)
    assert torch.equal(found, torch.zeros(3))


HUBER_C = 0.00054 * 48  # of a sample of 3 x 4 x 4 dimensions


@pytest.fixture
def directions():
    """Five errors of 3 x 4 x 4 dimensions, of length 1."""
    errors = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    return errors / errors.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def distances_at(directions, length):
    return PseudoHuber()(directions * length).flatten()


@pytest.mark.parametrize(
    ("length", "expected", "tolerance"),
    [
        (1e-6, 1e-12 / (2 * HUBER_C), 1e-6),  # |e|^2 / 2c far below c
        (1e4, 1e4 - HUBER_C, 1e-9),  # |e| - c far above c
    ],
    ids=["near", "far"],
)
def test_pseudo_huber_near_and_far(directions, length, expected, tolerance):
    found = distances_at(directions, length)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=tolerance, atol=0)


def test_pseudo_huber_at_its_scale(directions):
    found = distances_at(directions, HUBER_C)
    torch.testing.assert_close(found, torch.full_like(found, (math.sqrt(2) - 1) * HUBER_C))


def test_pseudo_huber_keeps_its_digits_near_zero_in_float32(directions):
    found = distances_at(directions.float(), 1e-6).double()
    torch.testing.assert_close(found, distances_at(directions, 1e-6), rtol=1e-5, atol=0)


def test_the_gradient_of_pseudo_huber_is_zero_at_zero():
    zero = torch.zeros(2, 1, 2, 2, requires_grad=True)
    PseudoHuber()(zero).sum().backward()
    assert torch.equal(zero.grad, torch.zeros(2, 1, 2, 2))


def test_the_scale_of_pseudo_huber_grows_with_a_power_of_the_dimensions(directions):
    """c = scale x d^power."""
    found = PseudoHuber(power=0.5)(directions)
    torch.testing.assert_close(found, PseudoHuber(0.00054 / math.sqrt(48))(directions))


@pytest.mark.parametrize("distance", [PseudoHuber(), Squared()], ids=class_name)
def test_distances_take_vectors(distance):
    assert distance(torch.zeros(2, 3)).shape[0] == 2


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (MinSNR, "gamma", 0.0),
        (EDM, "sigma_data", math.nan),
        (PseudoHuber, "scale", -1.0),
        (PseudoHuber, "power", 2.0),
    ],
)
def test_impossible_options_are_refused(cls, option, value):
    with refused(cls.__name__, option, value):
        cls(**{option: value})


@pytest.mark.parametrize(
    ("interpolant", "prediction"),
    [(VariancePreserving(), NoisePrediction()), (VarianceExploding(), Score())],
    ids=repr,
)
def test_errors_of_a_unit_variance_network_count_alike_at_every_level(interpolant, prediction):
    """With EDM's weighting for data of variance one, the loss is |F - du/dphi|^2."""
    torch.manual_seed(0)
    net = UnitVariance(MLP(), interpolant, prediction)
    denoiser = Denoiser(net, interpolant, prediction)
    x, eps = torch.randn(2, 6, 2, 1, 1)
    t = torch.rand(6) * 0.9 + 0.05
    found = Matching(weighting=EDM(1.0)).loss_at(denoiser, x, eps, t).total

    # a new MLP has the output F = 0
    alpha, sigma = interpolant(t)
    phi = torch.atan2(sigma, alpha).view(-1, 1, 1, 1)
    velocity = phi.cos() * eps - phi.sin() * x
    torch.testing.assert_close(found, velocity.square().mean(), rtol=1e-3, atol=0)
