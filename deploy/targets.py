"""Targets: bounds that the figures of a pipeline's summary must keep.

A pipeline's YAML names them under `targets`:

    fd_ratio: {value: student.1.fd, over: teacher.32.fd, at_most: 1.2}
    accuracy_gain: {value: student.1.accuracy - teacher.32.accuracy, at_least: -0.005}

`value` is an entry of summary.json, named by its keys, or a sum or difference of entries; `over`,
if there is one, divides it. `at_most` or `at_least` is the bound.
"""

import logging
import re
from pathlib import Path
from typing import Any

from data.schema import NAME, check_schema, shorten
from deploy.yaml_files import read_yaml

log = logging.getLogger(__name__)

PIPELINE_RECORD = "pipeline.yaml"  # the pipeline's file, in the folder of its results
ENTRY = r"\w[^\s.]*(?:\.[^\s.]+)*"  # its keys with dots between them
FORMULA = re.compile(rf"{ENTRY}(?: [+-] {ENTRY})*")
BOUNDS = ("at_most", "at_least")
KEYS = ("value", "over", *BOUNDS)


def check_targets(targets: Any, where: str) -> None:
    """Check the targets of a pipeline.

    Args:
        targets: what the YAML has under `targets`.
        where: the file, and the entry in it, for errors.

    Raises:
        ValueError: a target is not as described above; the message names it.
    """
    check_schema(targets, {NAME: dict}, where)
    for name, target in targets.items():
        unknown = [key for key in target if key not in KEYS]
        if unknown:
            keys = ", ".join(KEYS)
            raise ValueError(f"{where}: {name}: no key `{unknown[0]}`; the keys are {keys}")
        bounds = [key for key in BOUNDS if key in target]
        if len(bounds) != 1:
            raise ValueError(f"{where}: {name}: give one bound, at_most or at_least")
        check_schema(target, {bounds[0]: float, "value": str}, f"{where}: {name}")
        for key, formula in target.items():
            if key in BOUNDS:
                continue
            if not isinstance(formula, str) or not FORMULA.fullmatch(formula):
                raise ValueError(
                    f"{where}: {name}: {key} is {shorten(formula)}; it must be entries of the "
                    "summary with + or - between them, such as `student.1.fd - teacher.32.fd`"
                )


def read_targets(out: Path) -> dict[str, Any]:
    """Return the targets of the pipeline that was run in a folder; none if it is not recorded."""
    path = out / PIPELINE_RECORD
    if not path.exists():
        return {}
    pipeline = read_yaml(path)
    check_schema(pipeline, dict, str(path))
    targets = pipeline.get("targets", {})
    check_targets(targets, f"{path}: targets")
    return targets


def compare_with_targets(
    summary: dict[str, Any], targets: dict[str, Any], where: str
) -> dict[str, Any]:
    """Return each target with its value, its bound and whether it is met.

    A target of a model that is not evaluated yet is left out, with a warning. One whose `over` is
    not positive is left out, too: a teacher that is no better in more steps has no gap that a
    student could close.

    Args:
        summary: the figures.
        targets: by name, see above.
        where: the file of the targets, for errors.

    Raises:
        ValueError: a target names an entry that the summary does not have.
    """
    compared = {}
    for name, target in targets.items():
        # a report may be made before all stages are finished
        formulas = f"{target['value']} {target.get('over', '')}"
        models = {entry.partition(".")[0] for entry in re.findall(ENTRY, formulas)}
        missing = sorted(models - summary.keys())
        if missing:
            log.warning("%s: %s is left out: no `%s` was evaluated", where, name, missing[0])
            continue

        # the value
        value = sum_entries(summary, target["value"], f"{where}: {name}")
        if "over" in target:
            divisor = sum_entries(summary, target["over"], f"{where}: {name}")
            if divisor <= 0:
                continue
            value /= divisor

        # its bound
        if "at_most" in target:
            bound = {"at_most": target["at_most"], "met": value <= target["at_most"]}
        else:
            bound = {"at_least": target["at_least"], "met": value >= target["at_least"]}
        compared[name] = {"value": value, **bound}
    return compared


def sum_entries(summary: dict[str, Any], formula: str, where: str) -> float:
    """Return the value of a sum or difference of entries."""
    total: float = 0
    sign = 1
    for word in formula.split():
        if word in ("+", "-"):
            sign = 1 if word == "+" else -1
        else:
            total += sign * find_entry(summary, word, where)
    return total


def find_entry(summary: dict[str, Any], entry: str, where: str) -> float:
    """Return the number at an entry, such as `student.1.fd`."""
    value: Any = summary
    for key in entry.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(
                f"{where}: the summary has no `{entry}`; evaluate it first, or correct the target"
            )
        value = value[key]
    check_schema(value, float, f"{where}: {entry}")
    return value
