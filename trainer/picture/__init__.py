"""Pictures for people who learn by looking: how a sampler carries noise to data, in the plane and on a line."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from data.files import replacing
from data.plane import Plane
from models.interpolant import Interpolant, Linear
from models.prediction import Prediction, Velocity
from models.sampler import DDIM, uniform
from trainer.picture import line, plane
from trainer.picture.train import Rectification


def picture(
    out: Path,
    data: Literal["two_moons", "eight_gaussians", "checkerboard", "two_modes"] = "two_moons",
    interpolant: Interpolant | None = None,
    prediction: Prediction | None = None,
    sampler: plane.Make = DDIM,
    steps: int = 4,
    updates: int = 1500,
    seed: int = 0,
) -> None:
    """Draw how noise is carried to data: trajectories, velocity field and samples, before and after rectification (PNG).

    In the plane a small network is trained on the law, seconds on a CPU, then once more on the pairs that it draws itself.
    On the line (two_modes) nothing is trained: DDPM with T = 10 and beta = .1, and flow matching, both exact.

    Args:
        out: the PNG to write.
        data: a law of the plane, or two_modes, a mixture of two Gaussians on a line.
        interpolant: of the states; Linear by default.
        prediction: the row that the network learns; Velocity by default. two_modes has no network, and takes none.
        sampler: what walks from noise to data; one that draws noise is welcome.
        steps: of the sampler.
        updates: of the network, for each of the two trainings.
        seed: of the data, the network, the training and the noise.
    """
    if out.suffix != ".png":
        raise ValueError(f"out: {out} does not end in .png; a picture is a PNG")
    if updates < 1 or not 0 <= seed < 2**31:
        raise ValueError(f"picture: updates ({updates}) must be at least 1, seed ({seed}) in [0, 2^31)")
    sampler(steps, uniform(steps))  # refuses what it cannot be before anything is trained
    torch.set_num_threads(1)  # the network is too small for two, and sums must not depend on their number
    interpolant = interpolant or Linear()
    if data == "two_modes":
        if prediction:
            raise ValueError(f"prediction: {prediction!r}, but two_modes is drawn with exact denoisers; leave it out")
        figure = line.draw(interpolant, sampler, steps, seed)
    else:
        law, true = (Plane(data, seed=2 * seed + i).points.view(-1, 2, 1, 1) for i in (0, 1))
        figure = plane.draw(Rectification(law, interpolant, prediction or Velocity(), updates, seed), true, sampler, steps)
    save(figure, out)


def save(figure: Figure, out: Path) -> None:
    """Write a figure as a PNG of 256 colours, a third of the size, in whose bytes nothing but the picture stands."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(100)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    with replacing(out) as temporary:
        image.save(temporary, "png", optimize=True)
