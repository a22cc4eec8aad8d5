"""Evaluation in real processes."""

import pytest

from data.files import read_json


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(workspace, tmp_path):
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        words = ("evaluate", "--run", "runs/demo/student", "--images", "runs/demo/images")
        few = ("--steps", "[1]", "--samples", "600")
        workspace.rectify(*words, "--out", out, *few, processes=processes)
        result = read_json(out / "evaluation.json")
        del result["seconds"]
        results.append(result)
    assert results[0] == results[1]
