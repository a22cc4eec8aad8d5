"""The figures of a pipeline in one place: summary.json, and the table that is printed."""

import math
from pathlib import Path
from typing import Any

import yaml

from data.files import naming, read_json
from data.form import COUNT, NAME, NUMBER, SHA256, conform
from trainer.callbacks.metrics import read_log

ROW = {"fd": float, "nfe": COUNT, "recall": float, "precision": float}
EVALUATION = {
    "steps": {NUMBER: ROW},
    "first_orderness": float,
    "floors": {"autoencoder": float, "bootstrap": float},
}
MEASURED = {
    "features": {"extractor": str, "sha256": SHA256, "size": (None, COUNT), "resize": str},
    "reference": SHA256,
    "settings": {"samples": COUNT, "seed": int},
}
EXPORT = {"max_abs_diff": float, "gaps": {NUMBER: {"native_grid": float}}}


def read(path: Path, form: dict[Any, Any]) -> dict[str, Any]:
    """Read a result of this form."""
    value = read_json(path)
    conform(value, form, str(path))
    return value


def read_stages(out: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a pipeline's finished stages, in order, by name."""
    form = {"words": [str], "seconds": float}
    return {path.stem.partition("-")[2]: read(path, form) for path in sorted((out / "stages").glob("*.json"))}


def summarize(out: Path) -> dict[str, Any]:
    """Return the summary of a pipeline's folder: floor, one entry per evaluated model, export, seconds."""
    paths = sorted((out / "evaluation").glob("*/evaluation.json"))
    evaluations = {path.parent.name: read(path, EVALUATION) for path in paths}
    if not evaluations:
        raise FileNotFoundError(f"{out / 'evaluation'}: no evaluation.json below it; run `rectify evaluate` first")
    first = next(iter(evaluations.values()))
    summary: dict[str, Any] = {"format": 1, "floor": first["floors"]["autoencoder"], "floors": first["floors"]}
    if (name := "classifier_accuracy_heldout") in first:  # of a set with classes
        conform(first, {name: float}, str(paths[0]))
        summary[name] = first[name]
    for name, evaluation in evaluations.items():
        summary[name] = evaluation["steps"]
    summary["first_orderness"] = {name: evaluation["first_orderness"] for name, evaluation in evaluations.items()}
    summary["straightness"] = {name: e["straightness"] for name, e in evaluations.items() if "straightness" in e}
    drifts = {name: {n: row["drift"] for n, row in e["steps"].items() if "drift" in row} for name, e in evaluations.items()}
    summary["drift"] = {name: rows for name, rows in drifts.items() if rows}
    conform(summary, {"straightness": {NAME: float}, "drift": {NAME: {NUMBER: float}}}, str(out / "evaluation"))
    path = out / "export" / "export.json"
    export = read(path, EXPORT) if path.exists() else {"max_abs_diff": None, "gaps": {}}
    summary["export_max_abs_diff"] = export["max_abs_diff"]
    summary["export_native_grid_diff"] = {steps: gap["native_grid"] for steps, gap in export["gaps"].items()}
    summary["measured"] = {name: measured(e, name) for name, e in evaluations.items() if "features" in e}
    summary["cost"] = cost(out)
    summary["seconds"] = {name: stage["seconds"] for name, stage in read_stages(out).items()}
    if {"teacher", "student"} <= evaluations.keys():
        summary["targets"] = targets(summary["teacher"], summary["student"], summary["cost"])
    return summary


def measured(evaluation: dict[str, Any], name: str) -> str:
    """Return what an evaluation's figures were measured in: extractor, resize filter, reference set, seed."""
    conform(evaluation, MEASURED, f"evaluation of {name}")
    told, asked = evaluation["features"], evaluation["settings"]
    shown = f"resize {told['resize']}" + (f" to {told['size']}" if told["size"] else "")
    drawn = f"{asked['samples']} samples of seed {asked['seed']}"
    return f"{told['extractor']} {told['sha256'][:12]}, {shown}, reference {evaluation['reference'][:12]}, {drawn}"


def run_log(run: Path) -> list[dict[str, Any]]:
    """Return what the lines of a run's log say.

    Raises:
        ValueError: they end before its newest checkpoint, so that some were lost.
    """
    log = [values for _, values in read_log(run / "metrics.jsonl")]
    newest, config = max((run / "checkpoints").glob("step=*.ckpt"), default=None), run / "config.yaml"
    if newest and config.exists():
        with naming(config):
            told = yaml.safe_load(config.read_text())
            step, every, last = int(newest.stem.removeprefix("step=")), told["metrics"]["every"], told["trainer"]["max_steps"]
        steps = [0, *(values["step"] for values in log if "loss" in values)]
        gap = max([every, *(after - before for before, after in zip(steps, steps[1:]))])  # `every` may have been another before
        if (reached := steps[-1]) < (step if step == last else step - gap + 1):
            raise ValueError(f"{run}/metrics.jsonl: ends at step {reached}, {newest.name} is newer; its end is lost")
    return log


def cost(out: Path) -> dict[str, Any]:
    """Return the network evaluations, one sample each, that a pipeline's pair sets and runs took, each and in total.

    A training sample's backward pass is not counted beside its forward passes; those of evaluation are not the method's cost.
    """
    stages: dict[str, int] = {}
    for path in sorted(out.glob("*/manifest.json")):
        if (manifest := read_json(path)).get("kind") == "pairs" and "evaluations" in manifest:
            conform(manifest, {"evaluations": COUNT}, str(path))
            stages[path.parent.name] = manifest["evaluations"]
    for path in sorted(out.glob("*/metrics.jsonl")):
        counts = [values["evaluations"] for values in run_log(path.parent) if "evaluations" in values]
        conform(counts, [COUNT], f"{path}: evaluations")
        if counts:
            stages[path.parent.name] = counts[-1]
    return {"evaluations": stages, "total": sum(stages.values())}


def models(summary: dict[str, Any]) -> list[tuple[str, list[tuple[int, dict[str, Any]]]]]:
    """Return every evaluated model, the teacher first, with its rows by rising number of steps."""
    names = sorted(summary["first_orderness"], key=lambda name: (name != "teacher", name))
    return [(name, sorted((int(steps), row) for steps, row in summary[name].items())) for name in names]


def targets(teacher: dict[str, Any], student: dict[str, Any], spent: dict[str, Any]) -> dict[str, Any]:
    """Return what rectification is to show: few steps of the student against the teacher's fewest and most, and its cost."""
    few, many, one, four = teacher.get("1"), teacher[max(teacher, key=int)], student.get("1"), student.get("4")
    if not (few and one) or few == many:
        return {}
    found: dict[str, Any] = {}

    def bound(name: str, value: float, least: float | None = None, most: float | None = None) -> None:
        met = value >= least if least is not None else most is not None and value <= most
        found[name] = {"value": value, "met": met, **({"at_least": least} if least is not None else {"at_most": most})}

    if few["fd"] > many["fd"] > 0:
        bound("gap_left", (one["fd"] - many["fd"]) / (few["fd"] - many["fd"]), most=0.05)
        bound("fd_ratio", one["fd"] / many["fd"], most=1.2)
        if four:
            bound("fd_ratio_4", four["fd"] / many["fd"], most=1.1)
    if "accuracy" in one:
        bound("accuracy_gain", one["accuracy"] - many["accuracy"], least=-0.005)
    if many["recall"] > 0:
        bound("recall_ratio", one["recall"] / many["recall"], least=0.9)
    own = spent["evaluations"]  # other methods' runs may lie in the same folder
    if own.get("teacher") and "student" in own:
        bound("cost_ratio", (own.get("pairs", 0) + own["student"]) / own["teacher"], most=2.0)
    return found


def table(summary: dict[str, Any]) -> str:
    """Return the table of quality against steps as text."""
    lines = [f"{'model':10}{'steps':>6}{'NFE':>6}{'FD':>10}{'accuracy':>10}{'recall':>9}{'precision':>11}"]
    for name, rows in models(summary):
        for steps, row in rows:
            accuracy = f"{row['accuracy']:.4f}" if "accuracy" in row else "-"
            cells = f"{row['fd']:>10.4f}{accuracy:>10}{row['recall']:>9.4f}{row['precision']:>11.4f}"
            lines.append(f"{name:10}{steps:>6}{row['nfe']:>6}{cells}")
    for told in dict.fromkeys((whole := summary.get("measured", {})).values()):
        lines.append(f"measured in {told} ({', '.join(name for name in whole if whole[name] == told)})")
    floors = summary["floors"]
    lines.append(f"floor: autoencoder {floors['autoencoder']:.4f}, bootstrapped real {floors['bootstrap']:.4f}")
    lines.append("first-orderness: " + ", ".join(f"{k} {v:.4f}" for k, v in summary["first_orderness"].items()))
    if straight := summary.get("straightness"):
        lines.append("straightness: " + ", ".join(f"{k} {v:.4f}" for k, v in straight.items()))
    if spent := summary.get("cost", {}).get("evaluations"):
        told = ", ".join(f"{name} {count:,}" for name, count in spent.items())
        lines.append(f"network evaluations: {told}; in all {summary['cost']['total']:,}")
    for name, drifts in summary.get("drift", {}).items():
        told = ", ".join(f"{drifts[n]:+.4f} at {n}" for n in sorted(drifts, key=int))
        lines.append(f"drift of {name}, by steps: {told}")
    for name, target in summary.get("targets", {}).items():
        bound = f"at most {target['at_most']}" if "at_most" in target else f"at least {target['at_least']}"
        lines.append(f"{name}: {target['value']:.4f} ({bound}: {'met' if target['met'] else 'NOT met'})")
    if summary["export_max_abs_diff"] is not None:
        lines.append(f"export: images differ from our sampler's by at most {summary['export_max_abs_diff']:.1e}")
        worst = max(summary["export_native_grid_diff"].values(), default=math.nan)
        lines.append(f"the scheduler's grid starts at sigma .999: images on our uniform grid differ by at most {worst:.1e}")
    return "\n".join(lines)
