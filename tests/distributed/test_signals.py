"""Signals and bad losses in real processes."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from models.checkpoint import load_checkpoint, newest_checkpoint, read_checkpoint
from tests.distributed.processes import find_children, wait_until
from tests.distributed.runs import (
    CONFIG,
    assert_a_rank_names,
    assert_fails,
    assert_last_line_is_the_error,
    equal,
    final_state,
    tiny_fit_words,
)
from tests.helpers.refusals import PREFIX
from tests.helpers.training import log_lines, losses, spec
from trainer.callbacks.preemption import PREEMPTED_EXIT_CODE

SAVE_ONLY_ON_SIGNAL = ("--preemption.every", "1", "--checkpoints.every", "100")
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def start_and_wait_for_metrics(workspace, out, *words, processes=1):
    """Start a command, and return it once its run has logged a step."""
    process = workspace.start(*words, processes=processes)
    wait_until(process, lambda: (out / "metrics.jsonl").exists())
    return process


def assert_saved_midway(out):
    """Assert that a run of 40 steps was saved before its end; returns the step."""
    step = read_checkpoint(newest_checkpoint(out))["global_step"]
    assert 0 < step < 40
    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGTERM, 0), (signal.SIGUSR1, 2)],
    ids=["SIGTERM", "SIGUSR1"],
)
def test_a_signal_saves_and_the_same_command_resumes(
    workspace, uninterrupted_run, tmp_path, number, workers
):
    out = tmp_path / "run"
    words = tiny_fit_words(out, 40, *SAVE_ONLY_ON_SIGNAL, "--data.workers", str(workers))
    process = start_and_wait_for_metrics(workspace, out, *words)
    began = time.monotonic()
    os.killpg(process.pid, number)  # the reading processes get it too
    os.killpg(process.pid, number)  # and a second signal corrupts nothing
    _, err = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED_EXIT_CODE, err
    assert time.monotonic() - began < 20
    assert f"step {assert_saved_midway(out)}" in err
    workspace.rectify(*words)
    assert equal(final_state(out), final_state(uninterrupted_run))


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both(workspace, tmp_path):
    """Under plain torchrun, from which training takes devices and strategy: one run is trained."""
    out = tmp_path / "run"
    uninterrupted = tmp_path / "uninterrupted"
    options = (*SAVE_ONLY_ON_SIGNAL, "--trainer.logger", "false")
    words = tiny_fit_words(out, 40, *options)
    workspace.rectify(*tiny_fit_words(uninterrupted, 40, *options), processes=2)
    assert [line["step"] for line in log_lines(uninterrupted)] == list(range(1, 41))
    process = start_and_wait_for_metrics(workspace, out, *words, processes=2)
    os.kill(find_children(process.pid)[-1], signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert f"exitcode  : {PREEMPTED_EXIT_CODE}" in err, err
    assert_saved_midway(out)
    workspace.rectify(*words, processes=2)
    assert equal(final_state(out), final_state(uninterrupted))


def test_lightning_still_has_what_is_taken_out():
    """Lightning broadcasts a signal flag in every step, which `Preemption` turns off.

    If this fails, Lightning has stopped to, and `Preemption` has one line too many.
    """
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)


def test_a_loss_that_explodes_stops_the_run_and_spoils_nothing(workspace, tmp_path):
    out = tmp_path / "run"
    options = ("--optimizer.lr", "1e30", "--trainer.gradient_clip_val", "null")
    named = ("loss", "step", "indices", "times")
    err = assert_fails(workspace, tiny_fit_words(out, 40, *options), *named, code=3)
    assert_last_line_is_the_error(err)
    for path in (out / "checkpoints").glob("*.ckpt"):
        assert all(value.isfinite().all() for value in read_checkpoint(path)["ema"].values())


def test_averages_of_several_widths_are_kept_and_rebuilt(workspace, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    widths = tmp_path / "widths.yaml"
    average = spec("EMA", decay=0.99, widths=[0.05, 0.1])
    widths.write_text(yaml.safe_dump({"trainer": {"callbacks": [average]}}))
    workspace.rectify(*tiny_fit_words(out, 40, config=(*CONFIG, widths)))
    state = final_state(out)
    assert equal(state["state_dict"], final_state(uninterrupted_run)["state_dict"])

    workspace.rectify("ema", "--run", out, "--width", "0.1")
    rebuilt, _, _ = load_checkpoint(out / "ema" / "width=0.1.ckpt")
    expected = state["ema_profiles"]["0.1"]
    for name, value in rebuilt.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_rebuilding_averages_without_snapshots_is_refused(workspace, uninterrupted_run):
    words = ("ema", "--run", uninterrupted_run, "--width", "0.1")
    assert_fails(workspace, words, uninterrupted_run / "ema", "widths")


@pytest.mark.slow
def test_a_signal_in_an_accumulated_step_loses_nothing(workspace, uninterrupted_run, tmp_path):
    """The interrupted step begins again with its first batch.

    The resumed run may accumulate another number of batches.
    """
    out = tmp_path / "run"
    accumulated = (*SAVE_ONLY_ON_SIGNAL, "--trainer.accumulate_grad_batches")
    words = tiny_fit_words(out, 40, *accumulated, "8")
    process = start_and_wait_for_metrics(workspace, out, *words)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == PREEMPTED_EXIT_CODE
    workspace.rectify(*tiny_fit_words(out, 40, *accumulated, "4"))
    assert losses(out) == pytest.approx(losses(uninterrupted_run), rel=1e-5)


def test_weights_that_are_not_finite_are_never_saved(workspace, tmp_path):
    """The first loss is finite, the first update is not."""
    options = (
        *("--optimizer.lr", "1e37", "--trainer.gradient_clip_val", "null"),
        *("--checkpoints.every", "1", "--loss_guard.every", "9"),
    )
    words = tiny_fit_words(tmp_path / "run", 40, *options)
    err = assert_fails(workspace, words, tmp_path / "run", "weights", "step 1 ", code=3)
    assert_last_line_is_the_error(err)
    assert not list((tmp_path / "run" / "checkpoints").glob("step=*"))


def test_ranks_with_different_newest_steps_do_not_start(workspace, uninterrupted_run, tmp_path):
    """This is what nodes without a shared run folder find."""
    words = " ".join(map(str, tiny_fit_words("$OUT", 50, *TWO, "--trainer.logger", "false")))
    choose_folder = f"if [ $RANK = 0 ]; then OUT={uninterrupted_run}; else OUT={tmp_path}/empty; fi"
    script = f"{choose_folder}; exec {sys.executable} -m deploy {words}"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python")
    ended = subprocess.run(
        [sys.executable, *torchrun, "bash", "-c", script],
        cwd=workspace.path,
        env=workspace.environment(),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert_a_rank_names(ended.stderr, "rank 0", "step=000000040.ckpt", "rank 1")


def test_the_keyboard_interrupt_has_exit_code_130(workspace, tmp_path):
    out = tmp_path / "run"
    process = start_and_wait_for_metrics(workspace, out, *tiny_fit_words(out, 1500))
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    line = err.strip().splitlines()[-1]
    assert line.startswith("rectify: ")
    assert not line.startswith(PREFIX), "an interrupt is no error"


def test_resuming_on_other_samples_is_refused(workspace, uninterrupted_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run)
    pairs = ("--data.source", "Pairs", "--data.source.path", "runs/demo/pairs")
    assert_fails(workspace, tiny_fit_words(run, 50, *pairs), "data.source", "samples")
