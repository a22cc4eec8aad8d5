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

BEGIN, END = "<!-- {}, written by rectify, from here -->", "<!-- {}, to here -->"
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
    terms = alike([one for samplers in found.values() for seeds in samplers.values() for one in seeds.values()], str(runs))
    models = {model: {s: spread(seeds, f"{runs / model}: {s}") for s, seeds in by.items()} for model, by in found.items()}
    return {"format": 1, **terms, "models": models}


def alike(evaluations: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """Return what evaluations that are to be compared were measured by, and their floors; refuse those that differ in it."""
    kept = ("samples", "guidance", "seed")
    terms = [
        {"reference": one["reference"], "features": one.get("features"), **{key: one["settings"][key] for key in kept}}
        for one in evaluations
    ]
    if other := next((term for term in terms if term != terms[0]), None):
        raise ValueError(f"{where}: evaluations of {terms[0]} and of {other} cannot be compared; make them again, all alike")
    return {**terms[0], "floors": evaluations[0]["floors"]}


def spread(seeds: dict[str, dict[str, Any]], where: str) -> dict[str, Any]:
    """Return, by steps, the evaluations and each measure's median, least and largest over the seeds, and its values."""
    runs = [one["steps"] for one in seeds.values()]
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError(f"{where}: its seeds {', '.join(seeds)} were evaluated at different steps; make them again, all alike")
    rows: dict[str, Any] = {}
    for steps in sorted(runs[0], key=int):
        rows[steps] = {"nfe": runs[0][steps]["nfe"]}
        for name in MEASURES:
            values = {seed: one["steps"][steps][name] for seed, one in seeds.items() if name in one["steps"][steps]}
            if values:
                rows[steps][name] = {**ends(values), "values": values}
    return rows


def ends(values: dict[str, float]) -> dict[str, float]:
    """Return the median, the least and the largest of a measure over the seeds."""
    return {"median": statistics.median(values.values()), "least": min(values.values()), "largest": max(values.values())}


def cell(value: dict[str, float]) -> str:
    """Return a measure's median, and the least and largest if they differ from it."""
    median, least, largest = (f"{value[key]:.{2 if value[key] < 100 else 0}f}" for key in ("median", "least", "largest"))
    return f"{median} ({least} to {largest})" if value["least"] < value["largest"] else median


def replaced(text: str, what: str, new: str, path: Path, heading: str = "") -> str:
    """Return a text with what stands between the two marks of a part replaced; a heading and the part itself begin an empty one.

    Raises:
        ValueError: the text has not the marks.
    """
    begin, end = BEGIN.format(what), END.format(what)
    if begin not in text and (not text or heading):
        text = f"{text}{chr(10) * 2 if text else ''}{heading}{chr(10) * 2 if heading else ''}{begin}{end}{chr(10)}"
    before, begun, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{path}: has no lines `{begin}` and `{end}`: nothing of it is replaced; add them, or choose another")
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


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
    table = f"![FD against network evaluations]({out.stem}.png)\n\n{markdown(found)}"
    text = replaced(out.read_text() if out.exists() else "", "table", table, out)
    write_json(out.with_suffix(".json"), found)
    with atomic(out.with_suffix(".png")) as file:
        file.write(plot(found))
    with atomic(out) as file:
        file.write(text.encode())
    print(markdown(found))
