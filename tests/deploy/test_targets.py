"""Targets of a pipeline: bounds on the figures of its summary."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.pipeline import load
from deploy.report.summary import summarize
from deploy.targets import compare_with_targets
from tests.helpers.refusals import assert_refused, refused

SUMMARY = {
    "teacher": {"1": {"fd": 9.0}, "32": {"fd": 1.0, "recall": 0.0}},
    "student": {"1": {"fd": 1.5, "recall": 0.5}},
    "cost": {"evaluations": {"teacher": 10, "pairs": 6, "student": 5}},
}


def compare(**target: Any) -> dict[str, Any]:
    """Compare the summary with one target, x."""
    return compare_with_targets(SUMMARY, {"x": target}, "pipeline.yaml: targets")


@pytest.mark.parametrize(
    ("value", "over", "result"),
    [
        ("student.1.fd", None, 1.5),
        ("student.1.fd", "teacher.32.fd", 1.5),
        ("student.1.fd - teacher.32.fd", "teacher.1.fd - teacher.32.fd", 0.0625),
        ("cost.evaluations.pairs + cost.evaluations.student", "cost.evaluations.teacher", 1.1),
    ],
    ids=["entry", "ratio", "ratio of differences", "ratio of sums"],
)
def test_a_value_is_a_sum_of_entries_over_another(value, over, result):
    formulas = {"value": value} if over is None else {"value": value, "over": over}
    assert compare(**formulas, at_most=2.0)["x"]["value"] == result


@pytest.mark.parametrize(
    ("bound", "met"),
    [
        ({"at_most": 1.5}, True),
        ({"at_most": 1.4}, False),
        ({"at_least": 1.5}, True),
        ({"at_least": 1.6}, False),
    ],
    ids=str,
)
def test_a_bound_is_met_by_equal_values(bound, met):
    assert compare(value="student.1.fd", **bound)["x"] == {"value": 1.5, "met": met, **bound}


def test_a_ratio_over_a_value_that_is_not_positive_is_left_out():
    assert compare(value="student.1.recall", over="teacher.32.recall", at_least=0.9) == {}
    assert compare(value="student.1.fd", over="teacher.32.fd - teacher.1.fd", at_most=1) == {}


def test_a_target_of_a_missing_model_is_left_out_with_a_warning(caplog):
    assert compare(value="student.1.fd", over="pupil.1.fd", at_most=1) == {}
    assert "pupil" in caplog.text


@pytest.mark.parametrize("entry", ["student.2.fd", "student.1.accuracy", "teacher.1"])
def test_an_entry_that_is_no_figure_of_the_summary_is_refused(entry):
    with refused("pipeline.yaml", "targets", "x", entry):
        compare(value=entry, at_most=1)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (3, ("x", 3)),
        ({"at_most": 1}, ("x", "`value`")),
        ({"value": "student.1.fd"}, ("x", "at_most", "at_least")),
        ({"value": "student.1.fd", "at_most": 1, "at_least": 0}, ("x", "at_most", "at_least")),
        ({"value": "student.1.fd", "at_most": "much"}, ("x", "at_most", "'much'")),
        ({"value": "student.1.fd", "atmost": 1}, ("x", "`atmost`", "at_most")),
        ({"value": "student.1.fd / teacher.32.fd", "at_most": 1}, ("x", "value", "/")),
        ({"value": "student.1.fd -", "at_most": 1}, ("x", "value", "'student.1.fd -'")),
        ({"value": "student.1.fd", "over": 3, "at_most": 1}, ("x", "over", 3)),
    ],
    ids=[
        *("number", "no value", "no bound", "two bounds", "bound is a text"),
        *("unknown key", "quotient", "half a difference", "over a number"),
    ],
)
def test_a_bad_target_is_refused_before_anything_runs(tmp_path, target, named):
    path = tmp_path / "pipeline.yaml"
    pipeline = {"out": "x", "stages": [], "targets": {"x": target}}
    path.write_text(yaml.safe_dump(pipeline))
    with refused("pipeline.yaml", "targets", *named):
        load(path)


@pytest.fixture
def demo(workspace, tmp_path) -> Path:
    """Return a folder with the results of the demo, but for the copy of its pipeline."""
    folder = tmp_path / "demo"
    folder.mkdir()
    for path in (workspace.path / "runs/demo").iterdir():
        if path.name != "pipeline.yaml":
            (folder / path.name).symlink_to(path)
    return folder


def test_a_summary_without_a_pipeline_has_no_targets(demo):
    assert "targets" not in summarize(demo)


def test_a_summary_has_the_targets_of_the_copied_pipeline(demo):
    target = {"value": "student.4.nfe", "at_most": 4}
    (demo / "pipeline.yaml").write_text(yaml.safe_dump({"targets": {"cheap": target}}))
    assert summarize(demo)["targets"] == {"cheap": {"value": 4, "met": True, "at_most": 4}}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("targets: [x: {", ()),
        ("3", ()),
        ("targets: {cheap: {value: student.4.nfe}}", ("targets", "cheap")),
        ("targets: {cheap: {value: student.3.nfe, at_most: 3}}", ("cheap", "student.3.nfe")),
    ],
    ids=["no YAML", "number", "no bound", "no such figure"],
)
def test_a_copied_pipeline_that_is_damaged_is_refused(demo, capfd, text, named):
    (demo / "pipeline.yaml").write_text(text)
    assert_refused(capfd, ("report", "--run", demo), demo / "pipeline.yaml", *named)
