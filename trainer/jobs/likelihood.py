"""The likelihood of held-out samples under runs that have a density, in one table."""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, IndexedDataset, check_one_size
from data.dequantised import Dequantised
from data.files import write_json
from data.latents import Latents
from data.plane import Plane
from data.progress import Meter
from models import normalizing_flow as flows
from models.checkpoint import load_checkpoint, newest_checkpoint, read_checkpoint
from models.condition import Condition
from models.denoiser import Denoiser
from models.diffusers.text import with_prompts
from models.likelihood import AdaptiveSolver, Exact, Hutchinson, bits_per_dim, log_prob
from trainer.compatibility import check_density_data, check_latents_codec
from trainer.jobs.device import choose_device
from trainer.run_log import read_log

DATASETS = (Dequantised, Latents, Plane)  # imported so that --data finds them by their short names


class MeasuredBatch(NamedTuple):
    """The likelihood of a batch."""

    log_p: Tensor  # natural logarithm of the density of each sample, (B,)
    nfe: int | None  # network evaluations per sample; None: they are not counted


Density = Callable[[Batch], MeasuredBatch]


def likelihood(
    run: list[Path] | Path,
    data: IndexedDataset,
    out: Path,
    samples: int = 1024,
    probes: int = 0,
    tolerance: float = 1e-4,
    bound: float = 1e-2,
    seed: int = 0,
    batch: int = 256,
    prompts: Path | None = None,
) -> None:
    """Measure -log p of held-out samples under runs that have a density.

    Writes a JSON file and prints a table, in nats per sample. The density of a generator is that
    of its probability-flow ODE; a normalising flow defines its density. For Dequantised images the
    table also has bits per dimension, an upper bound on the bits per grey level. The density of
    Latents is that of the latents, not of the images.

    Args:
        run: run folder or checkpoint, or several; runs that differ only in their seeds share a row
            of the table.
        data: samples that the runs were not trained on (Dequantised, Plane or Latents).
        out: the JSON file to write.
        samples: number of samples, starting with the first; all if there are fewer.
        probes: vectors of Hutchinson's estimate of the trace; 0 computes the trace exactly, with a
            backward pass for each dimension. Continuous flows always compute it exactly.
        tolerance: absolute and relative tolerance of the adaptive solver of a generator's ODE.
            Flows keep their tolerance.
        bound: largest accepted error of that solver, in nats per dimension. The error is estimated
            by the distance to a less accurate solution, which overestimates it.
        seed: seed of the vectors.
        batch: samples measured at once.
        prompts: for text-to-image networks: a text file with a prompt for each class, one on each
            line; by default the prompts that they were trained on.
    """
    # Check the options.
    if samples < 1 or batch < 1 or probes < 0:
        raise ValueError(
            f"likelihood: samples is {samples}, batch {batch} and probes {probes}; "
            "samples and batch must be at least 1, probes at least 0"
        )
    runs = run if isinstance(run, list) else [run]
    if not runs:
        raise ValueError("likelihood: run is an empty list; give at least one run folder")
    check_one_size(data, "`rectify likelihood`")

    # Measure the runs.
    count = min(samples, data.manifest["samples"])
    settings = {"probes": probes, "tolerance": tolerance, "bound": bound, "seed": seed}
    results = []
    with Meter("likelihood", len(runs) * count, "samples") as meter:
        for path in runs:
            batches = list(read_batches(data, count, batch))
            results.append(measure_run(path, batches, data, settings, prompts, meter))

    # Report them.
    write_json(out, {"format": 1, "data": repr(data), **settings, "runs": results})
    print(f"{data!r}, {count} samples\n\n{format_table(results)}")


def read_batches(data: IndexedDataset, count: int, batch: int) -> Iterator[Batch]:
    """Yield samples 0 .. count - 1 in order, in batches."""
    for start in range(0, count, batch):
        yield data.read(np.arange(start, min(count, start + batch)))


def measure_run(
    run: Path,
    batches: list[Batch],
    data: IndexedDataset,
    settings: dict[str, Any],
    prompts: Path | None,
    meter: Meter,
) -> dict[str, Any]:
    """Return the result of one run: its description, the metrics and the largest NFE of a batch.

    Args:
        run: run folder or checkpoint.
        batches: the samples.
        data: the dataset that they are from.
        settings: probes, tolerance, bound and seed.
        prompts: file of prompts, or None.
        meter: counts samples.
    """
    device = choose_device()
    loaded = load_density(run, settings, data, prompts, device)
    parts = []
    evaluations = []
    for batch in batches:
        log_p, nfe = loaded.density(batch.to(device))
        parts.append(log_p.detach().double().cpu())
        if nfe is not None:
            evaluations.append(nfe)
        meter.add(len(log_p))
    return {
        "run": str(run),
        **loaded.description,
        **summarize(torch.cat(parts), data),
        "nfe": max(evaluations, default=None),
    }


class LoadedDensity(NamedTuple):
    """A run's density and its description: model, parameters, step, seconds of training."""

    density: Density
    description: dict[str, Any]


def load_density(
    run: Path,
    settings: dict[str, Any],
    data: IndexedDataset,
    prompts: Path | None,
    device: torch.device,
) -> LoadedDensity:
    """Load a run's density.

    Args:
        run: run folder or checkpoint.
        settings: probes, tolerance, bound and seed.
        data: what will be measured.
        prompts: file of prompts, or None.
        device: where the density is computed.

    Raises:
        ValueError: the run has no density, or was trained on data of another shape.
    """
    # The model.
    file = newest_checkpoint(run)
    checkpoint = read_checkpoint(file, tensors=False)
    if "flow" in checkpoint["rectify"]:
        flow = flows.load_flow(file).to(device)
        density = flow_density(flow)
        name = type(flow).__name__
        shape = flow.shape
        weights = list(flow.parameters())
    elif "denoiser" in checkpoint["rectify"]:
        denoiser, codec, condition = load_checkpoint(file)
        if isinstance(data, Latents):
            check_latents_codec(data.manifest, f"run: that of {run}", codec, data)
        condition = with_prompts(condition, prompts, run)
        density = denoiser_density(denoiser.to(device), condition, settings, device)
        name = f"{denoiser.interpolant!r} + {denoiser.prediction!r}"
        shape = denoiser.shape
        weights = list(denoiser.parameters())
    else:
        raise ValueError(
            f"{file}: has no density, because it holds neither a denoiser nor a flow "
            "(is it an autoencoder's run?); give a generator's or a flow's run"
        )
    check_density_data(data, shape)

    # Its description.
    log = file.parent.parent / "metrics.jsonl"
    description = {
        "model": name,
        "parameters": sum(weight.numel() for weight in weights),
        "step": checkpoint.get("global_step"),
        "seconds": training_seconds(log) if log.is_file() else None,
    }
    return LoadedDensity(density, description)


def training_seconds(log: Path) -> float | None:
    """Return the seconds of training in a log, or None if the log is empty.

    The log's clock starts again at 0 when a run is resumed: the last time before each restart
    counts.
    """
    times = [values["seconds"] for _, values in read_log(log)]
    if not times:
        return None
    total = 0.0
    for time, following in zip(times, [*times[1:], 0.0]):
        if following < time:
            total += time
    return total


def flow_density(flow: flows.Flow) -> Density:
    """Return the density of a normalising flow."""

    def density(batch: Batch) -> MeasuredBatch:
        return MeasuredBatch(flow.log_prob(batch.x, exact=True), None)

    return density


def denoiser_density(
    denoiser: Denoiser, condition: Condition, settings: dict[str, Any], device: torch.device
) -> Density:
    """Return the density of a denoiser's probability-flow ODE.

    Args:
        denoiser: the denoiser.
        condition: its condition.
        settings: probes, tolerance, bound and seed.
        device: where random vectors are drawn.
    """
    generator = torch.Generator(device).manual_seed(settings["seed"])
    trace = Hutchinson(generator, settings["probes"]) if settings["probes"] else Exact()
    solver = AdaptiveSolver(settings["tolerance"], settings["tolerance"])

    def density(batch: Batch) -> MeasuredBatch:
        cond = condition(batch.condition)
        tolerance = settings["bound"]
        found = log_prob(denoiser, batch.x, cond, trace, solver, tolerance=tolerance)
        return MeasuredBatch(found.log_p, found.nfe)

    return density


def summarize(log_p: Tensor, data: IndexedDataset) -> dict[str, Any]:
    """Return the mean of -log p, its standard error, and for dequantised data bits per dimension.

    Args:
        log_p: log densities of the samples, (n,).
        data: the dataset that they are from.

    Raises:
        ValueError: a log density is not finite.
    """
    if not log_p.isfinite().all():
        raise ValueError(
            f"likelihood: log p of {(~log_p.isfinite()).sum()} of {len(log_p)} samples "
            "is not finite; are they of the distribution that the run was trained on?"
        )
    shape = tuple(data.sample().x.shape[1:])
    bits = None
    if isinstance(data, Dequantised):
        bits = bits_per_dim(log_p, shape, levels=data.levels).mean().item()
    error = None
    if len(log_p) > 1:
        error = (log_p.std() / len(log_p) ** 0.5).item()
    return {
        "samples": len(log_p),
        "shape": list(shape),
        "nats": -log_p.mean().item(),
        "error": error,
        "bits_per_dim": bits,
    }


def format_table(results: list[dict[str, Any]]) -> str:
    """Return the results as a Markdown table, with a row for all runs of one model."""
    lines = [
        "| model | parameters | steps | seconds | nats | bits/dim | runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, parameters, step), group in groupby(sorted(results, key=_model), _model):
        runs = list(group)
        cells = [
            model,
            f"{parameters:,}",
            f"{step:,}",
            _format_spread(runs, "seconds", 0),
            _format_spread(runs, "nats", 3),
            _format_spread(runs, "bits_per_dim", 3),
            str(len(runs)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _model(result: dict[str, Any]) -> tuple[str, int, int]:
    """Return what runs that differ only in their seeds have in common."""
    return result["model"], result["parameters"], result["step"] or 0


def _format_spread(results: list[dict[str, Any]], key: str, digits: int) -> str:
    """Return the mean and the standard deviation of a metric over runs."""
    values = [result[key] for result in results if result[key] is not None]
    if not values:
        return "-"
    text = f"{mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text
