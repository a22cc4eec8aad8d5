"""The picture of a line: a standard normal becomes a mixture of two modes.

By DDPM's chain and by a flow, both with exact denoisers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from data.noise import noise
from models.exact import Mixture
from models.interpolant import Discrete, Interpolant, Linear
from models.sampler import Ancestral, Sampler, uniform
from trainer.toy.plane import SamplerFactory, state_scale

MODES = ([-2.0, 2.0], [0.5, 0.5], [0.35, 0.65])  # means, standard deviations, weights
CHAIN_STEPS = 10  # of DDPM's chain
CHAIN_BETA = 0.1
SAMPLES = 20_000
PATHS = 36  # trajectories that are drawn
EDGE = 4.5  # half a panel's height
PANELS = 4  # histograms in a row
GRID = torch.linspace(-2 * EDGE, 2 * EDGE, 1201, dtype=torch.float64)


def density(exact: Mixture, t: float, x: Tensor = GRID) -> np.ndarray:
    """Return the closed form p_t at x, (N,): a mixture of N(alpha m_k, alpha^2 s_k^2 + sigma^2)."""
    return exact.log_density(x[:, None], torch.tensor(t)).exp().numpy()


def flow(exact: Mixture, start: Tensor, t: float, s: float) -> np.ndarray:
    """Return the flow's states at s from states (N,) at t: F_s^-1(F_t(x)).

    On a line trajectories cannot cross.
    """
    grid = GRID * state_scale(exact.interpolant, s)
    probability = exact.distribution(start, torch.tensor(t)).numpy()
    grid_probability = exact.distribution(grid, torch.tensor(s)).numpy()
    return np.interp(probability, grid_probability, grid.numpy())


def wasserstein(x: np.ndarray, exact: Mixture) -> float:
    """Return the distance int |F_n - F| dx of samples (N,) to the mixture.

    It is how far a sample must be moved, on average.
    """
    empirical = np.searchsorted(np.sort(x), GRID.numpy()) / len(x)
    true = exact.distribution(GRID, torch.tensor(0.0)).numpy()
    return float(np.trapezoid(np.abs(empirical - true), GRID.numpy()))


@dataclass
class LineRow:
    """A row of the picture: the states (N,) at falling times, and their exact denoiser."""

    exact: Mixture
    times: list[float]
    states: list[np.ndarray]
    caption: str
    fair: list[np.ndarray] | None = None  # states from another start, p_1 itself


class Sampled(NamedTuple):
    """What a sampler made of a start."""

    states: list[np.ndarray]  # at its times
    distance: float  # of the last to the mixture


@torch.no_grad()
def integrate(sampler: Sampler, exact: Mixture, start: Tensor, seed: int) -> Sampled:
    """Return a sampler's states from a start (N,), and their final distance to the mixture."""
    generator = torch.Generator().manual_seed(seed)
    trajectory = sampler.integrate(exact, start.view(-1, 1, 1, 1), noise=generator)
    states = [x.flatten().numpy() for x in trajectory]
    if not np.isfinite(states[-1]).all():
        raise ValueError(f"{type(sampler).__name__}: samples are not finite; use more steps")
    return Sampled(states, wasserstein(states[-1], exact))


def make_chain_row(eps: Tensor, seed: int) -> LineRow:
    """Return DDPM's chain from N(0, 1), and what that start, which is not p_T, costs.

    Ho et al. 2020 (arXiv 2006.11239), algorithm 2.
    """
    exact = Mixture(Discrete([CHAIN_BETA] * CHAIN_STEPS), *MODES)
    sampler = Ancestral(CHAIN_STEPS)
    one = torch.tensor(1.0)
    # from N(0, 1), and from p_T
    found = integrate(sampler, exact, eps, seed)
    x = exact.sample((len(eps),), torch.Generator().manual_seed(seed))
    fair = integrate(sampler, exact, exact.interpolant.mix(x, eps, one), seed)
    remaining = exact.interpolant(one.double())[0].item()
    caption = (
        f"DDPM, T = {CHAIN_STEPS}, beta = {CHAIN_BETA}: at T the chain has not reached N(0, 1): "
        f"alphas_cumprod is {remaining**2:.4f}, so that x_T still contains {remaining:.2f} x.\n"
        f"Mean distance of its samples to the mixture: {found.distance:.2f} from N(0, 1), where "
        f"DDPM starts; {fair.distance:.2f} from its own p_T"
    )
    return LineRow(exact, sampler.times, found.states, caption, fair.states)


def make_flow_row(eps: Tensor, interpolant: Interpolant, sampler: Sampler, seed: int) -> LineRow:
    """Return a sampler's states on an interpolant, from sigma(1) eps.

    On Linear, which is flow matching, this start is p_1 itself.
    """
    exact = Mixture(interpolant, *MODES)
    alpha, sigma = interpolant(torch.tensor(sampler.times[0], dtype=torch.float64))
    found = integrate(sampler, exact, sigma.item() * eps, seed)
    # the caption
    name = repr(interpolant)
    start = f"it starts from {sigma.item():.3g} eps; x_1 still contains {alpha.item():.2g} x"
    if type(interpolant) is Linear and interpolant.sigma_min == 0:
        name = "Flow matching"
        start = "it starts from N(0, 1), which is p_1"
    steps = f"{sampler.steps} step{'s' * (sampler.steps > 1)}"
    caption = (
        f"{name}, {type(sampler).__name__}, {steps}: {start}\n"
        f"Mean distance of its samples to the mixture: {found.distance:.2f}"
    )
    if not sampler.is_stochastic:
        caption += ". Dashed: the flow itself, in closed form: F_t(x_t) is constant"
    return LineRow(exact, sampler.grid(interpolant), found.states, caption)


def draw_trajectories(axes: Axes, row: LineRow, with_flow: bool) -> None:
    """Draw trajectories over the closed form p_t; dashed, the flow from the same starts."""
    times = np.linspace(1, 0, 101)
    interpolant = row.exact.interpolant
    scales = [state_scale(interpolant, t) for t in times]
    # the density
    inside = np.abs(GRID.numpy()) <= EDGE
    columns = []
    for t, size in zip(times, scales):
        columns.append(density(row.exact, t, GRID * size)[inside] * size)
    image = np.stack(columns, axis=1)
    extent = (1, 0, -EDGE, EDGE)
    axes.imshow(image, extent=extent, origin="lower", aspect="auto", cmap="Blues", vmax=0.6)
    # the sampler's states
    row_scales = np.array([state_scale(interpolant, t) for t in row.times])[:, None]
    lines = np.stack([state[:PATHS] for state in row.states]) / row_scales
    axes.plot(row.times, lines, color="tab:orange", linewidth=0.7, alpha=0.8)
    # the flow
    if with_flow:
        start = torch.from_numpy(row.states[0][:PATHS:4])
        exact = []
        for t, size in zip(times, scales):
            exact.append(flow(row.exact, start, row.times[0], t) / size)
        axes.plot(times, np.stack(exact), color="black", linewidth=0.8, linestyle="--")
    axes.set(xlim=(1, 0), ylim=(-EDGE, EDGE), xlabel="t (1 is noise, 0 is data)", ylabel="x_t")


def draw_histogram(axes: Axes, row: LineRow, index: int) -> None:
    """Draw the states at one time against the closed form."""
    t = row.times[index]
    size = state_scale(row.exact.interpolant, t)
    x = GRID * size
    limit = EDGE * size
    bins = np.linspace(-limit, limit, 61).tolist()
    axes.hist(row.states[index], bins, density=True, color="tab:orange", alpha=0.5, label="samples")
    if row.fair:
        fair = row.fair[index]
        axes.hist(fair, bins, density=True, histtype="step", color="tab:green", label="from p_T")
    axes.plot(x, density(row.exact, t, x), color="tab:blue", linewidth=1.5, label="exact p_t")
    if index == 0:
        normal = torch.exp(-(x**2) / 2) / (2 * torch.pi) ** 0.5
        axes.plot(x, normal, color="black", linestyle=":", linewidth=1.2, label="N(0, 1)")
        axes.set_ylim(top=1.5 * axes.get_ylim()[1])
        axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2, columnspacing=1)
    axes.set(xlim=(-limit, limit), yticks=[])
    axes.set_title(f"t = {t:.2g}", fontsize=10)


def draw_row(part: SubFigure, row: LineRow, with_flow: bool) -> None:
    """Draw a row: trajectories, then histograms at a few times."""
    part.suptitle(row.caption, x=0.01, ha="left", fontsize=11)
    panels = part.subplots(1, 1 + PANELS, width_ratios=[2.4] + [1] * PANELS)
    draw_trajectories(panels[0], row, with_flow)
    steps = len(row.times) - 1
    indices = sorted({round(steps * i / (PANELS - 1)) for i in range(PANELS)})
    for axes, index in zip(panels[1:], indices):
        draw_histogram(axes, row, index)
    for axes in panels[1 + len(indices) :]:
        axes.set_axis_off()


def draw(interpolant: Interpolant, make: SamplerFactory, steps: int, seed: int) -> Figure:
    """Return the picture, of two rows: DDPM's chain and a flow, from the same noises.

    Args:
        interpolant: of the second row; Linear is flow matching.
        make: makes the second row's sampler from a number of steps and a grid of times.
        steps: of the second row's sampler.
        seed: of the noises.
    """
    eps = noise(seed, 0, (SAMPLES,))
    sampler = make(steps, uniform(steps))
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    draw_row(parts[0], make_chain_row(eps, seed), with_flow=False)
    flow_row = make_flow_row(eps, interpolant, sampler, seed)
    draw_row(parts[1], flow_row, with_flow=not sampler.is_stochastic)
    return figure
