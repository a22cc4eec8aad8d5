"""Evaluation in real processes: any number, killed at any moment, find the same figures."""

import os
import signal

import pytest

from data.files import read_json
from tests.distributed.processes import wait_until

pytestmark = pytest.mark.slow
SETTINGS = ("--images", "runs/demo/images", "--steps", "[1]", "--samples", "1200")


def command_words(out):
    """Return the words of a command that measures 5 chunks of samples."""
    return ("evaluate", "--run", "runs/demo/student", "--out", out, *SETTINGS)


def read_figures(out):
    """Return the figures of an evaluation, without the time that it took; nothing else is left."""
    assert not list(out.glob(".*"))
    figures = read_json(out / "evaluation.json")
    del figures["seconds"]
    return figures, (out / "samples-1.png").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(workspace, tmp_path_factory):
    """Return what one process measures."""
    out = tmp_path_factory.mktemp("evaluation") / "one"
    workspace.rectify(*command_words(out))
    return read_figures(out)


def test_two_processes_measure_what_one_measures(workspace, undisturbed, tmp_path):
    workspace.rectify(*command_words(tmp_path), processes=2)
    assert read_figures(tmp_path) == undisturbed


def test_processes_that_start_and_die_share_an_evaluation(workspace, undisturbed, tmp_path):
    """Three unconnected commands, of which one is killed after the first chunk."""
    words = (*command_words(tmp_path), "--lease", "2")
    first = workspace.start(*words)
    second = workspace.start(*words)
    wait_until(first, lambda: list(tmp_path.glob(".chunks-*/*.safetensors")))
    os.killpg(first.pid, signal.SIGKILL)
    third = workspace.start(*words)
    for process in (second, third):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    first.communicate()
    assert read_figures(tmp_path) == undisturbed
