"""Windows of time: states that are straight in each, and the noise of each."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from models.description import build, describe
from models.interpolant import Linear, VariancePreserving
from models.prediction import NoisePrediction, Velocity
from models.sampler import DDIM, window_edges, window_grid
from models.windows import Piecewise, WindowNoise, window
from tests.examples import INTERPOLANTS, every_interpolant
from tests.helpers.refusals import refused

WINDOW_EDGES = [1.0, 0.7, 0.45, 0.2, 0.0]
every_window = pytest.mark.parametrize(("start", "end"), list(pairwise(WINDOW_EDGES)))


class Chord(NamedTuple):
    """Data, noise and the states at both ends s and e of a window; t lies inside it."""

    x: Tensor
    eps: Tensor
    s: Tensor
    e: Tensor
    t: Tensor
    x_s: Tensor
    x_e: Tensor


def chord(interpolant, start, end) -> Chord:
    """Return a chord between two times, in float64."""
    x, eps = torch.randn(2, 5, 2, 3, 3, dtype=torch.float64)
    s = torch.full((5,), start, dtype=torch.float64)
    e = torch.full((5,), end, dtype=torch.float64)
    t = e + (s - e) * torch.linspace(0.1, 1, 5, dtype=torch.float64)
    return Chord(x, eps, s, e, t, interpolant.mix(x, eps, s), interpolant.mix(x, eps, e))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [3, 4, 7])
def test_an_edge_belongs_to_the_window_below_it_however_it_is_rounded(count, dtype):
    for i in range(count):
        t = torch.tensor([1 - i / count, (count - i) / count], dtype=dtype)
        s, e = window(t, window_edges(count))
        assert (s - t).abs().max() < 1e-6
        assert (e - (1 - (i + 1) / count)).abs().max() < 1e-6


@every_interpolant
def test_on_the_edges_the_interpolant_is_unchanged(interpolant):
    piecewise = Piecewise(interpolant, WINDOW_EDGES)
    times = torch.tensor(WINDOW_EDGES, dtype=torch.float64)
    found = torch.stack(piecewise(times))
    torch.testing.assert_close(found, torch.stack(interpolant(times)), rtol=0, atol=0)


@every_interpolant
@every_window
def test_between_the_edges_states_are_straight(interpolant, start, end):
    piecewise = Piecewise(interpolant, WINDOW_EDGES)
    x, eps, s, e, t, x_s, x_e = chord(interpolant, start, end)
    part = ((s - t) / (s - e)).view(-1, 1, 1, 1)
    expected = x_s + part * (x_e - x_s)
    torch.testing.assert_close(piecewise.mix(x, eps, t), expected, rtol=1e-9, atol=1e-9)


@every_interpolant
def test_signal_to_noise_falls(interpolant):
    piecewise = Piecewise(interpolant, WINDOW_EDGES)
    alpha, sigma = piecewise(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
    assert (torch.diff(torch.log(alpha / sigma)) < 0).all()


@every_interpolant
def test_time_is_found_from_alpha_and_sigma(interpolant):
    piecewise = Piecewise(interpolant, WINDOW_EDGES)
    t = torch.linspace(0.003, 0.997, 50, dtype=torch.float64)
    alpha, sigma = piecewise(t)
    torch.testing.assert_close(piecewise.time_of_snr(alpha, sigma), t, rtol=0, atol=1e-12)


@every_interpolant
@every_window
def test_velocity_in_a_window_is_the_slope_of_the_chord(interpolant, start, end):
    """(x_s - x_e) / (s - e)."""
    piecewise = Piecewise(interpolant, WINDOW_EDGES)
    x, eps, s, e, t, x_s, x_e = chord(interpolant, start, end)
    slope = (x_s - x_e) / (s - e).view(-1, 1, 1, 1)
    found = Velocity().target(piecewise, x, eps, t)
    torch.testing.assert_close(found, slope, rtol=1e-8, atol=1e-8)


@every_interpolant
@every_window
def test_noise_in_a_window_is_the_published_target(interpolant, start, end):
    """z_e = l z_s + h eps, solved for eps, with the l and h of PeRFlow's scheduler."""
    piecewise = Piecewise(interpolant, WINDOW_EDGES)
    x, eps, s, e, t, x_s, x_e = chord(interpolant, start, end)
    alpha_s, sigma_s = (value.view(-1, 1, 1, 1) for value in interpolant(s))
    alpha_e, sigma_e = (value.view(-1, 1, 1, 1) for value in interpolant(e))
    if alpha_s.min() < 1e-3:
        return  # l is infinite
    ratio = alpha_e / alpha_s
    # The plain noise, and that of the window: on VP h = -sqrt(1 - g^2) / g, g = 1 / ratio.
    plain_h = sigma_e - ratio * sigma_s
    window_h = -(((ratio * sigma_s) ** 2 - sigma_e**2).sqrt())
    for prediction, h in ((NoisePrediction(), plain_h), (WindowNoise(WINDOW_EDGES), window_h)):
        found = prediction.target(piecewise, x, eps, t)
        expected = (x_e - ratio * x_s) / h
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_window_noise_on_variance_preserving_has_the_published_factor():
    """PeRFlow's diff_eps."""
    interpolant = VariancePreserving()
    s = torch.tensor(0.7, dtype=torch.float64)
    e = torch.tensor(0.45, dtype=torch.float64)
    x, eps = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    x_s = interpolant.mix(x, eps, s)
    x_e = interpolant.mix(x, eps, e)
    g = (interpolant(s)[0] / interpolant(e)[0]).item()
    published = (x_e - x_s / g) / (-((1 - g**2) ** 0.5) / g)
    found = WindowNoise(WINDOW_EDGES).target(interpolant, x, eps, s)
    torch.testing.assert_close(found, published)


@pytest.mark.parametrize(
    "example",
    [
        Piecewise(VariancePreserving(), WINDOW_EDGES),
        Piecewise(Linear()),
        WindowNoise(3),
        WindowNoise(WINDOW_EDGES),
    ],
    ids=repr,
)
def test_windows_are_rebuilt_from_their_description(example):
    assert repr(build(describe(example))) == repr(example)


every_count = pytest.mark.parametrize("steps", [4, 5, 7, 8, 30])


@every_count
def test_a_grid_contains_every_edge(steps):
    times = window_grid(steps, WINDOW_EDGES)
    assert DDIM(steps, times).times == times
    assert set(WINDOW_EDGES) <= set(times)


@every_count
def test_windows_have_nearly_equal_numbers_of_steps(steps):
    times = window_grid(steps, WINDOW_EDGES)
    counts = [sum(end <= t < start for t in times) for start, end in pairwise(WINDOW_EDGES)]
    assert max(counts) - min(counts) <= 1


@every_count
def test_a_grid_through_one_window_is_uniform(steps):
    assert window_grid(steps, 1) == pytest.approx(window_edges(steps))


def test_a_grid_of_one_step_per_window_is_the_edges():
    assert window_grid(4, WINDOW_EDGES) == WINDOW_EDGES


@pytest.mark.parametrize(
    ("windows", "named"),
    [
        (0, ["windows", 0]),
        ([1.0, 0.5], ["windows", [1.0, 0.5], "[0, 1]"]),
        ([0.9, 0.5, 0.0], ["windows", [0.9, 0.5, 0.0], "[0, 1]"]),
        ([1.0, 0.5, 0.5, 0.0], ["windows", [1.0, 0.5, 0.5, 0.0], "[0, 1]"]),
        ([0.0, 0.5, 1.0], ["windows", [0.0, 0.5, 1.0], "[0, 1]"]),
        ([1.0], ["windows", [1.0], "[0, 1]"]),
        ([1.0, float("nan"), 0.0], ["windows", "[1.0, nan, 0.0]", "[0, 1]"]),
    ],
    ids=["zero", "no-last", "no-first", "flat", "rising", "one-edge", "nan"],
)
@pytest.mark.parametrize(
    "make",
    [
        window_edges,
        WindowNoise,
        lambda windows: Piecewise(Linear(), windows),
        lambda windows: window_grid(9, windows),
    ],
    ids=["edges", "window-noise", "piecewise", "grid"],
)
def test_windows_that_do_not_cover_all_times_are_refused(make, windows, named):
    with refused(*named):
        make(windows)


def test_fewer_steps_than_windows_are_refused():
    with refused("steps", 3, "windows", WINDOW_EDGES):
        window_grid(3, WINDOW_EDGES)


def test_examples_of_interpolants_include_windows():
    assert any(isinstance(example, Piecewise) for example in INTERPOLANTS)
