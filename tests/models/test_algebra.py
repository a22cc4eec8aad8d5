"""Interpolants and predictions: conversions, rates, and broadcasting of t."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from models.clock import Index, NoiseLevel, Scaled
from models.denoiser import Denoiser
from models.interpolant import (
    Discrete,
    ImprovedCosine,
    Interpolant,
    Karras,
    Linear,
    Shifted,
    SubVariancePreserving,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from models.prediction import Angular, Data, Noise, Prediction, Score, Velocity
from models.prediction import Karras as Preconditioned
from tests.forms import INTERPOLANTS, PREDICTIONS, every_interpolant, every_prediction, public


def test_every_form_is_tested():
    assert {type(form) for form in INTERPOLANTS} == set(public(Interpolant))
    assert {type(form) for form in PREDICTIONS} == set(public(Prediction))


@every_interpolant
@every_prediction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_conversions_round_trip(interpolant, prediction, dtype):
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 64, 3, 5, 5, generator=generator, dtype=dtype)
    t = torch.linspace(0.02, 0.98, 64, dtype=dtype)
    y, x_t = prediction.target(interpolant, x, eps, t), interpolant.mix(x, eps, t)
    x_hat, eps_hat = prediction.solve(interpolant, y, x_t, t)
    rows = torch.stack([torch.stack(interpolant(t.double())), torch.stack(prediction.row(interpolant, t.double()))])
    bound = (1e-12 if dtype == torch.float64 else 1e-6) * torch.linalg.cond(rows.permute(2, 0, 1)).view(-1, 1, 1, 1)
    scale = 5 * max(1.0, y.abs().max().item())
    assert ((x_hat - x).abs() <= bound * scale).all()
    assert ((eps_hat - eps).abs() <= bound * scale).all()


@every_interpolant
def test_rates_are_finite_differences(interpolant):
    t, h = torch.linspace(0.05037, 0.95037, 91, dtype=torch.float64), 1e-5  # Discrete is not smooth at its knots, 1e-3 apart
    for rate, ahead, behind in zip(interpolant.rates(t), interpolant(t + h), interpolant(t - h)):
        torch.testing.assert_close(rate, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


@every_interpolant
def test_rates_accept_an_expanded_time(interpolant):
    once = torch.tensor(0.3)
    torch.testing.assert_close(interpolant.rates(once.expand(4))[0], interpolant.rates(once)[0].expand(4))


@every_interpolant
def test_signal_to_noise_falls(interpolant):
    alpha, sigma = interpolant(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
    assert (torch.diff(torch.log(alpha / sigma)) < 0).all()


def test_variance_preserving_sigma_near_data():
    t = torch.tensor(1e-4)
    sigma = VariancePreserving()(t)[1].item()
    exact = math.sqrt(-math.expm1(-(19.9 * 1e-4**2 / 2 + 0.1 * 1e-4)))
    assert sigma == pytest.approx(exact, rel=1e-6)


@every_interpolant
@every_prediction
def test_time_meets_the_batch_axis_and_no_other(interpolant, prediction):
    """t of shape (B,) with B == W gives each sample its own time."""
    x, eps = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    x_t, y = interpolant.mix(x, eps, t), prediction.target(interpolant, x, eps, t)
    for i in range(4):
        torch.testing.assert_close(x_t[i], interpolant.mix(x[i], eps[i], t[i]))
        torch.testing.assert_close(y[i], prediction.target(interpolant, x[i], eps[i], t[i]))


def test_velocity_on_linear_is_flow_matching():
    x, eps = torch.randn(2, 3, 1, 2, 2)
    torch.testing.assert_close(Velocity().target(Linear(), x, eps, torch.rand(3)), eps - x)


@every_interpolant
def test_velocity_and_score_agree(interpolant):
    """u = (sigma'/sigma) x_t + (D/sigma) x with D = alpha' sigma - alpha sigma', and score = -eps/sigma."""
    x, eps = torch.randn(2, 8, 1, 2, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    (alpha, sigma), (da, ds) = ([v.view(-1, 1, 1, 1) for v in pair] for pair in (interpolant(t), interpolant.rates(t)))
    x_t = alpha * x + sigma * eps
    expected = ds / sigma * x_t + (da * sigma - alpha * ds) / sigma * x
    torch.testing.assert_close(Velocity().target(interpolant, x, eps, t), expected)
    torch.testing.assert_close(Score().target(interpolant, x, eps, t) * -sigma, Noise().target(interpolant, x, eps, t))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(-0.1),
        lambda: Linear(1.0),
        lambda: VariancePreserving(2.0, 1.0),
        lambda: SubVariancePreserving(0.0, 1.0),
        lambda: VarianceExploding(0.0),
        lambda: VarianceExploding(2.0, 1.0),
        lambda: VarianceExploding(sigma_max=math.nan),
        lambda: ImprovedCosine(0.0),
        lambda: Karras(-1.0),
        lambda: Karras(rho=0.0),
        lambda: Shifted(Linear(), 0.0),
        lambda: Shifted(Linear(), math.nan),
    ],
)
def test_impossible_interpolants_are_refused(make):
    with pytest.raises(ValueError, match="sigma_min|beta_min|s is|rho is|shift is"):
        make()


def test_a_shift_applied_twice_is_refused():
    with pytest.raises(ValueError, match="shifted already; shifts multiply"):
        Shifted(Shifted(Linear(), 3.0), 2.0)


def test_a_shift_adds_to_the_logit():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    later = torch.sigmoid(torch.logit(t) + math.log(3.0))
    torch.testing.assert_close(Shifted(Linear(), 3.0)(t), Linear()(later))
    torch.testing.assert_close(Shifted(Linear(), 3.0)(torch.tensor([0.0, 1.0])), Linear()(torch.tensor([0.0, 1.0])))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_interpolant
def test_time_is_the_inverse(interpolant, dtype):
    """Also where sigma or alpha is zero, for multiples of (alpha, sigma), and for numbers of any shape."""
    t = torch.cat([torch.tensor([0.0, 1e-4]), torch.linspace(0.01, 0.95, 95), torch.tensor([1.0])]).to(dtype).view(2, -1)
    alpha, sigma = interpolant(t)
    again = interpolant.time(3 * alpha, 3 * sigma)
    assert again.dtype == dtype and ((0 <= again) & (again <= 1)).all()
    torch.testing.assert_close(again, t, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)
    torch.testing.assert_close(interpolant.time(alpha[0, 5], sigma[0, 5]), again[0, 5])


def test_time_beyond_the_range_is_the_nearer_end():
    one, zero = torch.ones(1), torch.zeros(1)
    for interpolant in (VariancePreserving(), VarianceExploding(), Karras()):
        assert interpolant.time(zero, one) == 1 and interpolant.time(one, zero) == 0


def test_sub_variance_preserving_is_the_square_of_sigma():
    t = torch.logspace(-6, 0, 50)
    alpha, sigma = SubVariancePreserving()(t)
    torch.testing.assert_close(alpha, VariancePreserving()(t)[0])
    torch.testing.assert_close(sigma.sqrt(), VariancePreserving()(t)[1])


def test_improved_cosine_is_the_textbook_one():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square() / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    alpha, sigma = ImprovedCosine()(t)
    torch.testing.assert_close(alpha.square(), bar)
    torch.testing.assert_close(sigma.square(), 1 - bar)
    assert ImprovedCosine()(torch.tensor(1.0))[0] == 0


def test_karras_is_the_rho_grid():
    n, rho = 18, 7.0
    i = torch.arange(n, dtype=torch.float64)
    grid = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho  # 2206.00364, eq. 5
    torch.testing.assert_close(Karras()(1 - i / (n - 1))[1], grid)


def test_variance_exploding_is_geometric():
    sigma = VarianceExploding(0.01, 50.0)(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))[1]
    torch.testing.assert_close(sigma, torch.tensor([0.01, math.sqrt(0.5), 50.0], dtype=torch.float64))


SCHEDULES = [Discrete.linear, Discrete.scaled_linear, Discrete.squaredcos_cap_v2]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.__name__)
def test_discrete_is_diffusers_schedule(schedule, zero):
    theirs = DDPMScheduler(beta_schedule=schedule.__name__, rescale_betas_zero_snr=zero).alphas_cumprod.double()
    alpha, sigma = schedule(zero_terminal_snr=zero)(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(alpha.square(), theirs, rtol=2e-5, atol=1e-6)  # theirs is a product of 1000 float32 numbers
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1000, dtype=torch.float64))


def test_stable_diffusion_keeps_signal_at_the_end_and_zero_terminal_snr_does_not():
    one = torch.ones((), dtype=torch.float64)
    stable = {"beta_start": 0.00085, "beta_end": 0.012}
    assert Discrete.scaled_linear(**stable)(one)[0].square().item() == pytest.approx(0.00466, abs=5e-6)
    alpha, sigma = Discrete.scaled_linear(**stable, zero_terminal_snr=True)(one)
    assert alpha == 0 and sigma == 1


@pytest.mark.parametrize("betas", [[0.1] * 10, [0.5, 0.001, 0.9, 0.01, 0.3], torch.rand(50).mul(0.5).add(1e-6).tolist()])
@pytest.mark.parametrize("zero", [False, True])
def test_discrete_falls_and_ends_in_data_for_any_betas(betas, zero):
    discrete = Discrete(betas, zero)
    alpha, sigma = discrete(torch.linspace(0, 1, 20_001, dtype=torch.float64))
    assert (torch.diff(sigma / alpha.clamp(min=1e-300)) > 0).all() and sigma[0] == 0
    assert (torch.diff(sigma).abs().max() < 0.05).item()  # continuous
    if not zero:
        kept = torch.tensor(betas, dtype=torch.float64).neg().add(1).cumprod(0)
        torch.testing.assert_close(discrete(torch.arange(1, len(betas) + 1).double() / len(betas))[0].square(), kept)


@pytest.mark.parametrize("betas", [[0.1, 0.0, 0.1], [0.1, -0.2, 0.1], [0.1, 0.2, 1.0], [0.1, float("nan"), 0.1], [0.1]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        Discrete(betas)


def test_preconditioning_is_edm():
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) with the coefficients of 2206.00364, table 1."""
    sigma_data, interpolant, seen = 0.5, Karras(), {}

    class Net(torch.nn.Module):
        def forward(self, x, clock, cond=None):
            seen.update(x=x, clock=clock)
            return torch.sin(x)

    x_t, t = torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.linspace(0, 1, 5, dtype=torch.float64)
    x_hat, eps_hat = Denoiser(Net(), interpolant, Preconditioned(sigma_data), NoiseLevel(interpolant))(x_t, t)
    sigma = interpolant(t)[1].view(-1, 1, 1, 1)
    total = sigma**2 + sigma_data**2
    expected = sigma_data**2 / total * x_t + sigma * sigma_data / total.sqrt() * torch.sin(x_t / total.sqrt())
    torch.testing.assert_close(x_hat, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(eps_hat, (x_t - x_hat) / sigma, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen["clock"], sigma.flatten().log() / 4)
    torch.testing.assert_close(seen["x"], x_t / total.sqrt())


@every_interpolant
def test_preconditioning_keeps_unit_variance(interpolant):
    x, eps = 0.5 * torch.randn(400, 1, 20, 20), torch.randn(400, 1, 20, 20)
    for time in (0.1, 0.5, 0.9):
        t = torch.tensor(time)
        row = Preconditioned(0.5)
        assert row.target(interpolant, x, eps, t).std().item() == pytest.approx(1, rel=0.02)
        assert row.read(interpolant, interpolant.mix(x, eps, t), t).std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clocks_round_trip(dtype):
    t = torch.arange(1, 1001, dtype=dtype) / 1000
    for clock in (Index(), Index(rounded=False), Scaled(1000.0), NoiseLevel(Karras()), NoiseLevel(VariancePreserving())):
        torch.testing.assert_close(clock.time(clock(t)), t, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-12)
    assert (Index()(t) == torch.arange(1000)).all()
    assert Index()(torch.tensor([0.0, 0.0004, 0.00151, 1.0])).tolist() == [0, 0, 1, 999]


@pytest.mark.parametrize(
    "prediction, interpolant, t",
    [
        (Data(), Linear(), 0.0),
        (Data(), VariancePreserving(), 0.0),
        (Noise(), Linear(), 1.0),
        (Noise(), Trigonometric(), 1.0),
        (Score(), Discrete.linear(zero_terminal_snr=True), 1.0),
        (Score(), Linear(), 0.0),
    ],
)
def test_a_singular_prediction_is_named(prediction, interpolant, t):
    zeros, times = torch.zeros(2, 1, 2, 2), torch.tensor([0.5, t])
    with pytest.raises(ValueError, match=rf"{type(prediction).__name__}\(\) is singular on .* at t = {t:g}"):
        prediction.solve(interpolant, zeros, zeros, times)


@pytest.mark.parametrize("t", [-0.1, 1.01, math.nan])
def test_a_time_outside_the_unit_interval_is_refused(t):
    class Net(torch.nn.Module):
        def forward(self, x_t, clock, cond=None):
            return x_t

    with pytest.raises(ValueError, match=r"t must lie in \[0, 1\]"):
        Denoiser(Net(), Linear(), Angular())(torch.zeros(2, 1, 2, 2), torch.tensor([0.5, t]))
