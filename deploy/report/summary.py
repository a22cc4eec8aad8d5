"""The figures of a pipeline: summary.json, and the table that is printed."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from data.files import errors_named, files_by_step, read_json
from data.schema import COUNT, NAME, NUMBER, SHA256, check_schema
from deploy.targets import PIPELINE_RECORD, compare_with_targets, read_targets
from trainer.run_log import read_log

STEPS_SCHEMA = {"fd": float, "nfe": COUNT, "recall": float, "precision": float}
EVALUATION_SCHEMA = {
    "steps": {NUMBER: STEPS_SCHEMA},
    "first_orderness": float,
    "floors": {"autoencoder": float, "bootstrap": float},
}
MEASUREMENT_SCHEMA = {
    "features": {"extractor": str, "sha256": SHA256, "size": (None, COUNT), "resize": str},
    "reference": SHA256,
    "settings": {"samples": COUNT, "seed": int},
}
EXPORT_SCHEMA = {"max_abs_diff": float, "gaps": {NUMBER: {"native_grid": float}}}
QUALITY_COLUMNS = ("model", "steps", "NFE", "FD", "accuracy", "recall", "precision")
COLUMN_WIDTHS = (6, 6, 10, 10, 9, 11)  # of the printed table, after the model
STAGE_SCHEMA = {"words": [str], "seconds": float}


def read_checked(path: Path, schema: dict[Any, Any]) -> dict[str, Any]:
    """Read a JSON result and check it against a schema."""
    value = read_json(path)
    check_schema(value, schema, str(path))
    return value


def column(rows: Iterable[dict[str, Any]], key: str) -> list[Any]:
    """Return the values of a key, of the rows that have it."""
    return [row[key] for row in rows if key in row]


def read_stages(out: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a pipeline's finished stages, in order, by name."""
    stages = {}
    for path in sorted((out / "stages").glob("*.json")):
        stages[path.stem.partition("-")[2]] = read_checked(path, STAGE_SCHEMA)
    return stages


def summarize(out: Path) -> dict[str, Any]:
    """Return the summary of a pipeline's folder.

    It has the floors, an entry for each evaluated model, the export's differences, the costs, the
    seconds of the stages, and the targets of the pipeline if it has any.

    Raises:
        FileNotFoundError: nothing was evaluated.
        ValueError: a result is damaged, or a target names what the summary does not have.
    """
    # read the evaluations
    paths = sorted((out / "evaluation").glob("*/evaluation.json"))
    evaluations = {}
    for path in paths:
        evaluations[path.parent.name] = read_checked(path, EVALUATION_SCHEMA)
    if not evaluations:
        raise FileNotFoundError(
            f"{out / 'evaluation'}: there is no evaluation.json in it; run `rectify evaluate` first"
        )

    # floors, and quality by steps
    first = next(iter(evaluations.values()))
    summary: dict[str, Any] = {
        "format": 1,
        "floor": first["floors"]["autoencoder"],
        "floors": first["floors"],
    }
    key = "classifier_accuracy_heldout"
    if key in first:  # the images have classes
        check_schema(first, {key: float}, str(paths[0]))
        summary[key] = first[key]
    for name, evaluation in evaluations.items():
        summary[name] = evaluation["steps"]

    # trajectories, and drift from the real images
    first_orderness = {}
    straightness = {}
    drift: dict[str, dict[str, float]] = {}
    for name, evaluation in evaluations.items():
        first_orderness[name] = evaluation["first_orderness"]
        if "straightness" in evaluation:
            straightness[name] = evaluation["straightness"]
        for steps, row in evaluation["steps"].items():
            if "drift" in row:
                drift.setdefault(name, {})[steps] = row["drift"]
    summary["first_orderness"] = first_orderness
    summary["straightness"] = straightness
    summary["drift"] = drift
    schema = {"straightness": {NAME: float}, "drift": {NAME: {NUMBER: float}}}
    check_schema(summary, schema, str(out / "evaluation"))

    # the export
    path = out / "export" / "export.json"
    export: dict[str, Any] = {"max_abs_diff": None, "gaps": {}}
    if path.exists():
        export = read_checked(path, EXPORT_SCHEMA)
    summary["export_max_abs_diff"] = export["max_abs_diff"]
    summary["export_native_grid_diff"] = {}
    for steps, gap in export["gaps"].items():
        summary["export_native_grid_diff"][steps] = gap["native_grid"]

    # how it was measured, and what it cost
    summary["measured"] = {}
    for name, evaluation in evaluations.items():
        if "features" in evaluation:
            summary["measured"][name] = describe_measurement(evaluation, name)
    summary["cost"] = sum_costs(out)
    summary["seconds"] = {}
    for name, stage in read_stages(out).items():
        summary["seconds"][name] = stage["seconds"]

    # the targets
    targets = read_targets(out)
    if targets:
        where = f"{out / PIPELINE_RECORD}: targets"
        summary["targets"] = compare_with_targets(summary, targets, where)
    return summary


def describe_measurement(evaluation: dict[str, Any], name: str) -> str:
    """Return how an evaluation was measured: extractor, resize filter, reference, samples, seed."""
    check_schema(evaluation, MEASUREMENT_SCHEMA, f"evaluation of {name}")
    features = evaluation["features"]
    settings = evaluation["settings"]
    size = f" to {features['size']}" if features["size"] else ""
    return (
        f"{features['extractor']} {features['sha256'][:12]}, resize {features['resize']}{size}, "
        f"reference {evaluation['reference'][:12]}, "
        f"{settings['samples']} samples of seed {settings['seed']}"
    )


def run_log(run: Path) -> list[dict[str, Any]]:
    """Return the values of each line of a run's log.

    Raises:
        ValueError: the log ends before the newest checkpoint, so that lines were lost.
    """
    log = [values for _, values in read_log(run / "metrics.jsonl")]
    checkpoints = files_by_step(run / "checkpoints", ".ckpt")
    config_path = run / "config.yaml"
    if not (checkpoints and config_path.exists()):
        return log
    newest = checkpoints[-1]

    # compare its last step with the newest checkpoint's
    with errors_named(config_path):
        config = yaml.safe_load(config_path.read_text())
        step = int(newest.stem.removeprefix("step="))
        every = config["metrics"]["every"]
        last_step = config["trainer"]["max_steps"]
    reached = 0
    gap = every  # the largest: `metrics.every` may have been larger before a restart
    for values in log:
        if "loss" in values:
            gap = max(gap, values["step"] - reached)
            reached = values["step"]
    if reached < (step if step == last_step else step - gap + 1):
        raise ValueError(
            f"{run}/metrics.jsonl: it ends at step {reached}, but {newest.name} is newer; "
            "its last lines are lost: restore the file, or train again"
        )
    return log


def sum_costs(out: Path) -> dict[str, Any]:
    """Return the network evaluations, on one sample each, of a pipeline's pair sets and runs.

    Backward passes are not counted, nor is the evaluation of results.
    """
    stages: dict[str, int] = {}
    for path in sorted(out.glob("*/manifest.json")):
        manifest = read_json(path)
        if manifest.get("kind") == "pairs" and "evaluations" in manifest:
            check_schema(manifest, {"evaluations": COUNT}, str(path))
            stages[path.parent.name] = manifest["evaluations"]
    for path in sorted(out.glob("*/metrics.jsonl")):
        counts = column(run_log(path.parent), "evaluations")
        check_schema(counts, [COUNT], f"{path}: evaluations")
        if counts:
            stages[path.parent.name] = counts[-1]
    return {"evaluations": stages, "total": sum(stages.values())}


def models_by_steps(summary: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return every evaluated model, the teacher first, with its figures by rising steps."""
    models = {}
    for name in sorted(summary["first_orderness"], key=lambda name: (name != "teacher", name)):
        by_steps = summary[name]
        models[name] = {int(steps): by_steps[steps] for steps in sorted(by_steps, key=int)}
    return models


def join_values(values: dict[str, float], pattern: str) -> str:
    """Return "NAME VALUE, NAME VALUE", each value formatted by a pattern such as ".4f"."""
    return ", ".join(f"{name} {value:{pattern}}" for name, value in values.items())


def quality_rows(summary: dict[str, Any]) -> list[list[str]]:
    """Return the table of quality against steps: a row for each model and number of steps."""
    rows = []
    for name, by_steps in models_by_steps(summary).items():
        for steps, figures in by_steps.items():
            row = [name, str(steps), str(figures["nfe"])]
            for measure in ("fd", "accuracy", "recall", "precision"):
                row.append(f"{figures[measure]:.4f}" if measure in figures else "-")
            rows.append(row)
    return rows


def format_summary(summary: dict[str, Any]) -> str:
    """Return the summary as text: the table of quality against steps, and lines below it."""
    lines = []
    for name, *figures in [QUALITY_COLUMNS, *quality_rows(summary)]:
        cells = [f"{cell:>{width}}" for cell, width in zip(figures, COLUMN_WIDTHS)]
        lines.append(f"{name:10}{''.join(cells)}")
    return "\n".join(lines + summary_lines(summary))


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Return what is below the table: measurement, trajectories, costs, targets, the export."""
    lines = []

    # how it was measured
    measured = summary.get("measured", {})
    for text in dict.fromkeys(measured.values()):
        names = [name for name in measured if measured[name] == text]
        lines.append(f"measured with {text} ({', '.join(names)})")
    autoencoder = summary["floors"]["autoencoder"]
    bootstrap = summary["floors"]["bootstrap"]
    lines.append(f"floor: autoencoder {autoencoder:.4f}, bootstrapped real images {bootstrap:.4f}")

    # trajectories, costs and drift
    lines.append(f"first-orderness: {join_values(summary['first_orderness'], '.4f')}")
    if summary.get("straightness"):
        lines.append(f"straightness: {join_values(summary['straightness'], '.4f')}")
    costs = summary.get("cost", {}).get("evaluations")
    if costs:
        total = summary["cost"]["total"]
        lines.append(f"network evaluations: {join_values(costs, ',')}; total {total:,}")
    for name, drifts in summary.get("drift", {}).items():
        values = [f"{drifts[n]:+.4f} at {n}" for n in sorted(drifts, key=int)]
        lines.append(f"drift of {name}, by steps: {', '.join(values)}")

    # targets
    for name, target in summary.get("targets", {}).items():
        if "at_most" in target:
            bound = f"at most {target['at_most']}"
        else:
            bound = f"at least {target['at_least']}"
        verdict = "met" if target["met"] else "NOT met"
        lines.append(f"{name}: {target['value']:.4f} ({bound}: {verdict})")

    # the export
    difference = summary["export_max_abs_diff"]
    if difference is not None:
        worst = max(summary["export_native_grid_diff"].values(), default=math.nan)
        lines.append(
            f"export: its images differ from those of rectify's sampler by at most {difference:.1e}"
        )
        lines.append(
            "export: its scheduler's grid starts at sigma .999; images on rectify's uniform grid "
            f"differ by at most {worst:.1e}"
        )
    return lines
