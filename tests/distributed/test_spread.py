"""`rectify spread`: exit codes of real processes, and the lines of the rank at fault alone."""

import json
import os
import signal
import time

import pytest

from data.files import process_start
from models.checkpoint import newest_checkpoint
from tests.distributed.processes import find_children, wait_until
from tests.distributed.runs import tiny_fit_words
from tests.helpers.refusals import PREFIX, refused_line

SPREAD = ("spread", "--processes", "2", "--")
SAVE_ONLY_ON_SIGNAL = ("--preemption.every", "1", "--checkpoints.every", "1000")
PAIRS = ("collect", "--teacher", "runs/demo/teacher", "--pairs", "100000", "--steps", "8")


@pytest.mark.slow
def test_a_typo_is_one_line_and_exit_code_2(workspace, tmp_path):
    words = tiny_fit_words(tmp_path / "run", 40, "--trainer.max_stepz", "3")
    ended = workspace.rectify(*SPREAD, *words, code=2)
    assert "max_stepz" in refused_line(ended.stderr)
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_follows_the_processes_and_a_signal_saves(workspace, tmp_path):
    """SIGUSR1, of which torchrun would die, comes during training; nobody gives the devices."""
    run = tmp_path / "run"
    words = tiny_fit_words(run, 1500, *SAVE_ONLY_ON_SIGNAL, "--trainer.logger", "false")
    process = workspace.start(*SPREAD, *words)
    wait_until(process, lambda: (run / "metrics.jsonl").exists())
    ranks = find_children(process.pid)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert err.count("saved") == 1

    # one run was trained, by both ranks, and it has no owner any more
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert newest_checkpoint(run).name == f"step={steps[-1]:09d}.ckpt"
    assert len(ranks) == 2
    assert not (run / "lease.json").exists()


@pytest.mark.slow
def test_jobs_hand_75_through(workspace, tmp_path):
    out = tmp_path / "pairs"
    process = workspace.start(*SPREAD, *PAIRS, "--out", out, "--shard", "64")
    wait_until(process, lambda: list(out.glob("*.tar")))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert [line for line in err.splitlines() if "SIGTERM" in line and "again" in line]
    assert not list(out.glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_is_named(workspace, tmp_path, number):
    run = tmp_path / "run"
    words = tiny_fit_words(run, 1500, "--trainer.logger", "false")
    process = workspace.start(*SPREAD, *words)
    wait_until(process, lambda: (run / "metrics.jsonl").exists())
    os.kill(find_children(process.pid)[number], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 137, err
    lines = [line for line in err.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 1
    assert "SIGKILL" in lines[0] and f"local rank {number}" in lines[0]


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank(workspace, tmp_path):
    run = tmp_path / "run"
    process = workspace.start(*SPREAD, *tiny_fit_words(run, 1500, "--trainer.logger", "false"))
    wait_until(process, lambda: (run / "metrics.jsonl").exists())
    ranks = find_children(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(process_start(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
