"""Pictures: every model can be drawn, closed forms are exact, one seed gives one file."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.exact import Mixture
from models.interpolant import Linear, Trigonometric, VarianceExploding
from models.prediction import NoisePrediction, Score, Velocity
from models.sampler import DDIM, Ancestral, RungeKutta4
from tests.examples import every_interpolant, every_prediction, public_samplers
from trainer.metrics.sample_distances import energy_distance
from trainer.toy import line, plane, train
from trainer.toy.picture import picture
from trainer.toy.train import SINGULAR_START, Normalised, Rectification, solvable_grid


@pytest.fixture
def tiny(monkeypatch):
    """Make pairs, batches, samples and paths of a picture few."""
    monkeypatch.setattr(train, "PAIRS", 64)
    monkeypatch.setattr(train, "BATCH", 32)
    monkeypatch.setattr(train, "FLOW_STEPS", 4)
    monkeypatch.setattr(plane, "FLOW_STEPS", 4)
    monkeypatch.setattr(plane, "SAMPLES", 64)
    monkeypatch.setattr(plane, "PATHS", 4)
    monkeypatch.setattr(line, "SAMPLES", 500)
    monkeypatch.setattr(line, "PATHS", 4)


def points(n=256):
    return torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(0))


# In the plane


@every_interpolant
@every_prediction
def test_every_model_is_trained_rectified_and_sampled(tiny, interpolant, prediction):
    model = Rectification(points(), interpolant, prediction, 2, 0)
    found = plane.make_row("after", model.student, model.noise(64, 1), points(64), DDIM, 2, 0)
    assert len(found.states) == 3
    for state in found.states + found.flow:
        assert np.isfinite(state).all()
    assert found.caption.startswith("after: NFE 2, ")


@pytest.mark.parametrize("sampler", public_samplers(), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("interpolant", "prediction"),
    [(Linear(), NoisePrediction()), (VarianceExploding(), Score())],
    ids=["Linear-Noise", "VarianceExploding-Score"],
)
def test_every_sampler_can_be_plotted(tiny, sampler, interpolant, prediction):
    model = Rectification(points(), interpolant, prediction, 2, 0)
    found = plane.make_row("before", model.teacher, model.noise(64, 1), points(64), sampler, 3, 0)
    assert len(found.states) == 4
    assert np.isfinite(found.states[-1]).all()


@every_interpolant
@every_prediction
def test_a_prediction_of_unit_variance_is_the_same_prediction(interpolant, prediction):
    """Both solve for the same (x, eps); target and input have unit scale at every noise level."""
    unit = Normalised(prediction)
    t = torch.rand(500, generator=torch.Generator().manual_seed(0)).clamp(0.02, 0.98).double()
    x, eps = torch.randn(2, 500, 2, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    y = unit.target(interpolant, x, eps, t)
    x_t = interpolant.mix(x, eps, t)
    assert y.square().mean().item() == pytest.approx(1, abs=0.2)
    assert unit.scale_input(interpolant, x_t, t).square().mean().item() == pytest.approx(1, abs=0.2)
    for found, wanted in zip(unit.solve(interpolant, y, x_t, t), (x, eps)):
        tolerance = 1e-6 * wanted.abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize(
    ("interpolant", "prediction", "first"),
    [(Linear(), Velocity(), 1), (Trigonometric(), NoisePrediction(), SINGULAR_START)],
    ids=["regular", "singular"],
)
def test_a_trajectory_starts_below_1_if_the_prediction_is_singular_at_1(
    interpolant, prediction, first
):
    denoiser = train.Denoiser(train.MLP(), interpolant, prediction)
    assert solvable_grid(denoiser, 2)[0] == first


def test_rectification_makes_one_step_enough():
    """In one step the student is much nearer to the data than its teacher.

    Its trajectories are nearly of first order.
    """
    mixture = Mixture(Linear(), [-1.5, 1.5], [0.2, 0.2], [0.5, 0.5])
    x = mixture.sample((4096, 2, 1, 1), torch.Generator())
    model = Rectification(x, Linear(), Velocity(), 120, 0)

    def one_step_distance(denoiser):
        found = plane.make_row("", denoiser, model.noise(1000, 1), x[:1000], DDIM, 1, 0)
        return energy_distance(torch.from_numpy(found.states[-1]), x[:1000].flatten(1))

    def order(denoiser):
        return plane.first_orderness(denoiser, model.noise(500, 2), steps=8)

    assert one_step_distance(model.student) < one_step_distance(model.teacher) / 4
    assert order(model.student) < order(model.teacher) / 2


# On the line


@pytest.mark.parametrize(
    "interpolant",
    [Linear(), Trigonometric(), VarianceExploding()],
    ids=lambda interpolant: type(interpolant).__name__,
)
def test_on_a_line_the_flow_keeps_quantiles(interpolant):
    """F_s^-1(F_t(x)) is the map of the probability-flow ODE: a fine solver ends at the same x."""
    exact = Mixture(interpolant, *line.MODES)
    _, sigma = interpolant(torch.tensor(0.98).double())
    start = torch.linspace(-2, 2, 9, dtype=torch.float64) * sigma
    sampler = RungeKutta4(48, np.linspace(0.98, 0.02, 49).tolist())
    solved = sampler.integrate(exact, start.view(-1, 1, 1, 1))[-1].flatten()
    np.testing.assert_allclose(line.flow(exact, start, 0.98, 0.02), solved.numpy(), atol=2e-4)


@pytest.fixture(scope="module")
def chain():
    """DDPM's chain of ten steps from N(0, 1)."""
    return line.make_chain_row(torch.randn(20_000, generator=torch.Generator().manual_seed(0)), 0)


def test_the_chain_of_ten_steps_does_not_reach_the_normal_distribution(chain):
    assert "0.3487" in chain.caption
    assert 0.9**10 == pytest.approx(0.3487, abs=5e-5)
    assert chain.states[0].std() == pytest.approx(1, abs=0.02)
    assert len(chain.states) == 11


def test_the_chain_of_ten_steps_is_more_exact_from_its_true_start(chain):
    """Much of the error of the samples comes from the start N(0, 1), which is not p_T."""
    exact = chain.exact
    eps = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    x = exact.sample((20_000,), torch.Generator().manual_seed(2))
    true_start = exact.interpolant.mix(x, eps, torch.tensor(1.0))
    _, distance = line.integrate(Ancestral(10), exact, eps, 0)
    _, true_distance = line.integrate(Ancestral(10), exact, true_start, 0)
    assert true_distance < distance / 2


def test_the_distance_to_the_mixture_is_how_far_samples_are_moved():
    exact = Mixture(Linear(), *line.MODES)
    x = exact.sample((50_000,), torch.Generator().manual_seed(0)).numpy()
    assert line.wasserstein(x, exact) < 0.02
    assert line.wasserstein(x + 0.3, exact) == pytest.approx(0.3, abs=0.02)


# The energy distance


def test_the_energy_distance_of_two_points_is_twice_their_distance():
    a = torch.zeros(3, 2)
    b = torch.tensor([[3.0, 4.0]])
    assert energy_distance(a, b) == pytest.approx(10)
    assert energy_distance(a, a) == 0


def test_the_energy_distance_of_a_distribution_to_itself_is_small_and_grows_with_a_shift():
    x, y = torch.randn(2, 2000, 2, generator=torch.Generator().manual_seed(0))
    assert 0 <= energy_distance(x, y) < 0.01
    assert 0.01 < energy_distance(x, y + 0.5) < energy_distance(x, y + 1)


# The file


@pytest.mark.parametrize("data", ["eight_gaussians", "two_modes"])
def test_one_seed_is_one_file(tiny, tmp_path, data):
    first = tmp_path / "a.png"
    second = tmp_path / "b.png"
    picture(first, data, steps=2, updates=2)
    picture(second, data, steps=2, updates=2)
    assert first.read_bytes() == second.read_bytes()
    assert min(Image.open(first).size) > 400
    assert not list(tmp_path.glob(".*"))
