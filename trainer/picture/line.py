"""The picture of a line: a standard normal carried to a mixture of two modes, by DDPM's chain and as a flow, both exact."""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from data.noise import noise
from models.exact import Mixture
from models.interpolant import Discrete, Interpolant, Linear
from models.sampler import Ancestral, Sampler, uniform
from trainer.picture.plane import Make, scale

MODES = ([-2.0, 2.0], [0.5, 0.5], [0.35, 0.65])  # means, standard deviations, weights
T, BETA = 10, 0.1  # of DDPM's chain
SAMPLES, PATHS, EDGE, PANELS = 20_000, 36, 4.5, 4
GRID = torch.linspace(-2 * EDGE, 2 * EDGE, 1201, dtype=torch.float64)


def density(exact: Mixture, t: float, x: Tensor = GRID) -> np.ndarray:
    """Return the closed form p_t at x, (N,): a mixture again, of N(alpha m_k, alpha^2 s_k^2 + sigma^2)."""
    return exact.log_density(x[:, None], torch.tensor(t)).exp().numpy()


def flow(exact: Mixture, start: Tensor, t: float, s: float) -> np.ndarray:
    """Return where the flow carries states (N,) at t to by s: F_s^-1(F_t(x)), for on a line trajectories cannot cross."""
    grid = GRID * scale(exact.interpolant, s)
    share = exact.distribution(start, torch.tensor(t)).numpy()
    return np.interp(share, exact.distribution(grid, torch.tensor(s)).numpy(), grid.numpy())


def wasserstein(x: np.ndarray, exact: Mixture) -> float:
    """Return the distance int |F_n - F| dx of samples (N,) to the mixture: how far a sample must be moved, on average."""
    share = np.searchsorted(np.sort(x), GRID.numpy()) / len(x)
    return float(np.trapezoid(np.abs(share - exact.distribution(GRID, torch.tensor(0.0)).numpy()), GRID.numpy()))


@dataclass
class Carried:
    """A row of the picture: the states (N,) at falling times, and the exact denoiser that carried them."""

    exact: Mixture
    times: list[float]
    states: list[np.ndarray]
    said: str
    fair: list[np.ndarray] | None = None  # the states of another start, p_1 itself


@torch.no_grad()
def carried(sampler: Sampler, exact: Mixture, start: Tensor, seed: int) -> tuple[list[np.ndarray], float]:
    """Return the states at a sampler's times from a start (N,), and their distance to the mixture at the end."""
    walk = sampler.walk(exact, start.view(-1, 1, 1, 1), noise=torch.Generator().manual_seed(seed))
    states = [x.flatten().numpy() for x in walk]
    if not np.isfinite(states[-1]).all():
        raise ValueError(f"{type(sampler).__name__}: samples are not finite; take more steps")
    return states, wasserstein(states[-1], exact)


def chain(eps: Tensor, seed: int) -> Carried:
    """Return DDPM's chain (2006.11239, algorithm 2) from N(0, 1), and say what that start, which is not p_T, costs."""
    exact = Mixture(Discrete([BETA] * T), *MODES)
    sampler, one = Ancestral(T), torch.tensor(1.0)
    states, distance = carried(sampler, exact, eps, seed)
    x = exact.sample((len(eps),), torch.Generator().manual_seed(seed))
    fair, least = carried(sampler, exact, exact.interpolant.mix(x, eps, one), seed)
    left = exact.interpolant(one.double())[0].item()
    said = (
        f"DDPM, T = {T}, beta = {BETA}: at T the chain has not reached N(0, 1): alphas_cumprod = {left**2:.4f} there, so x_T "
        f"still holds {left:.2f} x.\nMean distance of its samples to the mixture: {distance:.2f} from N(0, 1), where DDPM "
        f"starts; {least:.2f} from its own p_T"
    )
    return Carried(exact, sampler.times, states, said, fair)


def stream(eps: Tensor, interpolant: Interpolant, sampler: Sampler, seed: int) -> Carried:
    """Return a sampler's walk on an interpolant; on Linear, flow matching, its start sigma(1) eps is p_1 itself."""
    exact = Mixture(interpolant, *MODES)
    alpha, sigma = (v.item() for v in interpolant(torch.tensor(sampler.times[0], dtype=torch.float64)))
    states, distance = carried(sampler, exact, sigma * eps, seed)
    flow = type(interpolant) is Linear and interpolant.sigma_min == 0
    start = "it starts from N(0, 1), which is p_1" if flow else f"it starts from {sigma:.3g} eps; x_1 still holds {alpha:.2g} x"
    said = (
        f"{'Flow matching' if flow else repr(interpolant)}, {type(sampler).__name__}, {sampler.steps} step"
        f"{'s' * (sampler.steps > 1)}: {start}"
        f"\nMean distance of its samples to the mixture: {distance:.2f}"
        f"{'' if sampler.draws else '. Dashed: the flow itself, in closed form: F_t(x_t) is constant'}"
    )
    return Carried(exact, sampler.times, states, said)


def ribbon(axes: Axes, row: Carried, exactly: bool) -> None:
    """Draw trajectories over the closed form p_t, time running from noise to data; dashed, the flow from the same starts."""
    times, x = np.linspace(1, 0, 101), GRID.numpy()
    inside = np.abs(x) <= EDGE
    scales = [scale(row.exact.interpolant, t) for t in times]
    image = np.stack([density(row.exact, t, GRID * size)[inside] * size for t, size in zip(times, scales)], axis=1)
    axes.imshow(image, extent=(1, 0, -EDGE, EDGE), origin="lower", aspect="auto", cmap="Blues", vmax=0.6)
    over = np.array([scale(row.exact.interpolant, t) for t in row.times])[:, None]
    lines = np.stack([state[:PATHS] for state in row.states]) / over
    axes.plot(row.times, lines, color="tab:orange", linewidth=0.7, alpha=0.8)
    if exactly:
        start = torch.from_numpy(row.states[0][:PATHS:4])
        exact = np.stack([flow(row.exact, start, row.times[0], t) / size for t, size in zip(times, scales)])
        axes.plot(times, exact, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlim=(1, 0), ylim=(-EDGE, EDGE), xlabel="t (1 is noise, 0 is data)", ylabel="x_t")


def histogram(axes: Axes, row: Carried, at: int) -> None:
    """Draw the states at one time of the walk against the closed form."""
    t, size = row.times[at], scale(row.exact.interpolant, row.times[at])
    x = GRID * size
    bins = np.linspace(-EDGE * size, EDGE * size, 61).tolist()
    axes.hist(row.states[at], bins, density=True, color="tab:orange", alpha=0.5, label="samples")
    if row.fair:
        axes.hist(row.fair[at], bins, density=True, histtype="step", color="tab:green", label="from p_T")
    axes.plot(x, density(row.exact, t, x), color="tab:blue", linewidth=1.5, label="exact p_t")
    if at == 0:
        axes.plot(x, torch.exp(-(x**2) / 2) / (2 * torch.pi) ** 0.5, color="black", linestyle=":", linewidth=1.2, label="N(0, 1)")
        axes.set_ylim(top=1.5 * axes.get_ylim()[1])
        axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2, columnspacing=1)
    axes.set(xlim=(-EDGE * size, EDGE * size), yticks=[])
    axes.set_title(f"t = {t:.2g}", fontsize=10)


def lay(part: SubFigure, row: Carried, exactly: bool) -> None:
    """Draw a row: trajectories, then histograms at a few times."""
    part.suptitle(row.said, x=0.01, ha="left", fontsize=11)
    panels = part.subplots(1, 1 + PANELS, width_ratios=[2.4] + [1] * PANELS)
    ribbon(panels[0], row, exactly)
    steps = len(row.times) - 1
    shown = sorted({round(steps * i / (PANELS - 1)) for i in range(PANELS)})
    for axes, at in zip(panels[1:], shown):
        histogram(axes, row, at)
    for axes in panels[1 + len(shown) :]:
        axes.set_axis_off()


def draw(interpolant: Interpolant, make: Make, steps: int, seed: int) -> Figure:
    """Return the picture, of two rows: DDPM's chain and a flow, from the same noises.

    Args:
        interpolant: of the second row; Linear is flow matching.
        make: the second row's sampler, of a number of steps and a grid of times.
        steps: of the second row's sampler.
        seed: of the noises.
    """
    eps = noise(seed, 0, (SAMPLES,))
    sampler = make(steps, uniform(steps))
    figure = Figure(figsize=(15, 7.6), layout="constrained")
    parts = figure.subfigures(2, 1, squeeze=False)[:, 0]
    lay(parts[0], chain(eps, seed), exactly=False)
    lay(parts[1], stream(eps, interpolant, sampler, seed), exactly=not sampler.draws)
    return figure
