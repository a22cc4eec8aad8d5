"""Weights and errors of the matching objective against closed forms."""

import math

import pytest
import torch

from models.denoiser import Denoiser
from models.interpolant import Linear, VarianceExploding, VariancePreserving
from models.nets.mlp import MLP
from models.nets.unit import UnitNet
from models.prediction import Angular, Data, Noise, Score, Velocity
from tests.forms import PREDICTIONS, every_interpolant, every_prediction
from tests.oracle import Mixture, single
from trainer.errors import Error, PseudoHuber, Squared
from trainer.objectives import Matching
from trainer.times import LogitNormal
from trainer.weights import EDM, SNR, InverseVariance, MinSNR, Weight

WEIGHTS = [cls() for cls in Weight.__subclasses__()]
ERRORS = [cls() for cls in Error.__subclasses__()]
every_weight = pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: type(w).__name__)
TIMES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def loss(objective, denoiser, n=512, seed=0):
    torch.manual_seed(seed)
    x, eps = torch.randn(2, n, 1, 2, 2, dtype=torch.float64)
    return objective(denoiser, x, eps).item()


@every_weight
@every_interpolant
def test_a_weighted_loss_is_the_same_in_every_row(weight, interpolant):
    losses = [loss(Matching(LogitNormal(), row, weight), single(interpolant)) for row in PREDICTIONS]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-3)  # t is float32


@every_weight
@every_interpolant
@every_prediction
def test_weights_are_positive_and_finite(weight, interpolant, prediction):
    found = weight(interpolant, prediction, TIMES)
    assert found.shape == TIMES.shape and found.isfinite().all() and (found > 0).all()


@pytest.mark.parametrize("gamma", [0.5, 5.0, 20.0])
def test_min_snr_in_each_row_of_the_paper(gamma):
    """On VP: x min(SNR, g); eps min(SNR, g) / SNR; v min(SNR, g) / (SNR + 1) (2303.09556, section 3.4)."""
    interpolant, weight = VariancePreserving(), MinSNR(gamma)
    alpha, sigma = interpolant(TIMES)
    snr = (alpha / sigma) ** 2
    for row, by in ((Data(), 1), (Noise(), snr), (Angular(), snr + 1)):
        torch.testing.assert_close(weight(interpolant, row, TIMES), snr.clamp(max=gamma) / by)


@every_interpolant
def test_rows_are_weighted_as_their_losses_are_proportional(interpolant):
    """|du|^2 = (D / sigma)^2 |dx|^2 = (D / alpha)^2 |deps|^2, D = alpha' sigma - alpha sigma'."""
    (alpha, sigma), (da, ds) = interpolant(TIMES), interpolant.rates(TIMES)
    determinant, weight = da * sigma - alpha * ds, SNR()
    u, x, eps = (weight(interpolant, row, TIMES) for row in (Velocity(), Data(), Noise()))
    torch.testing.assert_close(x / u, (determinant / sigma) ** 2)
    torch.testing.assert_close(eps / u, (determinant / alpha) ** 2)
    torch.testing.assert_close(eps, torch.ones_like(eps))  # SNR is the plain loss of noise


def test_sigma_to_the_minus_two_is_the_plain_loss_of_velocity_and_of_angular():
    one = torch.ones_like(TIMES)
    torch.testing.assert_close(InverseVariance()(Linear(), Velocity(), TIMES), one)
    torch.testing.assert_close(InverseVariance()(VariancePreserving(), Angular(), TIMES), one)


@pytest.mark.parametrize("data", [0.5, 1.0])
def test_edm_is_the_inverse_of_its_own_scale(data):
    """lambda(s) = 1 / c_out^2, c_out = s d / sqrt(s^2 + d^2) (2206.00364, table 1)."""
    alpha, sigma = Linear()(TIMES)
    s = sigma / alpha
    c_out = s * data / (s**2 + data**2).sqrt()
    torch.testing.assert_close(EDM(data)(Linear(), Data(), TIMES), c_out**-2)


@every_interpolant
@pytest.mark.parametrize("row", PREDICTIONS, ids=repr)
def test_the_minimiser_is_the_same_in_every_row(interpolant, row):
    """The exact denoiser beats those whose posterior mean is moved, its noise moved with it."""
    exact = Mixture(interpolant, [-1.0, 1.5], [0.4, 0.6], [0.4, 0.6])

    class Moved:
        def __init__(self, by):
            self.interpolant, self.by = interpolant, by

        def __call__(self, x_t, t, cond=None):
            x_hat = exact(x_t, t)[0] + self.by
            alpha, sigma = (v.double().view(-1, 1, 1, 1) for v in interpolant(t))
            return x_hat, (x_t - alpha * x_hat) / sigma

    generator = torch.Generator().manual_seed(0)
    modes = torch.rand(4000, 1, 1, 1, generator=generator) < 0.4
    z, eps = torch.randn(2, 4000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = torch.where(modes, -1 + 0.4 * z, 1.5 + 0.6 * z)

    def at(by):
        torch.manual_seed(1)  # not the seed of the modes
        return Matching(LogitNormal(0.5, 0.5), row)(Moved(by), x, eps).item()

    assert at(0.0) < min(at(-0.15), at(0.15))
    assert abs(at(0.15) - at(-0.15)) < at(0.15) + at(-0.15) - 2 * at(0.0), (
        "its lowest point lies within .075, as far as 4,000 samples tell"
    )


def test_the_default_is_the_plain_squared_error_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 37, 3, 5, 5, generator=generator)
    oracle, objective = single(VariancePreserving()), Matching(measure=Noise())
    torch.manual_seed(3)
    found = objective(oracle, x, eps)
    torch.manual_seed(3)
    t = torch.rand(37).clamp(1e-5, 1 - 1e-5)
    squares = (
        Noise()
        .target(oracle.interpolant, *(a - b for a, b in zip(oracle(oracle.interpolant.mix(x, eps, t), t), (x, eps))), t)
        .square()
    )
    assert torch.equal(found, squares.mean())
    assert torch.equal(objective.seen[0], t) and torch.equal(objective.seen[1], squares.flatten(1).mean(1))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("weight", [None, MinSNR()])
def test_the_loss_is_the_mean_of_what_is_seen(error, weight):
    objective = Matching(LogitNormal(), None, weight, error)
    found = loss(objective, single(Linear()), 64)
    times, errors = objective.seen
    assert times.shape == errors.shape == (64,) and found == pytest.approx(errors.mean().item(), rel=1e-6) and found > 0
    assert torch.equal(error(torch.zeros(3, 1, 2, 2)).flatten(1).mean(1), torch.zeros(3))


def test_pseudo_huber_near_and_far():
    """|e|^2 / 2c far below c = .00054 d, |e| - c far above; its gradient is finite at 0."""
    direction = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    direction /= direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    c, huber = 0.00054 * 48, PseudoHuber()
    near, far, middle = (huber(direction * size).flatten() for size in (1e-6, 1e4, c))
    torch.testing.assert_close(near, torch.full_like(near, 1e-12 / (2 * c)), rtol=1e-6, atol=0)
    torch.testing.assert_close(far, torch.full_like(far, 1e4 - c), rtol=1e-9, atol=0)
    torch.testing.assert_close(middle, torch.full_like(middle, (math.sqrt(2) - 1) * c))
    torch.testing.assert_close(huber(direction.float() * 1e-6).flatten().double(), near, rtol=1e-5, atol=0)
    zero = torch.zeros(2, 1, 2, 2, requires_grad=True)
    huber(zero).sum().backward()
    assert torch.equal(zero.grad, torch.zeros(2, 1, 2, 2))
    torch.testing.assert_close(PseudoHuber(power=0.5)(direction), PseudoHuber(0.00054 / math.sqrt(48))(direction))
    assert huber(torch.zeros(2, 3)).shape[0] == Squared()(torch.zeros(2, 3)).shape[0] == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MinSNR(0.0), "gamma is 0"),
        (lambda: EDM(math.nan), "sigma_data is nan"),
        (lambda: PseudoHuber(-1.0), "scale is -1"),
        (lambda: PseudoHuber(power=2.0), "power is 2"),
    ],
)
def test_impossible_weights_and_errors_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(("interpolant", "row"), [(VariancePreserving(), Noise()), (VarianceExploding(), Score())], ids=repr)
def test_a_unit_nets_errors_count_alike_at_every_level(interpolant, row):
    """With EDM's weight for data of variance one, its loss of noise or score is |F - du/dphi|^2."""
    torch.manual_seed(0)
    net, (x, eps), t = MLP(), torch.randn(2, 6, 2, 1, 1), torch.rand(6) * 0.9 + 0.05
    denoiser, phi = Denoiser(UnitNet(net, interpolant, row), interpolant, row), torch.atan2(*reversed(interpolant(t)))
    velocity = phi.cos().view(-1, 1, 1, 1) * eps - phi.sin().view(-1, 1, 1, 1) * x  # an MLP begins at F = 0
    torch.testing.assert_close(Matching(weight=EDM(1.0)).at(denoiser, x, eps, t), velocity.square().mean(), rtol=1e-3, atol=0)
