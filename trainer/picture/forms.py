"""Rectification of every form on a law of the plane, where distances are to the law itself: figures over seeds, their table."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from data.files import read_json, sweep, write_json
from data.form import COUNT, NUMBER, conform
from data.plane import Law, Plane
from data.progress import Meter
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
MOST = 10_000  # samples: their distances, of each to each, are held in memory

WHEN, ALONG = ("before", "after"), ("first_orderness", "straightness")
MEASURED = {"energy": {NUMBER: float}, **{key: float for key in ALONG}, "evaluations": COUNT}
ROW = {"form": str, "when": str, "energy": {NUMBER: {NUMBER: float}}, **{key: {NUMBER: float} for key in ALONG}}
FIGURES = {"law": str, "updates": COUNT, "samples": COUNT, "rows": [{**ROW, "evaluations": {NUMBER: COUNT}}]}


@torch.no_grad()
def measured(denoiser: Denoiser, eps: torch.Tensor, true: torch.Tensor) -> dict[str, Any]:
    """Return energy distances to true points at 1, 2, 4 and FINE steps, first-orderness, straightness."""
    drawn = {str(steps): DDIM(steps, grid(denoiser, steps))(denoiser, eps) for steps in (1, 2, 4, FINE)}
    along = trajectories(denoiser, eps, steps=FINE // 2, times=grid(denoiser, FINE // 2))
    distances = {steps: energy(x.flatten(1), true) for steps, x in drawn.items()}
    return {"energy": distances, **{key: along[key] for key in ALONG}}


def rectified(form: str, seed: int, law: Law, updates: int, samples: int) -> dict[str, Any]:
    """Return what is measured of a form before and after rectification, and the network evaluations that each took."""
    x, true = (Plane(law, seed=2 * seed + i).points.view(-1, 2, 1, 1) for i in (0, 1))
    model = Rectification(x, *FORMS[form], updates, seed, shown=False)
    eps, both = model.noise(samples, 1), (model.teacher, model.student)
    found = (measured(denoiser, eps, true[:samples].flatten(1)) for denoiser in both)
    return {when: {**one, "evaluations": spent} for when, one, spent in zip(WHEN, found, model.spent)}


def kept(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a run before this one has measured, if it has; refuse what was measured of anything else."""
    if not path.exists():
        return None
    part = read_json(path)
    conform(part, {"asked": dict, **dict.fromkeys(WHEN, MEASURED)}, str(path))
    for name, value in asked.items():
        if part["asked"].get(name) != value:
            told = f"{name} {part['asked'].get(name)}, not {value}"
            raise ValueError(f"{path}: was measured with {told}; choose another --out or delete {path.parent}")
    return part


def row(form: str, when: str, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a row of the table: each measure by seed."""
    own = {seed: part[when] for seed, part in parts.items()}
    steps = next(iter(own.values()))["energy"]
    distances = {n: {seed: one["energy"][n] for seed, one in own.items()} for n in steps}
    rest = {key: {seed: one[key] for seed, one in own.items()} for key in (*ALONG, "evaluations")}
    return {"form": form, "when": when, "energy": distances, **rest}


def cell(values: Iterable[float]) -> str:
    """Return the median, the least and the largest."""
    values = sorted(values)
    return f"{statistics.median(values):.2g} ({values[0]:.2g} to {values[-1]:.2g})"


def markdown(figures: dict[str, Any]) -> str:
    """Return the table of plane.json, and what its figures are."""
    rows = figures["rows"]
    steps, seeds = sorted(rows[0]["energy"], key=int), len(rows[0]["straightness"])
    head = [*(f"{n} step{'s' * (n != '1')}" for n in steps), "first-order", "straight"]
    lines = [f"| form | | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for one in rows:
        values = *(one["energy"][n] for n in steps), *(one[key] for key in ALONG)
        lines.append(f"| {one['form']} | {one['when']} | {' | '.join(cell(seen.values()) for seen in values)} |")
    before, after = (max(max(one["evaluations"].values()) for one in rows if one["when"] == when) for when in WHEN)
    said = (
        f"Energy distance of {figures['samples']:,} points to {figures['law']}, {figures['updates']:,} updates before and after, "
        f"median (least to largest) of {seeds} seed{'s' * (seeds > 1)} of data, network and noise.\n"
        f"Network evaluations, each seed: {before:,} before, {after:,} after, pairs included ({after / before:.2f})."
    )
    return "\n".join([*lines, "", said])


def plane(out: Path, law: Law = "two_moons", seeds: int = 3, updates: int = 1500, samples: int = 4000) -> None:
    """Rectify every form on a law of the plane and measure it before and after: OUT/plane.json, with the table printed.

    Energy distances to the law in 1, 2, 4 and 64 steps of DDIM, first-orderness and straightness of Linear + Velocity, VP +
    Noise, sub-VP + Noise and VE + Score, and their cost in network evaluations. A form and seed is a file of its own in OUT
    once it is finished: killed, the same command goes on from there. One core, some 20 seconds for each.

    Args:
        out: folder of the figures.
        law: of the points.
        seeds: how many: 0, 1 and so on, each of the data, the network, the training and the noise.
        updates: of the network, for each of the two trainings.
        samples: points that are drawn, and points of the law that they are compared with.
    """
    for name, value in (("seeds", seeds), ("updates", updates), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name}: {value}, it must be at least 1")
    if samples > MOST:
        raise ValueError(f"samples: {samples}, it must be at most {MOST}")
    torch.set_num_threads(1)  # the network is too small for two, and sums must not depend on their number
    sweep(out)
    asked = {"law": law, "updates": updates, "samples": samples}
    due = [(form, seed, out / f"{form.split()[0].lower()}-{seed}.json") for form in FORMS for seed in range(seeds)]
    parts = {path: part for form, seed, path in due if (part := kept(path, {"form": form, "seed": seed, **asked}))}
    with Meter("plane", len(due), "rectifications", done=len(parts)) as meter:
        for form, seed, path in due:
            if path not in parts:
                parts[path] = {"asked": {"form": form, "seed": seed, **asked}, **rectified(form, seed, law, updates, samples)}
                write_json(path, parts[path])
                meter.add(1, f"{form}, seed {seed}")
    own = {form: {str(seed): parts[path] for of, seed, path in due if of == form} for form in FORMS}
    figures = {"format": 1, **asked, "rows": [row(form, when, own[form]) for form in FORMS for when in WHEN]}
    write_json(out / "plane.json", figures)
    print(markdown(figures))
