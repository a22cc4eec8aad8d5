"""`rectify toy benchmark`: rectification of four parametrisations on a distribution in the plane.

There the distances are to the true distribution itself. Figures over seeds, and their table.
"""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data.files import read_json, remove_leftovers, write_json
from data.plane import Plane, PlaneDistribution
from data.progress import Meter
from data.schema import COUNT, NUMBER, check_schema
from models.denoiser import Denoiser
from models.interpolant import (
    Interpolant,
    Linear,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from models.prediction import NoisePrediction, Prediction, Score, Velocity
from models.sampler import DDIM
from trainer.metrics.sample_distances import energy_distance
from trainer.metrics.trajectories import measure_trajectories
from trainer.toy.train import FLOW_STEPS, Rectification, solvable_grid

PARAMETRISATIONS: dict[str, tuple[Interpolant, Prediction]] = {
    "Linear + Velocity": (Linear(), Velocity()),
    "VP + Noise": (VariancePreserving(), NoisePrediction()),
    "sub-VP + Noise": (SubVariancePreserving(), NoisePrediction()),
    "VE + Score": (VarianceExploding(), Score()),
}
MAX_SAMPLES = 10_000  # their pairwise distances are held in memory

PHASES = ("before", "after")
TRAJECTORY_METRICS = ("first_orderness", "straightness")
# schemas of the JSON files: of one rectification, and of the table
MEASURED = {
    "energy": {NUMBER: float},
    **dict.fromkeys(TRAJECTORY_METRICS, float),
    "evaluations": COUNT,
}
ROW = {
    "parametrisation": str,
    "when": str,
    "energy": {NUMBER: {NUMBER: float}},
    **dict.fromkeys(TRAJECTORY_METRICS, {NUMBER: float}),
}
FIGURES = {
    "distribution": str,
    "updates": COUNT,
    "samples": COUNT,
    "rows": [{**ROW, "evaluations": {NUMBER: COUNT}}],
}


@torch.no_grad()
def measure(denoiser: Denoiser, eps: torch.Tensor, true: torch.Tensor) -> dict[str, Any]:
    """Return energy distances to true points by number of steps, and trajectory metrics."""
    samples = {}
    for steps in (1, 2, 4, FLOW_STEPS):
        samples[str(steps)] = DDIM(steps, solvable_grid(denoiser, steps))(denoiser, eps)
    half = FLOW_STEPS // 2
    metrics = measure_trajectories(denoiser, eps, steps=half, times=solvable_grid(denoiser, half))
    distances = {}
    for name, x in samples.items():
        distances[name] = energy_distance(x.flatten(1), true)
    return {"energy": distances, **{key: metrics[key] for key in TRAJECTORY_METRICS}}


def rectify(
    parametrisation: str,
    seed: int,
    distribution: PlaneDistribution,
    updates: int,
    samples: int,
) -> dict[str, Any]:
    """Return the figures before and after a rectification, with the network evaluations of each."""
    x = Plane(distribution, seed=2 * seed).points.view(-1, 2, 1, 1)
    true = Plane(distribution, seed=2 * seed + 1).points.view(-1, 2, 1, 1)
    interpolant, prediction = PARAMETRISATIONS[parametrisation]
    model = Rectification(x, interpolant, prediction, updates, seed, show=False)
    eps = model.noise(samples, 1)
    points = true[:samples].flatten(1)
    before = measure(model.teacher, eps, points)
    after = measure(model.student, eps, points)
    return {
        "before": {**before, "evaluations": model.evaluations.teacher},
        "after": {**after, "evaluations": model.evaluations.student},
    }


def read_finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Return the figures of an earlier run, or None.

    Raises:
        ValueError: they were measured with other settings.
    """
    if not path.exists():
        return None
    part = read_json(path)
    check_schema(part, {"settings": dict, **dict.fromkeys(PHASES, MEASURED)}, str(path))
    for name, value in settings.items():
        found = part["settings"].get(name)
        if found != value:
            raise ValueError(
                f"{path}: it was measured with {name} {found}, not {value}; "
                f"choose another --out or delete {path.parent}"
            )
    return part


def table_row(parametrisation: str, when: str, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a row of the table: each figure by seed.

    Args:
        parametrisation: its name.
        when: before or after rectification.
        parts: figures of each seed.
    """
    by_seed = {seed: part[when] for seed, part in parts.items()}
    energy: dict[str, dict[str, float]] = {}
    for seed, figures in by_seed.items():
        for steps, distance in figures["energy"].items():
            energy.setdefault(steps, {})[seed] = distance
    row = {"parametrisation": parametrisation, "when": when, "energy": energy}
    for key in (*TRAJECTORY_METRICS, "evaluations"):
        row[key] = {seed: figures[key] for seed, figures in by_seed.items()}
    return row


def cell(values: Iterable[float]) -> str:
    """Return the median, the least and the largest."""
    values = sorted(values)
    return f"{statistics.median(values):.2g} ({values[0]:.2g} to {values[-1]:.2g})"


def markdown(figures: dict[str, Any]) -> str:
    """Return the table of plane.json, and what its figures are."""
    rows = figures["rows"]
    steps = sorted(rows[0]["energy"], key=int)
    # the table
    titles = [f"{n} step{'s' * (n != '1')}" for n in steps]
    titles += ["first-order", "straight"]
    lines = [f"| parametrisation | | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for row in rows:
        values = [row["energy"][n] for n in steps]
        values += [row[key] for key in TRAJECTORY_METRICS]
        cells = " | ".join(cell(by_seed.values()) for by_seed in values)
        lines.append(f"| {row['parametrisation']} | {row['when']} | {cells} |")
    # what its figures are
    seeds = len(rows[0]["straightness"])
    before = _most_evaluations(rows, "before")
    after = _most_evaluations(rows, "after")
    lines += [
        "",
        f"Energy distance of {figures['samples']:,} points to {figures['distribution']}, "
        f"{figures['updates']:,} updates before and after, median (least to largest) of {seeds} "
        f"seed{'s' * (seeds > 1)} of data, network and noise.",
        f"Network evaluations for each seed: {before:,} before, {after:,} after, pairs included "
        f"({after / before:.2f}).",
    ]
    return "\n".join(lines)


def _most_evaluations(rows: list[dict[str, Any]], when: str) -> int:
    """Return the most network evaluations of any row and seed, before or after."""
    return max(max(row["evaluations"].values()) for row in rows if row["when"] == when)


class Task(NamedTuple):
    """One rectification to measure."""

    parametrisation: str
    seed: int
    path: Path  # of its figures


def benchmark(
    out: Path,
    distribution: PlaneDistribution = "two_moons",
    seeds: int = 3,
    updates: int = 1500,
    samples: int = 4000,
) -> None:
    """Rectify four parametrisations in the plane and measure them before and after.

    It writes OUT/plane.json and prints the table: energy distances to the true distribution with 1,
    2, 4 and 64 DDIM steps, first-orderness, straightness and network evaluations of Linear +
    Velocity, VP + Noise, sub-VP + Noise and VE + Score. Each parametrisation and seed takes about
    20 seconds on one core and is written when it is finished: after a kill, the same command
    continues.

    Args:
        out: folder of the figures.
        distribution: distribution of the points.
        seeds: number of seeds: 0, 1, ... Each is the seed of the data, the network, the training
            and the noise.
        updates: updates of the network, in each of the two trainings.
        samples: number of sampled points, and of true points that they are compared with.
    """
    for name, value in (("seeds", seeds), ("updates", updates), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name}: {value}; it must be at least 1")
    if samples > MAX_SAMPLES:
        raise ValueError(f"samples: {samples}; it must be at most {MAX_SAMPLES}")
    # The network is too small for two threads, and sums must not depend on their number.
    torch.set_num_threads(1)
    remove_leftovers(out)
    # what is to be measured, and what is finished
    shared = {"distribution": distribution, "updates": updates, "samples": samples}
    tasks = []
    for name in PARAMETRISATIONS:
        for seed in range(seeds):
            tasks.append(Task(name, seed, out / f"{name.split()[0].lower()}-{seed}.json"))
    parts: dict[Path, dict[str, Any]] = {}
    for name, seed, path in tasks:
        part = read_finished(path, {"parametrisation": name, "seed": seed, **shared})
        if part:
            parts[path] = part
    # measure the rest
    with Meter("toy benchmark", len(tasks), "rectifications", done=len(parts)) as meter:
        for name, seed, path in tasks:
            if path in parts:
                continue
            settings = {"parametrisation": name, "seed": seed, **shared}
            figures = rectify(name, seed, distribution, updates, samples)
            parts[path] = {"settings": settings, **figures}
            write_json(path, parts[path])
            meter.add(1, f"{name}, seed {seed}")
    # the table
    by_name: dict[str, dict[str, Any]] = {}
    for name, seed, path in tasks:
        by_name.setdefault(name, {})[str(seed)] = parts[path]
    rows = []
    for name in PARAMETRISATIONS:
        for when in PHASES:
            rows.append(table_row(name, when, by_name[name]))
    table = {"format": 1, **shared, "rows": rows}
    write_json(out / "plane.json", table)
    print(markdown(table))
