"""The metrics of a validation are those that `rectify evaluate` finds for its checkpoint."""

import json

import pytest

from data.files import read_json
from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.distributed.runs import equal, tiny_fit_words
from tests.helpers.commands import succeed
from tests.helpers.refusals import refused
from tests.helpers.results import CIRCUMSTANCES
from trainer.callbacks.sample_quality import SampleQuality

IMAGES = "runs/demo/images"
PLAIN = (
    *("--data.heldout", "Latents"),
    *("--data.heldout.path", "runs/demo/latents"),
    *("--trainer.val_check_interval", "3"),
    *("--trainer.logger", "false"),
    *("--trainer.accelerator", "cpu"),
)
QUALITY = (
    *("--trainer.callbacks+", "SampleQuality"),
    *("--trainer.callbacks.images", IMAGES),
    *("--trainer.callbacks.samples", "120"),
)


def validation_line(run):
    """Return the first line of a run's log that a validation wrote."""
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "heldout_loss" in values:
            return values
    raise AssertionError(f"{run}: no validation in the log")


@pytest.fixture
def run(workspace, tmp_path, monkeypatch):
    """Three steps, and a validation after them."""
    monkeypatch.chdir(workspace.path)
    succeed(*tiny_fit_words(tmp_path / "run", 3, *PLAIN, *QUALITY))
    return tmp_path / "run"


def test_a_validation_logs_what_the_command_finds(run, tmp_path):
    out = tmp_path / "evaluation"
    words = ("--run", run, "--images", IMAGES, "--out", out, "--steps", "[1,4]", "--samples", 120)
    succeed("evaluate", *words)
    found = validation_line(run)
    wanted = read_json(out / "evaluation.json")["steps"]
    for steps, metrics in wanted.items():
        for name in ("fd", "recall", "precision", "accuracy"):
            assert found[f"{name}_{steps}"] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6)


def test_it_does_not_change_training(run, tmp_path):
    succeed(*tiny_fit_words(tmp_path / "plain", 3, *PLAIN))
    with_quality = read_checkpoint(newest_checkpoint(run), resume=True)
    plain = read_checkpoint(newest_checkpoint(tmp_path / "plain"), resume=True)
    for part in ("state_dict", "ema", "optimizer_states", "evaluations"):
        assert equal(with_quality[part], plain[part])


def test_two_processes_share_the_samples(workspace, run, tmp_path):
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    workspace.rectify(*tiny_fit_words(tmp_path / "two", 3, *PLAIN, *QUALITY, *two), processes=2)
    one_process = validation_line(run)
    two_processes = validation_line(tmp_path / "two")
    for name in one_process.keys() - {"run", *CIRCUMSTANCES}:
        assert two_processes[name] == pytest.approx(one_process[name], rel=1e-2, abs=1e-2)


@pytest.mark.parametrize(
    ("key", "value"), [("steps", []), ("steps", [0, 1]), ("samples", 99)], ids=str
)
def test_bad_values_are_refused(key, value):
    with refused("SampleQuality", key, value):
        SampleQuality("images", **{key: value})
