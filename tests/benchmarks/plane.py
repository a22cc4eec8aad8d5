"""Rectification of every form on a law of the plane, where distances are to the law itself: energy distance, three seeds.

    python -m tests.benchmarks.plane

Prints, as a table in Markdown, the median (least to largest) over the seeds before and after, in 1, 2 and 4 steps of DDIM and
along the flow (64 steps), and the first-orderness and straightness of both.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable

import torch

from data.plane import Plane
from models.denoiser import Denoiser
from models.interpolant import Interpolant, Linear, SubVariancePreserving, VarianceExploding, VariancePreserving
from models.prediction import Noise, Prediction, Score, Velocity
from models.sampler import DDIM
from trainer.evaluate.measures import energy, trajectories
from trainer.picture.train import FINE, Rectification, grid

FORMS: dict[str, tuple[Interpolant, Prediction]] = {
    "Linear + Velocity": (Linear(), Velocity()),
    "VP + Noise": (VariancePreserving(), Noise()),
    "sub-VP + Noise": (SubVariancePreserving(), Noise()),
    "VE + Score": (VarianceExploding(), Score()),
}
LAW, SAMPLES, UPDATES = "two_moons", 4000, 1500


@torch.no_grad()
def measured(denoiser: Denoiser, eps: torch.Tensor, true: torch.Tensor) -> list[float]:
    """Return energy distances at 1, 2, 4 and FINE steps, first-orderness, straightness."""
    drawn = [DDIM(steps, grid(denoiser, steps))(denoiser, eps) for steps in (1, 2, 4, FINE)]
    along = trajectories(denoiser, eps, steps=FINE // 2, times=grid(denoiser, FINE // 2))
    return [*(energy(x.flatten(1), true) for x in drawn), along["first_orderness"], along["straightness"]]


def cell(values: Iterable[float]) -> str:
    """Return the median, the least and the largest."""
    values = sorted(values)
    return f"{statistics.median(values):.2g} ({values[0]:.2g} to {values[-1]:.2g})"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    found = defaultdict(list)
    for name, (interpolant, prediction) in FORMS.items():
        for seed in range(3):
            law, true = (Plane(LAW, seed=2 * seed + i).points.view(-1, 2, 1, 1) for i in (0, 1))
            model = Rectification(law, interpolant, prediction, UPDATES, seed)
            eps = model.noise(SAMPLES, 1)
            for when, denoiser in (("before", model.teacher), ("after", model.student)):
                found[name, when].append(measured(denoiser, eps, true[:SAMPLES].flatten(1)))
    print("| form | | 1 step | 2 steps | 4 steps | 64 steps | first-order | straight |\n|---|---|---|---|---|---|---|---|")
    for (name, when), seeds in found.items():
        print(f"| {name} | {when} | {' | '.join(map(cell, zip(*seeds)))} |")


if __name__ == "__main__":
    main()
