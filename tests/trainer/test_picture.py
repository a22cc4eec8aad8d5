"""Pictures: every form is trained and walked, what is drawn as a closed form is one, and a seed is a file."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from models.exact import Mixture
from models.interpolant import Linear, Trigonometric, VarianceExploding
from models.prediction import Noise, Score, Velocity
from models.sampler import DDIM, Ancestral, RungeKutta4, Sampler
from tests.forms import every_interpolant, every_prediction
from trainer.evaluate.measures import energy
from trainer.picture import line, picture, plane, train
from trainer.picture.train import BELOW, Rectification, Unit, grid


@pytest.fixture
def tiny(monkeypatch):
    """Make everything that a picture counts small."""
    monkeypatch.setattr(train, "PAIRS", 64)
    monkeypatch.setattr(train, "BATCH", 32)
    for module in (train, plane):
        monkeypatch.setattr(module, "FINE", 4)
    for module, samples in ((plane, 64), (line, 500)):
        monkeypatch.setattr(module, "SAMPLES", samples)
        monkeypatch.setattr(module, "PATHS", 4)


def points(n=256):
    return torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(0))


@every_interpolant
@every_prediction
def test_every_form_is_trained_rectified_and_walked(tiny, interpolant, prediction):
    model = Rectification(points(), interpolant, prediction, 2, 0)
    row = plane.walked("after", model.student, model.noise(64, 1), points(64), DDIM, 2, 0)
    assert len(row.states) == 3 and all(np.isfinite(state).all() for state in row.states + row.fine)
    assert row.said.startswith("after: NFE 2, ")


SAMPLERS = [cls for cls in Sampler.__subclasses__() if not inspect.isabstract(cls) and cls.__module__.startswith("models.")]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("form", [(Linear(), Noise()), (VarianceExploding(), Score())], ids=repr)
def test_every_sampler_is_walked(tiny, sampler, form):
    model = Rectification(points(), *form, 2, 0)
    row = plane.walked("before", model.teacher, model.noise(64, 1), points(64), sampler, 3, 0)
    assert len(row.states) == 4 and np.isfinite(row.states[-1]).all()


@every_interpolant
@every_prediction
def test_a_unit_row_is_the_row(interpolant, prediction):
    """What solves one solves the other, and the target is of unit scale at every level of noise."""
    t, unit = torch.rand(500, generator=torch.Generator().manual_seed(0)).clamp(0.02, 0.98).double(), Unit(prediction)
    x, eps = torch.randn(2, 500, 2, 1, 1, generator=torch.Generator().manual_seed(1)).double()
    y, x_t = unit.target(interpolant, x, eps, t), interpolant.mix(x, eps, t)
    assert y.square().mean().item() == pytest.approx(1, abs=0.2)
    assert unit.read(interpolant, x_t, t).square().mean().item() == pytest.approx(1, abs=0.2)
    for found, wanted in zip(unit.solve(interpolant, y, x_t, t), (x, eps)):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())


def test_a_walk_begins_where_the_row_allows():
    net = train.MLP()
    first = {form: grid(train.Denoiser(net, *form), 2)[0] for form in [(Linear(), Velocity()), (Trigonometric(), Noise())]}
    assert list(first.values()) == [1, BELOW]


def test_rectification_makes_few_steps_enough():
    """One step: the student is much nearer to the law than its teacher, and its trajectories are nearly of first order."""
    x = Mixture(Linear(), [-1.5, 1.5], [0.2, 0.2], [0.5, 0.5]).sample((4096, 2, 1, 1), torch.Generator())
    model = Rectification(x, Linear(), Velocity(), 120, 0)
    rows = [plane.walked("", d, model.noise(1000, 1), x[:1000], DDIM, 1, 0) for d in (model.teacher, model.student)]
    before, after = (energy(torch.from_numpy(row.states[-1]), x[:1000].flatten(1)) for row in rows)
    assert after < before / 4
    orders = [plane.first_orderness(d, model.noise(500, 2), steps=8) for d in (model.teacher, model.student)]
    assert orders[1] < orders[0] / 2


def test_on_a_line_the_flow_keeps_its_share():
    """F_s^-1(F_t(x)) is the probability-flow ODE's own map: a fine solver arrives there."""
    for interpolant in (Linear(), Trigonometric(), VarianceExploding()):
        exact = Mixture(interpolant, *line.MODES)
        start = torch.linspace(-2, 2, 9, dtype=torch.float64) * interpolant(torch.tensor(0.98).double())[1]
        walked = RungeKutta4(48, np.linspace(0.98, 0.02, 49).tolist()).walk(exact, start.view(-1, 1, 1, 1))[-1].flatten()
        np.testing.assert_allclose(line.flow(exact, start, 0.98, 0.02), walked.numpy(), atol=2e-4)


def test_the_chain_of_ten_steps_has_not_reached_the_normal():
    row = line.chain(torch.randn(20_000, generator=torch.Generator().manual_seed(0)), 0)
    assert "alphas_cumprod = 0.3487 there" in row.said and 0.9**10 == pytest.approx(0.3487, abs=5e-5)
    assert row.states[0].std() == pytest.approx(1, abs=0.02) and len(row.states) == 11
    eps = torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    x = row.exact.sample((20_000,), torch.Generator().manual_seed(2))
    starts = eps, row.exact.interpolant.mix(x, eps, torch.tensor(1.0))
    far, near = (line.carried(Ancestral(10), row.exact, start, 0)[1] for start in starts)
    assert near < far / 2, "what is left at T = 10 is the start's fault"


def test_the_distance_to_the_mixture_is_how_far_samples_are_moved():
    exact = Mixture(Linear(), *line.MODES)
    x = exact.sample((50_000,), torch.Generator().manual_seed(0)).numpy()
    assert line.wasserstein(x, exact) < 0.02
    assert line.wasserstein(x + 0.3, exact) == pytest.approx(0.3, abs=0.02)


def test_energy_distance_of_points():
    """It is 2 |a - b| between two points, next to nothing for one law twice, and grows with a shift."""
    a, b = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]])
    assert energy(a, b) == pytest.approx(10) and energy(a, a) == 0
    x, y = torch.randn(2, 2000, 2, generator=torch.Generator().manual_seed(0))
    assert 0 <= energy(x, y) < 0.01 < energy(x, y + 0.5) < energy(x, y + 1)


@pytest.mark.parametrize("data", ["eight_gaussians", "two_modes"])
def test_one_seed_is_one_file(tiny, tmp_path, data):
    for name in "ab":
        picture(tmp_path / f"{name}.png", data, steps=2, updates=2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert min(Image.open(tmp_path / "a.png").size) > 400 and not list(tmp_path.glob(".*"))
