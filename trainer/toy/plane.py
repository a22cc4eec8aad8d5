"""The picture of a distribution in the plane, before and after rectification.

It shows the flow, a sampler's steps, its samples and the velocity field.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from models.denoiser import Denoiser
from models.interpolant import Interpolant
from models.prediction import Velocity
from models.sampler import DDIM, Sampler
from trainer.metrics.sample_distances import energy_distance
from trainer.metrics.trajectories import first_orderness
from trainer.toy.train import FLOW_STEPS, Rectification, solvable_grid

SAMPLES = 4000
DOTS = 2000  # samples that are drawn
PATHS = 70  # trajectories that are drawn
ARROWS = 21  # per side of a velocity field
EDGE = 3.3  # half a panel's side
ARROW_DISTANCE = 0.3  # of an arrow from the nearest state of the flow, at most
FIELDS = (0.1, 0.5, 0.85)  # fractions of the path from noise to data with a velocity field

SamplerFactory = Callable[[int, Sequence[float]], Sampler]  # (steps, times) -> sampler


def state_scale(interpolant: Interpolant, t: float) -> float:
    """Return the scale that states at t are divided by: |(alpha, sigma)|, at least 1."""
    alpha, sigma = interpolant(torch.tensor(t, dtype=torch.float64))
    return max(1.0, torch.hypot(alpha, sigma).item())


@dataclass
class PlaneRow:
    """One row of the picture: states (N, 2), divided by their scale, all from the same noises."""

    denoiser: Denoiser
    states: list[np.ndarray]  # of the sampler
    flow: list[np.ndarray]  # of DDIM in many steps, which stands for the flow itself
    flow_times: list[float]
    caption: str


def integrate(sampler: Sampler, denoiser: Denoiser, eps: Tensor, seed: int) -> list[np.ndarray]:
    """Return a sampler's states (N, 2) at its times, divided by their scale."""
    first = torch.tensor(sampler.times[0])
    start = denoiser.interpolant.mix(torch.zeros_like(eps), eps, first)
    noise = torch.Generator().manual_seed(seed)
    states = sampler.integrate(denoiser, start, noise=noise)
    if not states[-1].isfinite().all():
        raise ValueError(
            f"{type(sampler).__name__}: samples are not finite; "
            "use more steps, or another interpolant or prediction"
        )
    scaled = []
    for x, t in zip(states, sampler.grid(denoiser.interpolant)):
        size = state_scale(denoiser.interpolant, t)
        scaled.append((x / size).flatten(1).numpy())
    return scaled


@torch.no_grad()
def make_row(
    name: str,
    denoiser: Denoiser,
    eps: Tensor,
    true: Tensor,
    make: SamplerFactory,
    steps: int,
    seed: int,
) -> PlaneRow:
    """Sample a denoiser from noises (N, 2, 1, 1), and compare with true points (N, 2, 1, 1)."""
    # the sampler, and the flow
    sampler = make(steps, solvable_grid(denoiser, steps))
    fine = DDIM(FLOW_STEPS, solvable_grid(denoiser, FLOW_STEPS))
    states = integrate(sampler, denoiser, eps, seed)
    flow = integrate(fine, denoiser, eps, seed)
    # figures
    points = true.flatten(1)
    distance = energy_distance(torch.from_numpy(states[-1]), points)
    flow_distance = energy_distance(torch.from_numpy(flow[-1]), points)
    half = FLOW_STEPS // 2
    order = first_orderness(denoiser, eps, steps=half, times=solvable_grid(denoiser, half))
    caption = (
        f"{name}: NFE {sampler.nfe(denoiser)}, energy distance {distance:.2g} "
        f"(the flow: NFE {FLOW_STEPS}, {flow_distance:.2g}), first-orderness {order:.2g}"
    )
    return PlaneRow(denoiser, states, flow, fine.times, caption)


def frame(axes: Axes, title: str) -> None:
    """Make a panel a square about 0 without ticks."""
    axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def draw_points(axes: Axes, points: np.ndarray, size: float, colour: np.ndarray | str) -> None:
    """Draw points (N, 2)."""
    x, y = points.T
    axes.scatter(x, y, s=size, c=colour, linewidths=0, zorder=3)


def draw_paths(
    axes: Axes, title: str, states: list[np.ndarray], colours: np.ndarray, marker: str = ""
) -> None:
    """Draw the first trajectories, from their noises (grey) to their samples."""
    for line, colour in zip(np.stack(states, axis=1)[:PATHS], colours):
        axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.8, marker=marker, markersize=3)
    draw_points(axes, states[0][:PATHS], 9, "0.6")
    draw_points(axes, states[-1][:PATHS], 22, colours[:PATHS])
    frame(axes, title)


@torch.no_grad()
def draw_field(axes: Axes, row: PlaneRow, index: int) -> None:
    """Draw -u, how samples move as t falls, near the flow's states; each panel has its scale."""
    t = row.flow_times[index]
    states = row.flow[index]
    interpolant = row.denoiser.interpolant
    # grid points near states
    side = torch.linspace(-EDGE, EDGE, ARROWS)
    points = torch.cartesian_prod(side, side)
    nearest = torch.cdist(points, torch.from_numpy(states)).min(1).values
    points = points[nearest < ARROW_DISTANCE]
    # the velocity there
    x_t = (state_scale(interpolant, t) * points).view(-1, 2, 1, 1)
    times = torch.full((len(points),), t)
    x_hat, eps_hat = row.denoiser(x_t, times)
    u = Velocity().target(interpolant, x_hat, eps_hat, times).flatten(1).numpy()
    draw_points(axes, states[:1000], 3, "0.85")
    if len(points):  # otherwise all states lie outside
        x, y = points.numpy().T
        length = np.hypot(u[:, 0], u[:, 1])
        arrows = axes.quiver(x, y, -u[:, 0], -u[:, 1], length, angles="xy", width=0.007, zorder=4)
        arrows.set_cmap("viridis")
    frame(axes, f"velocity field, t = {t:.2f}")


def draw_samples(axes: Axes, states: np.ndarray, true: np.ndarray, colours: np.ndarray) -> None:
    """Draw samples over true points (grey); those outside the panel are counted."""
    draw_points(axes, true, 3, "0.85")
    draw_points(axes, states[:DOTS], 4, colours[:DOTS])
    outside = (np.abs(states) > EDGE).any(1).mean()
    title = "samples over data"
    if outside > 0.005:
        title += f", {outside:.0%} outside"
    frame(axes, title)


def draw(model: Rectification, true: Tensor, make: SamplerFactory, steps: int) -> Figure:
    """Return the picture of a rectification, of two rows: before and after, from the same noises.

    Args:
        model: teacher and student.
        true: at least 2 SAMPLES points of the distribution that were not trained on, (N, 2, 1, 1).
        make: makes the sampler from a number of steps and a grid of times.
        steps: of the sampler.
    """
    eps = model.noise(SAMPLES, 1)
    true, more = true[: 2 * SAMPLES].split(SAMPLES)
    colours = _direction_colours(eps)
    # two rows
    rows = []
    for name, denoiser in {"before": model.teacher, "after": model.student}.items():
        rows.append(make_row(name, denoiser, eps, true, make, steps, model.seed))
    # the title
    floor = energy_distance(true.flatten(1), more.flatten(1))
    scaled = ""
    if state_scale(model.teacher.interpolant, 1.0) > 1.01:
        scaled = "; states divided by |(alpha, sigma)|"
    figure = Figure(figsize=(17, 6.9), layout="constrained")
    figure.suptitle(
        f"{model.description}{scaled}; arrows: -u, how a sample moves; "
        f"energy distance of data to data {floor:.1g}",
        fontsize=12,
    )
    # the panels
    sampler = type(make(1, [1, 0])).__name__
    step_title = f"{sampler}, {steps} step{'s' * (steps > 1)}"
    flow_title = f"the flow ({FLOW_STEPS} steps), from noise (grey)"
    for part, row in zip(figure.subfigures(2, 1, squeeze=False)[:, 0], rows):
        part.suptitle(row.caption, x=0.01, ha="left", fontsize=12)
        panels = part.subplots(1, 3 + len(FIELDS))
        draw_paths(panels[0], flow_title, row.flow, colours)
        draw_paths(panels[1], step_title, row.states, colours, ".")
        draw_samples(panels[2], row.states[-1], true.flatten(1).numpy(), colours)
        for axes, fraction in zip(panels[3:], FIELDS):
            draw_field(axes, row, round(fraction * FLOW_STEPS))
    return figure


def _direction_colours(eps: Tensor) -> np.ndarray:
    """Return a colour for each noise (N, 2, 1, 1): its direction is the hue."""
    angle = torch.atan2(eps[:, 1, 0, 0], eps[:, 0, 0, 0])
    hue = angle / (2 * torch.pi) % 1
    saturation = torch.full_like(hue, 0.9)
    value = torch.full_like(hue, 0.85)
    return hsv_to_rgb(torch.stack([hue, saturation, value], dim=1).numpy())
