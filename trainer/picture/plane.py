"""The picture of a law of the plane: the flow, a sampler's steps, its samples and the velocity field, before and after."""

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
from trainer.evaluate.measures import energy, first_orderness
from trainer.picture.train import FINE, Rectification, grid

SAMPLES, DOTS, PATHS, ARROWS = 4000, 2000, 70, 21
EDGE, NEAR = 3.3, 0.3  # half a panel's side; how near a state of the flow must be for an arrow to be drawn
FIELDS = (0.1, 0.5, 0.85)  # of the way from noise to data, where the velocity is drawn

Make = Callable[[int, Sequence[float]], Sampler]  # a sampler of a number of steps and a grid of times


def scale(interpolant: Interpolant, t: float) -> float:
    """Return what states at t are drawn over: 1, and their growth where alpha^2 + sigma^2 exceeds 1 (VarianceExploding)."""
    alpha, sigma = interpolant(torch.tensor(t, dtype=torch.float64))
    return max(1.0, torch.hypot(alpha, sigma).item())


@dataclass
class Walked:
    """What a row of the picture shows: states (N, 2), over their scale, from the same noises."""

    denoiser: Denoiser
    states: list[np.ndarray]  # of the sampler
    fine: list[np.ndarray]  # of DDIM in FINE steps, which stands for the flow itself
    fine_times: list[float]
    said: str  # figures


def walk(sampler: Sampler, denoiser: Denoiser, eps: Tensor, seed: int) -> list[np.ndarray]:
    """Return the states (N, 2) of a sampler at its times, drawn over their scale; it begins at sigma(t_0) eps."""
    start = denoiser.interpolant.mix(torch.zeros_like(eps), eps, torch.tensor(sampler.times[0]))
    states = sampler.walk(denoiser, start, noise=torch.Generator().manual_seed(seed))
    if not states[-1].isfinite().all():
        raise ValueError(f"{type(sampler).__name__}: samples are not finite; take more steps or another form")
    return [(x / scale(denoiser.interpolant, t)).flatten(1).numpy() for x, t in zip(states, sampler.times)]


@torch.no_grad()
def walked(name: str, denoiser: Denoiser, eps: Tensor, true: Tensor, make: Make, steps: int, seed: int) -> Walked:
    """Walk a denoiser from noises (N, 2, 1, 1) and measure the samples against true points (N, 2, 1, 1)."""
    sampler, fine = make(steps, grid(denoiser, steps)), DDIM(FINE, grid(denoiser, FINE))
    states, flow = (walk(s, denoiser, eps, seed) for s in (sampler, fine))
    distance, floor = (energy(torch.from_numpy(x[-1]), true.flatten(1)) for x in (states, flow))
    order = first_orderness(denoiser, eps, steps=FINE // 2, times=grid(denoiser, FINE // 2))
    said = (
        f"{name}: NFE {sampler.nfe(denoiser)}, energy distance {distance:.2g} (the flow: NFE {FINE}, {floor:.2g}), "
        f"first-orderness {order:.2g}"
    )
    return Walked(denoiser, states, flow, fine.times, said)


def frame(axes: Axes, title: str) -> None:
    """Make a panel a square about 0 without ticks."""
    axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def dots(axes: Axes, points: np.ndarray, size: float, colour: np.ndarray | str) -> None:
    """Draw points (N, 2)."""
    x, y = points.T
    axes.scatter(x, y, s=size, c=colour, linewidths=0, zorder=3)


def paths(axes: Axes, title: str, states: list[np.ndarray], colours: np.ndarray, marker: str = "") -> None:
    """Draw the first trajectories, from their noises (grey) to their samples."""
    for line, colour in zip(np.stack(states, axis=1)[:PATHS], colours):
        axes.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.8, marker=marker, markersize=3)
    dots(axes, states[0][:PATHS], 9, "0.6")
    dots(axes, states[-1][:PATHS], 22, colours[:PATHS])
    frame(axes, title)


@torch.no_grad()
def field(axes: Axes, shown: Walked, at: int) -> None:
    """Draw -u, the way samples move as t falls, wherever there are states of the flow; each panel has its own scale."""
    t, interpolant, states = shown.fine_times[at], shown.denoiser.interpolant, shown.fine[at]
    side = torch.linspace(-EDGE, EDGE, ARROWS)
    points = torch.cartesian_prod(side, side)
    points = points[torch.cdist(points, torch.from_numpy(states)).min(1).values < NEAR]
    x_t, times = (scale(interpolant, t) * points).view(-1, 2, 1, 1), torch.full((len(points),), t)
    x_hat, eps_hat = shown.denoiser(x_t, times)
    u = Velocity().target(interpolant, x_hat, eps_hat, times).flatten(1).numpy()
    dots(axes, states[:1000], 3, "0.85")
    if len(points):  # else all states lie outside
        x, y = points.numpy().T
        axes.quiver(x, y, -u[:, 0], -u[:, 1], np.hypot(u[:, 0], u[:, 1]), cmap="viridis", angles="xy", width=0.007, zorder=4)
    frame(axes, f"velocity field, t = {t:.2f}")


def samples(axes: Axes, states: np.ndarray, true: np.ndarray, colours: np.ndarray) -> None:
    """Draw samples over true points (grey); those outside the panel are counted."""
    dots(axes, true, 3, "0.85")
    dots(axes, states[:DOTS], 4, colours[:DOTS])
    outside = (np.abs(states) > EDGE).any(1).mean()
    frame(axes, f"samples over data{f', {outside:.0%} outside' if outside > 0.005 else ''}")


def draw(model: Rectification, true: Tensor, make: Make, steps: int) -> Figure:
    """Return the picture of a rectification, of two rows: before and after, from the same noises.

    Args:
        model: teacher and student.
        true: at least 2 SAMPLES points of the law that it was not trained on, (N, 2, 1, 1).
        make: the sampler of a number of steps and a grid of times.
        steps: of the sampler.
    """
    eps, (true, more) = model.noise(SAMPLES, 1), true[: 2 * SAMPLES].split(SAMPLES)
    turn = torch.atan2(eps[:, 1, 0, 0], eps[:, 0, 0, 0]) / (2 * torch.pi) % 1  # a colour is a direction of the noise
    colours = hsv_to_rgb(torch.stack([turn, torch.full_like(turn, 0.9), torch.full_like(turn, 0.85)], dim=1).numpy())
    both = {"before": model.teacher, "after": model.student}
    rows = [walked(name, denoiser, eps, true, make, steps, model.seed) for name, denoiser in both.items()]
    figure = Figure(figsize=(17, 6.9), layout="constrained")
    floor = energy(true.flatten(1), more.flatten(1))
    scaled = "; states drawn over |(alpha, sigma)|" if scale(model.teacher.interpolant, 1.0) > 1.01 else ""
    said = f"{model.form}{scaled}; arrows: -u, the way a sample moves; energy distance of data to data {floor:.1g}"
    figure.suptitle(said, fontsize=12)
    for part, shown in zip(figure.subfigures(2, 1, squeeze=False)[:, 0], rows):
        part.suptitle(shown.said, x=0.01, ha="left", fontsize=12)
        panels = part.subplots(1, 3 + len(FIELDS))
        paths(panels[0], f"the flow ({FINE} steps), from noise (grey)", shown.fine, colours)
        paths(panels[1], f"{type(make(1, [1, 0])).__name__}, {steps} step{'s' * (steps > 1)}", shown.states, colours, ".")
        samples(panels[2], shown.states[-1], true.flatten(1).numpy(), colours)
        for axes, way in zip(panels[3:], FIELDS):
            field(axes, shown, round(way * FINE))
    return figure
