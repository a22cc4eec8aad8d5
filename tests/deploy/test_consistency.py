"""Consistency and progressive distillation, trained by their configs on the demo's artefacts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.helpers.refusals import assert_refused
from tests.helpers.training import fit_words, losses, read_config, study_config, train

OBJECTIVE = "--model.objective.init_args"
SHORT = ("--data.batch", "32", "--metrics.every", "1")
CONSISTENCY = study_config("digits", "consistency")
PROGRESSIVE = study_config("digits", "progressive")


@pytest.fixture(autouse=True)
def inside_workspace(workspace, monkeypatch):
    """Run commands in the folder that holds runs/demo."""
    monkeypatch.chdir(workspace.path)


def without_teacher(config: tuple[Path, ...]) -> dict[str, Any]:
    """Return a configuration's content without the objective's teacher."""
    content = read_config(config)
    del content["model"]["init_args"]["objective"]["init_args"]["teacher"]
    return content


def assert_trained(run: Path) -> None:
    """Assert that three steps were trained, and that the checkpoint holds only the student."""
    found = losses(run)
    assert len(found) == 3
    assert all(loss > 0 for loss in found)
    weights = read_checkpoint(newest_checkpoint(run))["state_dict"]
    assert all(key.startswith("denoiser.") for key in weights)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CONSISTENCY, ()),
        (
            CONSISTENCY,
            (f"{OBJECTIVE}.windows", "4", f"{OBJECTIVE}.teacher.init_args.guidance", "2"),
        ),
        (
            CONSISTENCY,
            (
                f"{OBJECTIVE}.random_end",
                "true",
                "--model.denoiser.init_args.net.init_args.two_time",
                "true",
            ),
        ),
        (PROGRESSIVE, ()),
    ],
    ids=["consistency", "phased, guided teacher", "trajectory", "progressive"],
)
def test_the_config_trains_a_student_alone(tmp_path, config, words):
    assert_trained(train(config, tmp_path / "run", *SHORT, *words, steps=3))


def test_the_config_trains_without_a_teacher(tmp_path):
    schedule = (f"{OBJECTIVE}.doublings", "2", f"{OBJECTIVE}.double_every", "1")
    config = without_teacher(CONSISTENCY)
    assert_trained(train(config, tmp_path / "run", *SHORT, *schedule, steps=3))


@pytest.mark.parametrize(
    ("config", "words", "named"),
    [
        (CONSISTENCY, (f"{OBJECTIVE}.windows", "5"), ("steps", "32", "windows", "5")),
        (CONSISTENCY, (f"{OBJECTIVE}.random_end", "true"), ("random_end", "true", "false")),
        (CONSISTENCY, (f"{OBJECTIVE}.teacher.init_args.run", "nowhere"), ("nowhere",)),
        (PROGRESSIVE, (f"{OBJECTIVE}.steps", "0"), ("Progressive", "steps", "0", "1")),
        (
            PROGRESSIVE,
            ("--model.denoiser.interpolant", "Trigonometric"),
            ("runs/demo/teacher", "Linear(sigma_min=0.0)", "Trigonometric()"),
        ),
    ],
    ids=["windows", "random_end", "no teacher", "steps", "interpolant"],
)
def test_a_value_that_does_not_fit_is_refused(tmp_path, capfd, config, words, named):
    command = fit_words(config, tmp_path / "run", *SHORT, *words, steps=3)
    assert_refused(capfd, command, *named)


def test_averaged_targets_continue_after_a_restart(tmp_path):
    """Two steps and then a third give the weights and averages of three steps at once."""
    words = (*SHORT, f"{OBJECTIVE}.target", "EMATeacher")
    whole = train(CONSISTENCY, tmp_path / "whole", *words, steps=3)
    for steps in (2, 3):
        resumed = train(CONSISTENCY, tmp_path / "resumed", *words, steps=steps)
    expected, found = (read_checkpoint(newest_checkpoint(run)) for run in (whole, resumed))
    for part in ("state_dict", "ema"):
        for key, value in expected[part].items():
            assert torch.equal(value, found[part][key]), key
