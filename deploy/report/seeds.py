"""`rectify report seeds`: quality against network evaluations for models of several seeds.

It writes a table into a Markdown file, and the figures beside it as JSON and as a plot.
"""

import io
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from data.files import atomic_file, write_json
from data.schema import COUNT
from deploy.report.summary import EVALUATION_SCHEMA, column, read_checked

# Markers of a part of a Markdown file that is replaced.
BEGIN = "<!-- begin {}, written by rectify -->"
END = "<!-- end {} -->"
MEASURES = ("fd", "accuracy", "recall", "precision")
SPREAD = ("median", "least", "largest")
STEP_TICKS = [1, 2, 4, 8, 16, 32]  # of plots
SEED_SCHEMA = {
    **EVALUATION_SCHEMA,
    "reference": str,
    "settings": {"samples": COUNT, "guidance": float, "seed": COUNT, "sampler": str},
}


def gather(runs: Path) -> dict[str, Any]:
    """Return the median, least and largest figures over the seeds, by model, sampler and steps.

    The evaluations are RUNS/MODEL/SEED/SAMPLER/evaluation.json.

    Raises:
        FileNotFoundError: there are none.
        ValueError: two evaluations were measured differently, or at different steps.
    """
    # read the evaluations
    by_model: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    evaluations = []
    for path in sorted(runs.glob("*/*/*/evaluation.json")):
        model, seed, sampler = path.relative_to(runs).parts[:3]
        evaluation = read_checked(path, SEED_SCHEMA)
        evaluations.append(evaluation)
        by_model.setdefault(model, {}).setdefault(sampler, {})[seed] = evaluation
    if not evaluations:
        raise FileNotFoundError(
            f"{runs}: there is no MODEL/SEED/SAMPLER/evaluation.json in it; "
            "run `rectify evaluate` first"
        )

    # summarise them over the seeds
    conditions = common_conditions(evaluations, str(runs))
    models: dict[str, Any] = {}
    for model, by_sampler in by_model.items():
        models[model] = {}
        for sampler, by_seed in by_sampler.items():
            models[model][sampler] = spread(by_seed, f"{runs / model}: {sampler}")
    return {"format": 1, **conditions, "models": models}


def common_conditions(evaluations: list[dict[str, Any]], where: str) -> dict[str, Any]:
    """Return how evaluations were measured, and their floors.

    Raises:
        ValueError: two were measured differently.
    """
    conditions = []
    for evaluation in evaluations:
        condition = {"reference": evaluation["reference"], "features": evaluation.get("features")}
        for key in ("samples", "guidance", "seed"):
            condition[key] = evaluation["settings"][key]
        conditions.append(condition)
    first = conditions[0]
    for condition in conditions:
        if condition != first:
            raise ValueError(
                f"{where}: evaluations with {first} and with {condition} cannot be compared; "
                "evaluate all of them with the same settings"
            )
    return {**first, "floors": evaluations[0]["floors"]}


def spread(by_seed: dict[str, dict[str, Any]], where: str) -> dict[str, Any]:
    """Return, by steps, the network evaluations, and the spread and values of each measure.

    Raises:
        ValueError: the seeds were evaluated at different steps.
    """
    runs = column(by_seed.values(), "steps")
    if any(run.keys() != runs[0].keys() for run in runs):
        raise ValueError(
            f"{where}: its seeds {', '.join(by_seed)} were evaluated at different steps; "
            "evaluate all of them at the same steps"
        )
    rows: dict[str, Any] = {}
    for steps in sorted(runs[0], key=int):
        rows[steps] = {"nfe": runs[0][steps]["nfe"]}
        for measure in MEASURES:
            values = {}
            for seed, evaluation in by_seed.items():
                if measure in evaluation["steps"][steps]:
                    values[seed] = evaluation["steps"][steps][measure]
            if values:
                rows[steps][measure] = {**median_and_range(values), "values": values}
    return rows


def median_and_range(values: dict[str, float]) -> dict[str, float]:
    """Return the median, the least and the largest of a measure over the seeds."""
    return {
        "median": statistics.median(values.values()),
        "least": min(values.values()),
        "largest": max(values.values()),
    }


def cell(value: dict[str, float]) -> str:
    """Return a measure's text: its median, and its range if it has one."""
    texts = []
    for key in SPREAD:
        digits = 2 if value[key] < 100 else 0
        texts.append(f"{value[key]:.{digits}f}")
    median, least, largest = texts
    if value["least"] < value["largest"]:
        return f"{median} ({least} to {largest})"
    return median


def replace_part(text: str, part: str, new: str, path: Path, heading: str = "") -> str:
    """Return a Markdown text with the lines between the two markers of a part replaced.

    In an empty text the part is added, and so is a part with a heading that the text lacks.

    Args:
        text: the whole text.
        part: name of the part, which is in its markers.
        new: the part's new text.
        path: the text's file, for the error.
        heading: line above a part that is added.

    Raises:
        ValueError: the text does not have the markers.
    """
    begin = BEGIN.format(part)
    end = END.format(part)
    if begin not in text and (not text or heading):
        text = f"{text}\n\n" if text else ""
        if heading:
            text += f"{heading}\n\n"
        text += f"{begin}{end}\n"
    before, found_begin, remainder = text.partition(begin)
    _, found_end, after = remainder.partition(end)
    if not (found_begin and found_end):
        raise ValueError(
            f"{path}: it has no lines `{begin}` and `{end}`, between which the table is written; "
            "add them, or choose another --out"
        )
    return f"{before}{begin}\n\n{new}\n\n{end}{after}"


def markdown(figures: dict[str, Any]) -> str:
    """Return a table for each sampler: a row per model, a column per network evaluations."""
    samplers: dict[str, None] = {}
    for by_sampler in figures["models"].values():
        samplers |= dict.fromkeys(by_sampler)
    parts = []
    for sampler in samplers:
        # the header
        models = {}
        for model, by_sampler in figures["models"].items():
            if sampler in by_sampler:
                models[model] = by_sampler[sampler]
        nfes = sorted({row["nfe"] for rows in models.values() for row in rows.values()})
        lines = [
            f"**{sampler}**, FD at NFE",
            "",
            f"| model | {' | '.join(map(str, nfes))} | accuracy, recall at the most |",
            "|---" * (len(nfes) + 2) + "|",
        ]

        # the rows
        for model, rows in models.items():
            by_nfe = {row["nfe"]: row for row in rows.values()}
            cells = [cell(by_nfe[nfe]["fd"]) if nfe in by_nfe else "" for nfe in nfes]
            most = by_nfe[max(by_nfe)]
            medians = []
            for measure in ("accuracy", "recall"):
                if measure in most:
                    medians.append(f"{most[measure]['median']:.3f}")
            lines.append(f"| {model} | {' | '.join(cells)} | {', '.join(medians)} |")
        parts.append("\n".join(lines))

    floors = figures["floors"]
    parts.append(
        f"Medians over the seeds (least to largest), {figures['samples']} samples each. "
        f"Floors: FD of the autoencoder alone {floors['autoencoder']:.3f}, "
        f"of a bootstrap sample of the real images {floors['bootstrap']:.2f}."
    )
    return "\n\n".join(parts)


def plot_band(
    axes: Any, x: Iterable[float], spreads: list[dict[str, float]], label: str, colour: Any
) -> None:
    """Plot the medians as a line, and the range over the seeds as a band around it."""
    x = list(x)
    axes.plot(x, column(spreads, "median"), "o-", markersize=3, color=colour, label=label)
    least = column(spreads, "least")
    largest = column(spreads, "largest")
    axes.fill_between(x, least, largest, color=colour, alpha=0.2, linewidth=0)


def plot(figures: dict[str, Any]) -> bytes:
    """Return FD against network evaluations as PNG: a panel per model, a line per sampler."""
    matplotlib.use("agg")
    models = figures["models"]
    figure = Figure(figsize=(3.2 * len(models) + 0.6, 3.4), layout="constrained")
    colours: dict[str, str] = {}
    for by_sampler in models.values():
        for sampler in by_sampler:
            colours.setdefault(sampler, f"C{len(colours)}")
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axes, (model, by_sampler) in zip(panels, models.items()):
        # a line and a band over the seeds for each sampler
        for sampler, rows in by_sampler.items():
            ordered = sorted(rows.values(), key=lambda row: row["nfe"])
            spreads = column(ordered, "fd")
            plot_band(axes, column(ordered, "nfe"), spreads, sampler, colours[sampler])

        # the floor, and the axes
        bootstrap = figures["floors"]["bootstrap"]
        axes.axhline(bootstrap, linestyle=":", color="grey", label="real images (bootstrap)")
        axes.set(title=model, xlabel="network evaluations per sample", xscale="log", yscale="log")
        axes.set_xticks(STEP_TICKS, map(str, STEP_TICKS))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("Frechet distance")
    panels[-1].legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def report_seeds(runs: Path, out: Path) -> None:
    """Tabulate evaluations of models that were trained with several seeds.

    The table has the median, least and largest Frechet distance over the seeds. It is written
    between two markers in the Markdown file OUT, whose other text is kept.

    Args:
        runs: folder of the evaluations RUNS/MODEL/SEED/SAMPLER/evaluation.json. They are written by
            `rectify evaluate --sampler [DDIM,Heun] --out RUNS/MODEL/SEED`, with any list of
            samplers.
        out: the Markdown file: a new one, or one with the markers. The figures are written beside
            it as .json and as a plot, .png.
    """
    figures = gather(runs)
    table = markdown(figures)
    part = f"![FD against network evaluations]({out.stem}.png)\n\n{table}"
    text = out.read_text() if out.exists() else ""
    text = replace_part(text, "table", part, out)
    write_json(out.with_suffix(".json"), figures)
    with atomic_file(out.with_suffix(".png")) as file:
        file.write(plot(figures))
    with atomic_file(out) as file:
        file.write(text.encode())
    print(table)
