"""The likelihood of held-out samples under runs of every kind that has a density, in one table."""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, Set
from data.dequantised import Dequantised
from data.files import write_json
from data.latents import Latents
from data.plane import Plane
from data.progress import Meter
from models import flow as flows
from models import teacher
from models.condition import Condition
from models.denoiser import Denoiser
from models.likelihood import Adaptive, Exact, Hutchinson, bits_per_dim, log_prob
from models.text import prompted
from trainer import job
from trainer.callbacks.metrics import read_log
from trainer.flow import agree

SETS = (Dequantised, Latents, Plane)  # importing them makes their short names known
Density = Callable[[Batch], tuple[Tensor, int | None]]  # log p, (B,), and the network's evaluations, where they are counted


def likelihood(
    run: list[Path] | Path,
    data: Set,
    out: Path,
    samples: int = 1024,
    probes: int = 0,
    tolerance: float = 1e-4,
    bound: float = 1e-2,
    seed: int = 0,
    batch: int = 256,
    prompts: Path | None = None,
) -> None:
    """Measure -log p of held-out samples under runs that have a density, write it as JSON, and print the table.

    A generator's density is that of its probability-flow ODE, a flow's its own. In nats per sample; for Dequantised images also
    in bits per dimension: what a grey level costs at most. The density of Latents is theirs, not that of images.

    Args:
        run: run folder or checkpoint, or several; those that differ by their seeds alone share a row of the table.
        data: samples that the runs were not trained on (Dequantised, Plane or Latents).
        out: the JSON file to write.
        samples: how many, from the first on; all if there are fewer.
        probes: vectors of Hutchinson's estimate of the trace; 0 for the trace itself, as many passes as there are dimensions.
            Continuous flows always take the trace itself.
        tolerance: absolute and relative, of the adaptive solver of a generator's ODE. Flows keep their own.
        bound: the largest error of that solve, in nats per dimension, that is not refused; it is estimated by a rougher solve's
            distance, which is mostly that one's error.
        seed: of the vectors.
        batch: samples measured at once.
        prompts: what networks that are told texts are told, one a line: that of a sample's class; by default what they were
            trained on.
    """
    if samples < 1 or batch < 1 or probes < 0:
        raise ValueError(f"likelihood: samples ({samples}) and batch ({batch}) must be at least 1, probes ({probes}) at least 0")
    runs, count = (run if isinstance(run, list) else [run]), min(samples, data.manifest["samples"])
    if not runs:
        raise ValueError("likelihood: run names no run")
    settings = {"probes": probes, "tolerance": tolerance, "bound": bound, "seed": seed}
    with Meter("likelihood", len(runs) * count, "samples") as meter:
        rows = [row(path, list(parts(data, count, batch)), data, settings, prompts, meter) for path in runs]
    write_json(out, {"format": 1, "data": repr(data), **settings, "runs": rows})
    print(f"{data!r}, {count} samples\n\n{table(rows)}")


def parts(data: Set, count: int, batch: int) -> Iterator[Batch]:
    """Yield samples 0 .. count - 1 in order."""
    return (data.read(np.arange(start, min(count, start + batch))) for start in range(0, count, batch))


def row(
    run: Path, batches: list[Batch], data: Set, settings: dict[str, Any], prompts: Path | None, meter: Meter
) -> dict[str, Any]:
    """Return what is found of one run."""
    device, found, evaluations = job.start().device, [], []
    about, density = opened(run, settings, data, prompts, device)
    for part in batches:
        log_p, nfe = density(part.to(device))
        found.append(log_p.detach().double().cpu())
        evaluations += [] if nfe is None else [nfe]
        meter.add(len(log_p))
    return {"run": str(run), **about, **measured(torch.cat(found), data), "nfe": max(evaluations, default=None)}


def opened(
    run: Path, settings: dict[str, Any], data: Set, prompts: Path | None, device: torch.device
) -> tuple[dict[str, Any], Density]:
    """Return what is to be told of a run, and its density.

    Raises:
        ValueError: a run without a density, or one for other data.
    """
    file = teacher.newest(run)
    checkpoint = teacher.read(file, tensors=False)
    if "flow" in checkpoint["rectify"]:
        flow = flows.load(file).to(device)
        name, density, shape, weights = type(flow).__name__, of_flow(flow), flow.shape, list(flow.parameters())
    elif "denoiser" in checkpoint["rectify"]:
        denoiser, _, condition = teacher.load(file)
        density = of_denoiser(denoiser.to(device), prompted(condition, prompts, run), settings, device)
        name, shape = f"{denoiser.interpolant!r} + {denoiser.prediction!r}", denoiser.shape
        weights = list(denoiser.parameters())
    else:
        raise ValueError(f"{file}: holds neither a denoiser nor a flow: nothing with a density (is it an autoencoder's run?)")
    agree(data, shape)
    log = file.parent.parent / "metrics.jsonl"
    trained = {"step": checkpoint.get("global_step"), "seconds": spent(log) if log.is_file() else None}
    return {"model": name, "parameters": sum(weight.numel() for weight in weights), **trained}, density


def spent(log: Path) -> float | None:
    """Return the seconds of training that a log tells of, None if it is empty; its clock starts anew where a run was resumed."""
    clock = [values["seconds"] for _, values in read_log(log)]
    return sum(now for now, then in zip(clock, [*clock[1:], 0.0]) if then < now) if clock else None


def of_flow(flow: flows.Flow) -> Density:
    """Return a flow's own density."""
    return lambda batch: (flow.log_prob(batch.x, exact=True), None)


def of_denoiser(denoiser: Denoiser, condition: Condition, settings: dict[str, Any], device: torch.device) -> Density:
    """Return the density of a denoiser's probability-flow ODE."""
    generator = torch.Generator(device).manual_seed(settings["seed"])
    trace = Hutchinson(generator, settings["probes"]) if settings["probes"] else Exact()
    solver = Adaptive(settings["tolerance"], settings["tolerance"])
    return lambda batch: log_prob(denoiser, batch.x, condition(batch.condition), trace, solver, tolerance=settings["bound"])


def measured(log_p: Tensor, data: Set) -> dict[str, Any]:
    """Return the mean of -log p, its standard error over samples, and bits per dimension where bytes were dequantised."""
    if not log_p.isfinite().all():
        raise ValueError(f"likelihood: log p of {(~log_p.isfinite()).sum()} of {len(log_p)} samples is not finite")
    shape = tuple(data.sample().x.shape[1:])
    bits = bits_per_dim(log_p, shape, levels=data.levels).mean().item() if isinstance(data, Dequantised) else None
    error = (log_p.std() / len(log_p) ** 0.5).item() if len(log_p) > 1 else None
    return {"samples": len(log_p), "shape": list(shape), "nats": -log_p.mean().item(), "error": error, "bits_per_dim": bits}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown, runs of one model together: mean and standard deviation over them."""

    def kind(row: dict[str, Any]) -> tuple[str, int, int]:
        return row["model"], row["parameters"], row["step"] or 0

    def spread(group: list[dict[str, Any]], key: str, digits: int) -> str:
        values = [row[key] for row in group if row[key] is not None]
        if not values:
            return "-"
        return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")

    lines = ["| model | parameters | steps | seconds | nats | bits/dim | runs |", "|---|---|---|---|---|---|---|"]
    for (model, weights, step), members in groupby(sorted(rows, key=kind), kind):
        group = list(members)
        cells = [spread(group, "seconds", 0), spread(group, "nats", 3), spread(group, "bits_per_dim", 3), str(len(group))]
        lines.append(f"| {model} | {weights:,} | {step:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
