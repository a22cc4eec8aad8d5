"""`rectify report`: one self-contained HTML file about a pipeline.

It shows sample grids, quality against network evaluations, loss curves, and what was run.
"""

import base64
import importlib.metadata
import io
import platform
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import matplotlib.image
from matplotlib.figure import Figure

from data.files import atomic_file, errors_named, write_json
from deploy.report.summary import (
    QUALITY_COLUMNS,
    column,
    models_by_steps,
    quality_rows,
    read_stages,
    run_log,
    summarize,
    summary_lines,
)

LISTED_PACKAGES = (
    "torch",
    "lightning",
    "diffusers",
    "accelerate",
    "webdataset",
    "numpy",
    "torchmetrics",
    "rectify",
)
FLOOR_STYLES = {"autoencoder": "--", "bootstrap": ":"}


def embed(data: bytes) -> str:
    """Return PNG bytes as a data URL."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def embed_figure(figure: Figure) -> str:
    """Return a figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return embed(buffer.getvalue())


def plot_quality(summary: dict[str, Any]) -> str:
    """Plot Frechet distance and accuracy against network evaluations, with the floors."""
    figure = Figure(figsize=(10, 3.6))
    labels = {"fd": "Frechet distance", "accuracy": "accuracy on the requested class"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items()):
        # a line for each model
        for name, by_steps in models_by_steps(summary).items():
            rows = [row for row in by_steps.values() if key in row]
            ticks = column(rows, "nfe")
            axes.plot(ticks, column(rows, key), "o-", label=name)

        # the axes
        axes.set(xscale="log", xlabel="network evaluations per sample", ylabel=label)
        axes.set_xticks(ticks, map(str, ticks), minor=False)
        axes.minorticks_off()

        # the floors
        if key == "fd":
            axes.set_yscale("log")
            for name, style in FLOOR_STYLES.items():
                floor = summary["floors"][name]
                axes.axhline(floor, linestyle=style, color="grey", label=f"floor: {name}")
        axes.legend()
        axes.grid(alpha=0.3)
    return embed_figure(figure)


def plot_losses(logs: dict[str, list[dict[str, Any]]]) -> str:
    """Plot the loss of every run."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    panels = figure.subplots(1, len(logs), squeeze=False)[0]
    for axes, (name, lines) in zip(panels, logs.items()):
        axes.plot(column(lines, "step"), column(lines, "loss"), linewidth=0.8)
        axes.set(title=name, xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss")
    return embed_figure(figure)


def plot_overview(run: Path, summary: dict[str, Any]) -> bytes:
    """Return samples of every model at its fewest and its most steps, as one PNG."""
    shown = []
    for name, by_steps in models_by_steps(summary).items():
        shown.append((name, min(by_steps)))
        shown.append((name, max(by_steps)))
    figure = Figure(figsize=(11, 2.1), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, steps) in zip(panels, shown):
        path = run / "evaluation" / name / f"samples-{steps}.png"
        with errors_named(path):
            axes.imshow(matplotlib.image.imread(path), cmap="gray")
        fd = summary[name][str(steps)]["fd"]
        axes.set_title(f"{name}, {steps} step{'s' * (steps > 1)}: FD {fd:.2f}", fontsize=10)
        axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def embed_grids(run: Path, summary: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the sample grids of every model, by number of steps, as data URLs."""
    grids: dict[str, dict[str, str]] = {}
    for name, by_steps in models_by_steps(summary).items():
        grids[name] = {}
        for steps in by_steps:
            path = run / "evaluation" / name / f"samples-{steps}.png"
            grids[name][str(steps)] = embed(path.read_bytes())
    return grids


def report(run: Path) -> None:
    """Summarise a pipeline's folder as a web page.

    It writes RUN/summary.json, RUN/overview.png and RUN/report.html, which needs no other file.

    Args:
        run: folder that `rectify run` has filled, with evaluations, runs with their logs and
            configurations, perhaps an export, and perhaps the pipeline's file, pipeline.yaml,
            whose targets are checked.
    """
    matplotlib.use("agg")
    summary = summarize(run)
    write_json(run / "summary.json", summary)

    # collect what the page shows
    logs = {}
    for path in sorted(run.glob("*/metrics.jsonl")):
        lines = run_log(path.parent)
        logs[path.parent.name] = [values for values in lines if "loss" in values]
    configs = {}
    for path in sorted(run.glob("*/config.yaml")):
        configs[path.parent.name] = path.read_text(errors="replace")
    overview = plot_overview(run, summary)
    stages = read_stages(run).values()

    # write the page
    loader = jinja2.PackageLoader("deploy.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True)
    page = environment.get_template("page.html.j2").render(
        run=run.name,
        columns=QUALITY_COLUMNS,
        rows=quality_rows(summary),
        notes=summary_lines(summary),
        overview=embed(overview),
        quality=plot_quality(summary),
        losses=plot_losses(logs) if logs else None,
        grids=embed_grids(run, summary),
        targets=summary.get("targets", {}),
        stages=stages,
        seconds=sum(column(stages, "seconds")),
        versions=dict(zip(LISTED_PACKAGES, map(importlib.metadata.version, LISTED_PACKAGES))),
        python=platform.python_version(),
        configs=configs,
    )
    with atomic_file(run / "overview.png") as file:
        file.write(overview)
    with atomic_file(run / "report.html") as file:
        file.write(page.encode())
