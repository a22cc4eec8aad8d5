"""Windows of time: states that are straight in each, and the noise of each."""

import pytest
import torch

from models.interpolant import Linear, VariancePreserving
from models.prediction import Noise, Velocity
from models.sampler import DDIM, edges, through
from models.teacher import build, describe
from models.windows import Piecewise, WindowNoise, window
from tests.forms import INTERPOLANTS, every_interpolant

EDGES = [1.0, 0.7, 0.45, 0.2, 0.0]


def chord(interpolant, s, e):
    """Return the states of data and noise at both ends of a window, and at a time inside, in float64."""
    x, eps = torch.randn(2, 5, 2, 3, 3, dtype=torch.float64)
    s, e = (torch.full((5,), end, dtype=torch.float64) for end in (s, e))
    t = e + (s - e) * torch.linspace(0.1, 1, 5, dtype=torch.float64)
    return x, eps, s, e, t, interpolant.mix(x, eps, s), interpolant.mix(x, eps, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_edge_belongs_to_the_window_below_it_however_it_was_rounded(dtype):
    for count in (3, 4, 7):
        for i in range(count):
            t = torch.tensor([1 - i / count, (count - i) / count], dtype=dtype)
            s, e = window(t, edges(count))
            assert (s - t).abs().max() < 1e-6 and (e - (1 - (i + 1) / count)).abs().max() < 1e-6


@every_interpolant
def test_states_are_straight_between_the_edges_and_the_interpolants_own_on_them(interpolant):
    straight, ends = Piecewise(interpolant, EDGES), torch.tensor(EDGES, dtype=torch.float64)
    torch.testing.assert_close(torch.stack(straight(ends)), torch.stack(interpolant(ends)), rtol=0, atol=0)
    for s, e in zip(EDGES[:-1], EDGES[1:]):
        x, eps, s, e, t, x_s, x_e = chord(interpolant, s, e)
        part = ((s - t) / (s - e)).view(-1, 1, 1, 1)
        torch.testing.assert_close(straight.mix(x, eps, t), x_s + part * (x_e - x_s), rtol=1e-9, atol=1e-9)
    alpha, sigma = straight(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
    assert (torch.diff(torch.log(alpha / sigma)) < 0).all()
    t = torch.linspace(0.003, 0.997, 50, dtype=torch.float64)
    torch.testing.assert_close(straight.time(*straight(t)), t, rtol=0, atol=1e-12)


@every_interpolant
def test_rows_in_a_window_are_the_papers_targets(interpolant):
    """Velocity (x_s - x_e) / (s - e); and z_e = l z_s + h eps, solved for eps, with the l and h of PeRFlow's scheduler."""
    straight = Piecewise(interpolant, EDGES)
    for s, e in zip(EDGES[:-1], EDGES[1:]):
        x, eps, s, e, t, x_s, x_e = chord(interpolant, s, e)
        secant = (x_s - x_e) / (s - e).view(-1, 1, 1, 1)
        torch.testing.assert_close(Velocity().target(straight, x, eps, t), secant, rtol=1e-8, atol=1e-8)
        (alpha_s, sigma_s), (alpha_e, sigma_e) = ([v.view(-1, 1, 1, 1) for v in interpolant(end)] for end in (s, e))
        if alpha_s.min() < 1e-3:
            continue  # there l is infinite
        ratio = alpha_e / alpha_s
        for row, h in (
            (Noise(), sigma_e - ratio * sigma_s),
            (WindowNoise(EDGES), -(((ratio * sigma_s) ** 2 - sigma_e**2).sqrt())),  # on VP -sqrt(1 - g^2) / g, g = 1 / ratio
        ):
            torch.testing.assert_close(row.target(straight, x, eps, t), (x_e - ratio * x_s) / h, rtol=1e-6, atol=1e-6)


def test_diff_eps_on_a_variance_preserving_window_is_the_published_factor():
    s, e = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.45, dtype=torch.float64)
    g = (VariancePreserving()(s)[0] / VariancePreserving()(e)[0]).item()
    x, eps = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    x_s, x_e = (VariancePreserving().mix(x, eps, end) for end in (s, e))
    published = (x_e - x_s / g) / (-((1 - g**2) ** 0.5) / g)
    torch.testing.assert_close(WindowNoise(EDGES).target(VariancePreserving(), x, eps, s), published)


def test_they_are_described_and_built_again():
    for thing in (Piecewise(VariancePreserving(), EDGES), Piecewise(Linear()), WindowNoise(3), WindowNoise(EDGES)):
        assert repr(build(describe(thing))) == repr(thing)


@pytest.mark.parametrize("steps", [4, 5, 7, 8, 30])
def test_every_edge_is_stepped_on(steps):
    times = through(steps, EDGES)
    assert DDIM(steps, times).times == times and set(EDGES) <= set(times)
    counts = [sum(e <= t < s for t in times) for s, e in zip(EDGES[:-1], EDGES[1:])]
    assert max(counts) - min(counts) <= 1
    assert through(steps, 1) == pytest.approx(edges(steps)) and through(4, EDGES) == EDGES


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        (0, "windows is 0"),
        ([1.0, 0.5], "must cover"),
        ([0.9, 0.5, 0.0], "must cover"),
        ([1.0, 0.5, 0.5, 0.0], "must cover"),
        ([0.0, 0.5, 1.0], "must cover"),
        ([1.0], "must cover"),
        ([1.0, float("nan"), 0.0], "must cover"),
    ],
)
def test_windows_that_do_not_cover_all_times_are_refused(windows, said):
    for make in (edges, WindowNoise, lambda windows: Piecewise(Linear(), windows), lambda windows: through(9, windows)):
        with pytest.raises(ValueError, match=said) as refused:
            make(windows)
        assert "\n" not in str(refused.value)


def test_fewer_steps_than_windows_are_refused():
    with pytest.raises(ValueError, match="steps is 3, fewer than the 4 windows"):
        through(3, EDGES)


def test_all_interpolants_are_there():
    assert any(isinstance(form, Piecewise) for form in INTERPOLANTS)
