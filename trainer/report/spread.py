"""Quality against network evaluations of models that were trained with several seeds: a table, a plot, the figures as JSON."""

import io
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from data.files import atomic, write_json
from data.form import COUNT
from trainer.report.summary import EVALUATION, read

BEGIN, END = "<!-- written by rectify table, from here -->", "<!-- to here -->"
MEASURES = ("fd", "accuracy", "recall", "precision")
FORM = {**EVALUATION, "reference": str, "settings": {"samples": COUNT, "guidance": float, "seed": COUNT, "sampler": str}}


def gather(runs: Path) -> dict[str, Any]:
    """Return the figures of all evaluations RUNS/MODEL/SEED/SAMPLER/evaluation.json: median, least and largest over the seeds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: two that are to be compared differ in what was measured, or in the steps.
    """
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for path in sorted(runs.glob("*/*/*/evaluation.json")):
        model, seed, sampler = path.relative_to(runs).parts[:3]
        found.setdefault(model, {}).setdefault(sampler, {})[seed] = read(path, FORM)
    if not found:
        raise FileNotFoundError(f"{runs}: no MODEL/SEED/SAMPLER/evaluation.json below it; run `rectify evaluate` first")
    every = [one for samplers in found.values() for seeds in samplers.values() for one in seeds.values()]
    kept = ("samples", "guidance", "seed")
    terms = [
        {"reference": one["reference"], "features": one.get("features"), **{key: one["settings"][key] for key in kept}}
        for one in every
    ]
    if other := next((term for term in terms if term != terms[0]), None):
        raise ValueError(f"{runs}: evaluations of {terms[0]} and of {other} cannot be compared; make them again, all alike")
    models = {model: {s: spread(seeds, f"{runs / model}: {s}") for s, seeds in by.items()} for model, by in found.items()}
    return {"format": 1, **terms[0], "floors": every[0]["floors"], "models": models}


def spread(seeds: dict[str, dict[str, Any]], where: str) -> dict[str, Any]:
    """Return, by steps, the evaluations and each measure's median, least and largest over the seeds, and its values."""
    runs = [one["steps"] for one in seeds.values()]
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError(f"{where}: its seeds {', '.join(seeds)} were evaluated at different steps; make them again, all alike")
    rows: dict[str, Any] = {}
    for steps in sorted(runs[0], key=int):
        rows[steps] = {"nfe": runs[0][steps]["nfe"]}
        for name in MEASURES:
            values = [run[steps][name] for run in runs if name in run[steps]]
            if values:
                ends = {"median": statistics.median(values), "least": min(values), "largest": max(values)}
                rows[steps][name] = {**ends, "values": dict(zip(seeds, values))}
    return rows


def cell(value: dict[str, float]) -> str:
    """Return a measure's median, least and largest."""
    median, least, largest = (f"{value[key]:.{2 if value[key] < 100 else 0}f}" for key in ("median", "least", "largest"))
    return f"{median} ({least} to {largest})"


def markdown(found: dict[str, Any]) -> str:
    """Return one table for each sampler: a row for each model, a column for each number of evaluations."""
    samplers = dict.fromkeys(sampler for by in found["models"].values() for sampler in by)
    parts = []
    for sampler in samplers:
        models = {model: by[sampler] for model, by in found["models"].items() if sampler in by}
        nfes = sorted({row["nfe"] for rows in models.values() for row in rows.values()})
        lines = [f"**{sampler}**, FD at NFE", "", f"| model | {' | '.join(map(str, nfes))} | accuracy, recall at the most |"]
        lines.append("|---" * (len(nfes) + 2) + "|")
        for model, rows in models.items():
            by_nfe = {row["nfe"]: row for row in rows.values()}
            cells = [cell(by_nfe[nfe]["fd"]) if nfe in by_nfe else "" for nfe in nfes]
            most = by_nfe[max(by_nfe)]
            last = ", ".join(f"{most[name]['median']:.3f}" for name in ("accuracy", "recall") if name in most)
            lines.append(f"| {model} | {' | '.join(cells)} | {last} |")
        parts.append("\n".join(lines))
    floors = found["floors"]
    parts.append(
        f"Medians over the seeds (least to largest), {found['samples']} samples each; floors: FD of the autoencoder alone "
        f"{floors['autoencoder']:.3f}, of as many real images drawn with replacement {floors['bootstrap']:.2f}."
    )
    return "\n\n".join(parts)


def plot(found: dict[str, Any]) -> bytes:
    """Return FD against network evaluations as PNG: a panel for each model, a line for each sampler, bands over the seeds."""
    matplotlib.use("agg")
    models = found["models"]
    figure = Figure(figsize=(3.2 * len(models) + 0.6, 3.4), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for by in models.values() for name in by))}
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, (model, by) in zip(panels, models.items()):
        for sampler, rows in by.items():
            nfe = [row["nfe"] for row in rows.values()]
            median, least, largest = ([row["fd"][key] for row in rows.values()] for key in ("median", "least", "largest"))
            axes.plot(nfe, median, "o-", markersize=3, color=colours[sampler], label=sampler)
            axes.fill_between(nfe, least, largest, color=colours[sampler], alpha=0.25, linewidth=0)
        axes.axhline(found["floors"]["bootstrap"], linestyle=":", color="grey", label="real images, drawn again")
        axes.set(title=model, xlabel="network evaluations per sample", xscale="log", yscale="log")
        axes.set_xticks(ticks := [1, 2, 4, 8, 16, 32], map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Frechet distance")
    panels[-1].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def table(runs: Path, out: Path) -> None:
    """Tabulate evaluated models over their seeds: a part of the Markdown file OUT, with JSON and a plot of its name beside it.

    Evaluations lie in RUNS/MODEL/SEED/SAMPLER, where `rectify evaluate --out RUNS/MODEL/SEED` with a list of samplers puts them.
    Of a file that is there already, only what stands between the two marks is replaced; a file without them is refused.

    Args:
        runs: folder of the evaluations.
        out: the Markdown file; OUT's .json and .png are written beside it.
    """
    found = gather(runs)
    before, after = "", ""
    if out.exists():
        text = out.read_text()
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{out}: has no lines `{BEGIN}` and `{END}`: nothing of it is replaced; add them, or choose another")
    written = f"{BEGIN}\n\n![FD against network evaluations]({out.stem}.png)\n\n{markdown(found)}\n\n{END}"
    write_json(out.with_suffix(".json"), found)
    with atomic(out.with_suffix(".png")) as file:
        file.write(plot(found))
    with atomic(out) as file:
        file.write(f"{before}{written}{after or chr(10)}".encode())
    print(markdown(found))
