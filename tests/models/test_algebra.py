"""Interpolants and predictions: conversions, derivatives, and broadcasting of t."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from models.denoiser import Denoiser
from models.interpolant import (
    Discrete,
    EDMPath,
    ImprovedCosine,
    Interpolant,
    Linear,
    Shifted,
    SubVariancePreserving,
    Trigonometric,
    VarianceExploding,
    VariancePreserving,
)
from models.prediction import (
    Data,
    EDMPreconditioned,
    NoisePrediction,
    Prediction,
    Score,
    Velocity,
    VPrediction,
)
from models.time_input import NoiseLevel, ScaledTime, TimestepIndex
from tests.examples import (
    INTERPOLANTS,
    PREDICTIONS,
    every_interpolant,
    every_prediction,
    public_subclasses,
)
from tests.helpers.refusals import refused

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}


def test_every_interpolant_has_an_example():
    assert {type(example) for example in INTERPOLANTS} == set(public_subclasses(Interpolant))


def test_every_prediction_has_an_example():
    assert {type(example) for example in PREDICTIONS} == set(public_subclasses(Prediction))


@every_interpolant
@every_prediction
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_conversions_round_trip(interpolant, prediction, dtype):
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 64, 3, 5, 5, generator=generator, dtype=dtype)
    t = torch.linspace(0.02, 0.98, 64, dtype=dtype)
    y = prediction.target(interpolant, x, eps, t)
    x_t = interpolant.mix(x, eps, t)
    x_hat, eps_hat = prediction.solve(interpolant, y, x_t, t)
    # Rounding errors grow with the condition number of the 2 x 2 system.
    state = torch.stack(interpolant(t.double()))
    output = torch.stack(prediction.coefficients(interpolant, t.double()))
    condition = torch.linalg.cond(torch.stack([state, output]).permute(2, 0, 1))
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    size = 5 * max(1.0, y.abs().max().item())
    bound = rounding * condition.view(-1, 1, 1, 1) * size
    assert ((x_hat - x).abs() <= bound).all()
    assert ((eps_hat - eps).abs() <= bound).all()


@every_interpolant
def test_derivatives_are_finite_differences(interpolant):
    # Discrete is not smooth at its knots, which are 1e-3 apart: these times avoid them.
    t = torch.linspace(0.05037, 0.95037, 91, dtype=torch.float64)
    h = 1e-5
    for derivative, ahead, behind in zip(
        interpolant.derivatives(t), interpolant(t + h), interpolant(t - h)
    ):
        difference = (ahead - behind) / (2 * h)
        torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-8)


@every_interpolant
def test_derivatives_accept_an_expanded_time(interpolant):
    t = torch.tensor(0.3)
    expanded = interpolant.derivatives(t.expand(4))[0]
    torch.testing.assert_close(expanded, interpolant.derivatives(t)[0].expand(4))


@every_interpolant
def test_signal_to_noise_falls(interpolant):
    alpha, sigma = interpolant(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
    assert (torch.diff(torch.log(alpha / sigma)) < 0).all()


def test_variance_preserving_sigma_is_accurate_near_data():
    t = torch.tensor(1e-4)
    sigma = VariancePreserving()(t)[1].item()
    exact = math.sqrt(-math.expm1(-(19.9 * 1e-4**2 / 2 + 0.1 * 1e-4)))
    assert sigma == pytest.approx(exact, rel=1e-6)


@every_interpolant
@every_prediction
def test_time_is_broadcast_along_the_batch_axis_only(interpolant, prediction):
    """t of shape (B,) with B == W gives each sample its time."""
    x, eps = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    x_t = interpolant.mix(x, eps, t)
    y = prediction.target(interpolant, x, eps, t)
    for i in range(4):
        torch.testing.assert_close(x_t[i], interpolant.mix(x[i], eps[i], t[i]))
        torch.testing.assert_close(y[i], prediction.target(interpolant, x[i], eps[i], t[i]))


def test_velocity_on_linear_is_flow_matching():
    x, eps = torch.randn(2, 3, 1, 2, 2)
    torch.testing.assert_close(Velocity().target(Linear(), x, eps, torch.rand(3)), eps - x)


def spread_out_samples():
    """Return data, noise and times from 0.1 to 0.9, in float64."""
    x, eps = torch.randn(2, 8, 1, 2, 2, dtype=torch.float64)
    return x, eps, torch.linspace(0.1, 0.9, 8, dtype=torch.float64)


@every_interpolant
def test_velocity_is_a_combination_of_state_and_data(interpolant):
    """u = (sigma'/sigma) x_t + (D/sigma) x with D = alpha' sigma - alpha sigma'."""
    x, eps, t = spread_out_samples()
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in interpolant(t))
    d_alpha, d_sigma = (value.view(-1, 1, 1, 1) for value in interpolant.derivatives(t))
    x_t = alpha * x + sigma * eps
    determinant = d_alpha * sigma - alpha * d_sigma
    expected = d_sigma / sigma * x_t + determinant / sigma * x
    torch.testing.assert_close(Velocity().target(interpolant, x, eps, t), expected)


@every_interpolant
def test_score_is_the_scaled_noise(interpolant):
    """score = -eps / sigma."""
    x, eps, t = spread_out_samples()
    sigma = interpolant(t)[1].view(-1, 1, 1, 1)
    score = Score().target(interpolant, x, eps, t)
    torch.testing.assert_close(score * -sigma, NoisePrediction().target(interpolant, x, eps, t))


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (Linear, {"sigma_min": -0.1}),
        (Linear, {"sigma_min": 1.0}),
        (VariancePreserving, {"beta_min": 2.0, "beta_max": 1.0}),
        (SubVariancePreserving, {"beta_min": 0.0, "beta_max": 1.0}),
        (VarianceExploding, {"sigma_min": 0.0}),
        (VarianceExploding, {"sigma_min": 2.0, "sigma_max": 1.0}),
        (VarianceExploding, {"sigma_max": math.nan}),
        (ImprovedCosine, {"s": 0.0}),
        (EDMPath, {"sigma_min": -1.0}),
        (EDMPath, {"rho": 0.0}),
        (Shifted, {"shift": 0.0}),
        (Shifted, {"shift": math.nan}),
    ],
)
def test_impossible_interpolants_are_refused(cls, arguments):
    inner = {"interpolant": Linear()} if cls is Shifted else {}
    with refused(cls.__name__, *arguments.keys(), *arguments.values()):
        cls(**inner, **arguments)


def test_a_shift_applied_twice_is_refused():
    shifted = Shifted(Linear(), 3.0)
    with refused("Shifted", repr(shifted)):
        Shifted(shifted, 2.0)


def test_a_shift_adds_to_the_logit():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    later = torch.sigmoid(torch.logit(t) + math.log(3.0))
    torch.testing.assert_close(Shifted(Linear(), 3.0)(t), Linear()(later))


def test_a_shift_keeps_both_ends():
    ends = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(Shifted(Linear(), 3.0)(ends), Linear()(ends))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_interpolant
def test_time_is_found_from_alpha_and_sigma(interpolant, dtype):
    """Also where sigma or alpha is zero, for multiples of (alpha, sigma), and for any shape."""
    near_data = torch.tensor([0.0, 1e-4])
    times = torch.cat([near_data, torch.linspace(0.01, 0.95, 95), torch.tensor([1.0])])
    t = times.to(dtype).view(2, -1)
    alpha, sigma = interpolant(t)
    found = interpolant.time_of_snr(3 * alpha, 3 * sigma)
    assert found.dtype == dtype
    assert ((0 <= found) & (found <= 1)).all()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(found, t, rtol=0, atol=tolerance)
    torch.testing.assert_close(interpolant.time_of_snr(alpha[0, 5], sigma[0, 5]), found[0, 5])


@pytest.mark.parametrize(
    "interpolant", [VariancePreserving(), VarianceExploding(), EDMPath()], ids=repr
)
def test_a_ratio_outside_the_range_gives_the_nearer_end(interpolant):
    one = torch.ones(1)
    zero = torch.zeros(1)
    assert interpolant.time_of_snr(zero, one) == 1
    assert interpolant.time_of_snr(one, zero) == 0


def test_sub_variance_preserving_is_the_square_of_sigma():
    t = torch.logspace(-6, 0, 50)
    alpha, sigma = SubVariancePreserving()(t)
    torch.testing.assert_close(alpha, VariancePreserving()(t)[0])
    torch.testing.assert_close(sigma.sqrt(), VariancePreserving()(t)[1])


def test_improved_cosine_is_the_textbook_one():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    first = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    alphas_cumprod = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square() / first
    alpha, sigma = ImprovedCosine()(t)
    torch.testing.assert_close(alpha.square(), alphas_cumprod)
    torch.testing.assert_close(sigma.square(), 1 - alphas_cumprod)


def test_improved_cosine_ends_without_signal():
    assert ImprovedCosine()(torch.tensor(1.0))[0] == 0


def test_karras_path_is_the_rho_grid():
    """Karras et al. 2022 (arXiv 2206.00364), eq. 5."""
    n = 18
    rho = 7.0
    i = torch.arange(n, dtype=torch.float64)
    largest = 80 ** (1 / rho)
    smallest = 0.002 ** (1 / rho)
    grid = (largest + i / (n - 1) * (smallest - largest)) ** rho
    torch.testing.assert_close(EDMPath()(1 - i / (n - 1))[1], grid)


def test_variance_exploding_is_geometric():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    sigma = VarianceExploding(0.01, 50.0)(t)[1]
    expected = torch.tensor([0.01, math.sqrt(0.5), 50.0], dtype=torch.float64)
    torch.testing.assert_close(sigma, expected)


SCHEDULES = [Discrete.linear, Discrete.scaled_linear, Discrete.squaredcos_cap_v2]


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.__name__)
def test_discrete_is_diffusers_schedule(schedule, zero_terminal_snr):
    scheduler = DDPMScheduler(
        beta_schedule=schedule.__name__, rescale_betas_zero_snr=zero_terminal_snr
    )
    interpolant = schedule(zero_terminal_snr=zero_terminal_snr)
    alpha, sigma = interpolant(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    # diffusers multiplies 1000 float32 numbers.
    expected = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(alpha.square(), expected, rtol=2e-5, atol=1e-6)
    ones = torch.ones(1000, dtype=torch.float64)
    torch.testing.assert_close(alpha.square() + sigma.square(), ones)


def test_stable_diffusion_keeps_signal_at_the_end():
    one = torch.ones((), dtype=torch.float64)
    alpha = Discrete.scaled_linear(**STABLE_DIFFUSION)(one)[0]
    assert alpha.square().item() == pytest.approx(0.00466, abs=5e-6)


def test_zero_terminal_snr_ends_in_pure_noise():
    one = torch.ones((), dtype=torch.float64)
    alpha, sigma = Discrete.scaled_linear(**STABLE_DIFFUSION, zero_terminal_snr=True)(one)
    assert alpha == 0
    assert sigma == 1


ANY_BETAS = [
    [0.1] * 10,
    [0.5, 0.001, 0.9, 0.01, 0.3],
    torch.rand(50).mul(0.5).add(1e-6).tolist(),
]
any_betas = pytest.mark.parametrize("betas", ANY_BETAS, ids=["equal", "jagged", "random"])


@any_betas
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_discrete_falls_continuously_to_data_for_any_betas(betas, zero_terminal_snr):
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    alpha, sigma = Discrete(betas, zero_terminal_snr)(t)
    assert (torch.diff(sigma / alpha.clamp(min=1e-300)) > 0).all()
    assert sigma[0] == 0
    assert torch.diff(sigma).abs().max() < 0.05


@any_betas
def test_discrete_passes_through_the_products_of_any_betas(betas):
    t = torch.arange(1, len(betas) + 1).double() / len(betas)
    products = torch.tensor(betas, dtype=torch.float64).neg().add(1).cumprod(0)
    torch.testing.assert_close(Discrete(betas)(t)[0].square(), products)


@pytest.mark.parametrize(
    ("betas", "named"),
    [
        ([0.1, 0.0, 0.1], ["betas[1]", 0.0]),
        ([0.1, -0.2, 0.1], ["betas[1]", -0.2]),
        ([0.1, 0.2, 1.0], ["betas[2]", 1.0, "zero_terminal_snr"]),
        ([0.1, math.nan, 0.1], ["betas[1]", math.nan]),
        ([0.1], ["betas", 1, "Discrete.scaled_linear()"]),
    ],
    ids=["zero", "negative", "one", "nan", "too-few"],
)
def test_impossible_betas_are_refused(betas, named):
    with refused("Discrete", *named):
        Discrete(betas)


class SineNetwork(torch.nn.Module):
    """A network that returns the sine of its input and keeps what it was called with."""

    def forward(self, x, time, cond=None):
        self.x = x
        self.time = time
        return torch.sin(x)


def test_preconditioning_has_the_published_coefficients():
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

    The coefficients are those of Karras et al. 2022 (arXiv 2206.00364), table 1.
    """
    sigma_data = 0.5
    interpolant = EDMPath()
    net = SineNetwork()
    denoiser = Denoiser(net, interpolant, EDMPreconditioned(sigma_data), NoiseLevel(interpolant))
    x_t = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    x_hat, eps_hat = denoiser(x_t, t)
    # The paper's formulas.
    sigma = interpolant(t)[1].view(-1, 1, 1, 1)
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / total
    c_out = sigma * sigma_data / total.sqrt()
    expected = c_skip * x_t + c_out * torch.sin(x_t / total.sqrt())
    torch.testing.assert_close(x_hat, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(eps_hat, (x_t - x_hat) / sigma, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net.time, sigma.flatten().log() / 4)
    torch.testing.assert_close(net.x, x_t / total.sqrt())


@every_interpolant
def test_preconditioning_keeps_unit_variance(interpolant):
    """Both of the network's target and of its input."""
    x = 0.5 * torch.randn(400, 1, 20, 20)
    eps = torch.randn(400, 1, 20, 20)
    prediction = EDMPreconditioned(0.5)
    for time in (0.1, 0.5, 0.9):
        t = torch.tensor(time)
        target = prediction.target(interpolant, x, eps, t)
        inputs = prediction.scale_input(interpolant, interpolant.mix(x, eps, t), t)
        assert target.std().item() == pytest.approx(1, rel=0.02)
        assert inputs.std().item() == pytest.approx(1, rel=0.02)


TIME_INPUTS = {
    "index": TimestepIndex(),
    "index-unrounded": TimestepIndex(rounded=False),
    "scaled": ScaledTime(1000.0),
    "noise-level-karras": NoiseLevel(EDMPath()),
    "noise-level-vp": NoiseLevel(VariancePreserving()),
}


def time_of(time_input, value):
    """Return the t of a network's input."""
    if isinstance(time_input, ScaledTime):
        return value / 1000
    if isinstance(time_input, TimestepIndex):
        return (value + 1) / 1000
    return time_input.interpolant.time_of_snr(torch.ones_like(value), (4 * value).exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time_input", TIME_INPUTS.values(), ids=TIME_INPUTS)
def test_time_inputs_are_one_to_one(time_input, dtype):
    t = torch.arange(1, 1001, dtype=dtype) / 1000
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(time_of(time_input, time_input(t)), t, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_input_index_counts_the_steps_of_the_chain(dtype):
    t = torch.arange(1, 1001, dtype=dtype) / 1000
    assert (TimestepIndex()(t) == torch.arange(1000)).all()


def test_time_input_index_is_the_nearest_one():
    assert TimestepIndex()(torch.tensor([0.0, 0.0004, 0.00151, 1.0])).tolist() == [0, 0, 1, 999]


@pytest.mark.parametrize(
    ("prediction", "interpolant", "t"),
    [
        (Data(), Linear(), 0.0),
        (Data(), VariancePreserving(), 0.0),
        (NoisePrediction(), Linear(), 1.0),
        (NoisePrediction(), Trigonometric(), 1.0),
        (Score(), Discrete.linear(zero_terminal_snr=True), 1.0),
        (Score(), Linear(), 0.0),
    ],
)
def test_a_singular_prediction_is_refused(prediction, interpolant, t):
    zeros = torch.zeros(2, 1, 2, 2)
    times = torch.tensor([0.5, t])
    with refused(repr(prediction), repr(interpolant), f"t = {t:g}"):
        prediction.solve(interpolant, zeros, zeros, times)


@pytest.mark.parametrize("t", [-0.1, 1.01, math.nan])
def test_a_time_outside_the_unit_interval_is_refused(t):
    denoiser = Denoiser(SineNetwork(), Linear(), VPrediction())
    with refused("[0, 1]", f"{t:g}"):
        denoiser(torch.zeros(2, 1, 2, 2), torch.tensor([0.5, t]))
