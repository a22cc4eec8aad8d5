"""`rectify toy picture`: how a sampler carries noise to data, in the plane and on a line."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data.files import atomic_path
from data.plane import Plane
from models.interpolant import Interpolant, Linear
from models.prediction import Prediction, Velocity
from models.sampler import DDIM, uniform
from trainer.toy import line, plane
from trainer.toy.train import Rectification


def picture(
    out: Path,
    data: Literal["two_moons", "eight_gaussians", "checkerboard", "two_modes"] = "two_moons",
    interpolant: Interpolant | None = None,
    prediction: Prediction | None = None,
    sampler: plane.SamplerFactory = DDIM,
    steps: int = 4,
    updates: int = 1500,
    seed: int = 0,
) -> None:
    """Draw how noise becomes data: trajectories, velocity field and samples, as a PNG.

    In the plane a small network is trained on the data, in seconds on a CPU, and then once more on
    its own pairs: the picture shows it before and after this rectification. On the line (two_modes)
    nothing is trained: DDPM with T = 10 and beta = .1, and flow matching, both exact.

    Args:
        out: the PNG to write.
        data: a distribution in the plane, or two_modes, a mixture of two Gaussians on a line.
        interpolant: interpolant of the states; Linear by default.
        prediction: what the network predicts; Velocity by default. two_modes has no network and
            takes none.
        sampler: class of the sampler; it may be stochastic.
        steps: steps of the sampler.
        updates: updates of the network, in each of the two trainings.
        seed: seed of the data, the network, the training and the noise.
    """
    if out.suffix != ".png":
        raise ValueError(f"out: {out} does not end in .png; the picture is a PNG")
    if updates < 1 or not 0 <= seed < 2**31:
        raise ValueError(
            f"picture: updates ({updates}) must be at least 1, seed ({seed}) in [0, 2^31)"
        )
    sampler(steps, uniform(steps))  # raises for invalid steps before anything is trained
    # The network is too small for two threads, and sums must not depend on their number.
    torch.set_num_threads(1)
    interpolant = interpolant or Linear()
    if data == "two_modes":
        if prediction:
            raise ValueError(
                f"prediction: {prediction!r}, but two_modes has exact denoisers; omit it"
            )
        figure = line.draw(interpolant, sampler, steps, seed)
    else:
        points = Plane(data, seed=2 * seed).points.view(-1, 2, 1, 1)
        true = Plane(data, seed=2 * seed + 1).points.view(-1, 2, 1, 1)
        prediction = prediction or Velocity()
        model = Rectification(points, interpolant, prediction, updates, seed)
        figure = plane.draw(model, true, sampler, steps)
    save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Write a figure as a PNG of 256 colours, a third of the size, without metadata."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(100)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(256, dither=Image.Dither.NONE)
    with atomic_path(out) as temporary:
        image.save(temporary, "png", optimize=True)
