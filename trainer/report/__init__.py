"""The report: one self-contained HTML file with sample grids, quality against NFE, loss curves, and what was run."""

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

from data.files import atomic, naming, write_json
from trainer.report.summary import models, read_stages, run_log, summarize, table

SHOWN = ("torch", "lightning", "diffusers", "accelerate", "webdataset", "numpy", "torchmetrics", "rectify")


def embed(data: bytes) -> str:
    """Return PNG bytes as a data URL."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def drawn(figure: Figure) -> str:
    """Return a figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return embed(buffer.getvalue())


def quality(summary: dict[str, Any]) -> str:
    """Plot Frechet distance and accuracy against network evaluations, with the floors."""
    figure = Figure(figsize=(10, 3.6))
    for axes, key, label in zip(figure.subplots(1, 2), ("fd", "accuracy"), ("Frechet distance", "accuracy on the asked class")):
        for name, by_steps in models(summary):
            rows = [row for _, row in by_steps if key in row]
            axes.plot([row["nfe"] for row in rows], [row[key] for row in rows], "o-", label=name)
        axes.set(xscale="log", xlabel="network evaluations per sample", ylabel=label)
        axes.set_xticks(ticks := [row["nfe"] for row in rows], [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        if key == "fd":
            axes.set_yscale("log")
            for (name, value), style in zip(summary["floors"].items(), ("--", "", ":")):
                if style:
                    axes.axhline(value, linestyle=style, color="grey", label=f"floor: {name}")
        axes.legend()
        axes.grid(alpha=0.3)
    return drawn(figure)


def losses(logs: dict[str, list[dict[str, Any]]]) -> str:
    """Plot every run's loss."""
    figure = Figure(figsize=(10, 2.8), layout="constrained")
    panels = figure.subplots(1, len(logs), squeeze=False)[0]
    for axes, (name, lines) in zip(panels, logs.items()):
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=0.8)
        axes.set(title=name, xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss")
    return drawn(figure)


def overview(run: Path, summary: dict[str, Any]) -> bytes:
    """Return the picture for a first screen, as PNG: every model's samples at its fewest and its most steps."""
    shown = [(name, steps[at][0]) for name, steps in models(summary) for at in (0, -1)]
    figure = Figure(figsize=(11, 2.1), layout="constrained")
    for axes, (name, steps) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        path = run / "evaluation" / name / f"samples-{steps}.png"
        with naming(path):
            axes.imshow(matplotlib.image.imread(path), cmap="gray")
        row = summary[name][str(steps)]
        axes.set_title(f"{name}, {steps} step{'s' * (steps > 1)}: FD {row['fd']:.2f}", fontsize=10)
        axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def report(run: Path) -> None:
    """Write RUN/summary.json, RUN/overview.png and the self-contained RUN/report.html of a pipeline's folder.

    Args:
        run: the folder that `rectify run` filled: evaluations, runs with their logs and configurations, the export.
    """
    matplotlib.use("agg")
    summary = summarize(run)
    write_json(run / "summary.json", summary)
    found = {path.parent.name: run_log(path.parent) for path in sorted(run.glob("*/metrics.jsonl"))}
    logs = {name: [values for values in log if "loss" in values] for name, log in found.items()}
    grids = {
        name: {
            path.stem.partition("-")[2]: embed(path.read_bytes())
            for path in [run / "evaluation" / name / f"samples-{steps}.png" for steps, _ in rows]
        }
        for name, rows in models(summary)
    }
    picture = overview(run, summary)
    stages = read_stages(run).values()
    environment = jinja2.Environment(loader=jinja2.PackageLoader("trainer.report", "."), autoescape=True)
    page = environment.get_template("page.html.j2").render(
        run=run.name,
        table=table(summary),
        overview=embed(picture),
        quality=quality(summary),
        losses=losses(logs) if logs else None,
        grids=grids,
        targets=summary.get("targets", {}),
        stages=stages,
        seconds=sum(stage["seconds"] for stage in stages),
        versions={name: importlib.metadata.version(name) for name in SHOWN},
        python=platform.python_version(),
        configs={path.parent.name: path.read_text(errors="replace") for path in sorted(run.glob("*/config.yaml"))},
    )
    with atomic(run / "overview.png") as file:
        file.write(picture)
    with atomic(run / "report.html") as file:
        file.write(page.encode())
