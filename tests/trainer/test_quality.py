"""The figures of a validation are those that `rectify evaluate` finds of its checkpoint."""

import json

import pytest

from data.files import read_json
from deploy.cli import main
from models import teacher
from tests.distributed.runs import equal, fit
from trainer.callbacks.quality import Quality

IMAGES = "runs/demo/images"
HELD = ("--data.heldout", "Latents", "--data.heldout.path", "runs/demo/latents", "--trainer.val_check_interval", "3")
WORDS = (*HELD, "--trainer.logger", "false", "--trainer.accelerator", "cpu", "--trainer.callbacks+", "EMA")
DRAWN = ("--trainer.callbacks+", "Quality", "--trainer.callbacks.images", IMAGES, "--trainer.callbacks.samples", "120")


def line(run):
    return next(found for found in map(json.loads, (run / "metrics.jsonl").open()) if "heldout_loss" in found)


@pytest.fixture
def run(workspace, tmp_path, monkeypatch):
    """Three steps, and a validation after them."""
    monkeypatch.chdir(workspace.path)
    assert main([str(word) for word in fit(tmp_path / "run", 3, *WORDS, *DRAWN)]) == 0
    return tmp_path / "run"


def test_they_are_those_of_evaluate(workspace, run, tmp_path):
    words = ["--run", str(run), "--images", IMAGES, "--out", str(tmp_path / "evaluation"), "--steps", "[1,4]", "--samples", "120"]
    assert main(["evaluate", *words]) == 0
    found, rows = line(run), read_json(tmp_path / "evaluation/evaluation.json")["steps"]
    for steps, row in rows.items():
        for name in ("fd", "recall", "precision", "accuracy"):
            assert found[f"{name}_{steps}"] == pytest.approx(row[name], rel=1e-4, abs=1e-6)


def test_training_does_not_notice(run, tmp_path):
    assert main([str(word) for word in fit(tmp_path / "plain", 3, *WORDS)]) == 0
    one, two = (teacher.read(teacher.newest(place)) for place in (run, tmp_path / "plain"))
    assert all(equal(one[part], two[part]) for part in ("state_dict", "ema", "optimizer_states", "evaluations"))


def test_two_processes_share_the_samples(workspace, run, tmp_path):
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    workspace.rectify(*fit(tmp_path / "two", 3, *WORDS, *DRAWN, *two), processes=2)
    one, both = line(run), line(tmp_path / "two")
    assert all(both[name] == pytest.approx(one[name], rel=1e-2, abs=1e-2) for name in one if name != "seconds")


def test_bad_values_are_one_line():
    for said, values in {
        "steps is": {"steps": []},
        "steps is [[]0, 1[]]": {"steps": [0, 1]},
        "samples is 99": {"samples": 99},
    }.items():
        with pytest.raises(ValueError, match=f"Quality: {said}"):
            Quality("images", **values)
