"""Signals and bad losses, with real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from models import teacher
from tests.distributed.runs import equal, final, fit
from trainer.callbacks.preemption import EXIT

LONG = ("--preemption.every", "1", "--checkpoints.every", "100")


def until(process, ready):
    while not ready():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 2)], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_the_same_command_goes_on(workspace, undisturbed_run, tmp_path, number, workers):
    out, words = tmp_path / "run", (*LONG, "--data.workers", str(workers))
    process = workspace.start(*fit(out, 40, *words))
    until(process, lambda: (out / "metrics.jsonl").exists())
    began = time.monotonic()
    os.killpg(process.pid, number)  # the reading processes get it too
    os.killpg(process.pid, number)  # and a second one corrupts nothing
    _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT and "stopped by a signal at step" in err and time.monotonic() - began < 20, err
    assert 0 < teacher.read(teacher.newest(out))["global_step"] < 40
    workspace.rectify(*fit(out, 40, *words))
    assert equal(final(out), final(undisturbed_run))


def test_one_signalled_rank_stops_both(workspace, tmp_path):
    two = (*LONG, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    workspace.rectify(*fit(tmp_path / "whole", 40, *two), processes=2)
    out = tmp_path / "run"
    process = workspace.start(*fit(out, 40, *two), processes=2)
    until(process, lambda: (out / "metrics.jsonl").exists())
    os.kill(children(process.pid)[-1], signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert f"exitcode  : {EXIT}" in err, err
    assert 0 < teacher.read(teacher.newest(out))["global_step"] < 40
    workspace.rectify(*fit(out, 40, *two), processes=2)
    assert equal(final(out), final(tmp_path / "whole"))


def test_lightning_still_has_what_is_taken_out():
    """Lightning broadcasts a signal flag in every step; should it stop to, `Preemption` has one line too many."""
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)


def test_a_loss_that_explodes_stops_the_run_and_spoils_nothing(workspace, tmp_path):
    out = tmp_path / "run"
    failed = workspace.rectify(*fit(out, 40, "--optimizer.lr", "1e30", "--trainer.gradient_clip_val", "null"), code=3)
    line = failed.stderr.strip().splitlines()[-1]
    assert "the loss of step" in line and "indices [" in line and "times " in line and "Traceback" not in failed.stderr
    for path in (out / "checkpoints").glob("*.ckpt"):
        assert all(value.isfinite().all() for value in teacher.read(path)["ema"].values())


def test_averages_of_several_widths_are_kept_and_rebuilt(workspace, undisturbed_run, tmp_path):
    out = tmp_path / "run"
    config = workspace.path / "widths.yaml"
    text = (workspace.path / "configs/digits/teacher.yaml").read_text()
    config.write_text(text.replace("{decay: 0.99}", "{decay: 0.99, widths: [0.05, 0.1]}"))
    words = list(fit(out, 40))
    words[words.index("--config") + 1] = "widths.yaml"
    workspace.rectify(*words)
    assert equal(final(out)["state_dict"], final(undisturbed_run)["state_dict"])
    workspace.rectify("ema", "--run", out, "--width", "0.1")
    rebuilt, _, _ = teacher.load(out / "ema" / "width=0.1.ckpt")
    wanted = final(out)["ema_profiles"]["0.1"]
    for name, value in rebuilt.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)
    assert "no EMA snapshots" in workspace.rectify("ema", "--run", undisturbed_run, "--width", "0.1", code=2).stderr


def test_a_signal_in_the_middle_of_an_accumulated_step_loses_nothing(workspace, undisturbed_run, tmp_path):
    """The step begins anew from its first part; and it may be cut into another number of parts from then on."""
    out, words = tmp_path / "run", (*LONG, "--preemption.every", "1", "--trainer.accumulate_grad_batches")
    process = workspace.start(*fit(out, 40, *words, "8"))
    until(process, lambda: (out / "metrics.jsonl").exists())
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == EXIT
    workspace.rectify(*fit(out, 40, *words, "4"))
    found, wanted = ([json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (out, undisturbed_run))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_weights_that_are_not_finite_are_never_saved(workspace, tmp_path):
    """The first loss is finite, the first update is not."""
    words = ("--optimizer.lr", "1e37", "--trainer.gradient_clip_val", "null", "--checkpoints.every", "1", "--watch.every", "9")
    failed = workspace.rectify(*fit(tmp_path / "run", 40, *words), code=3)
    assert "the weights after step 1 are not finite" in failed.stderr.strip().splitlines()[-1]
    assert not list((tmp_path / "run" / "checkpoints").glob("step=*"))


def test_ranks_that_see_different_checkpoints_do_not_begin(workspace, undisturbed_run, tmp_path):
    """As on nodes whose run folders are not shared."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", "bash", "-c"]
    words = " ".join(
        map(str, fit("$OUT", 50, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.logger", "false"))
    )
    choose = (
        f"if [ $RANK = 0 ]; then OUT={undisturbed_run}; else OUT={tmp_path}/empty; fi; exec {sys.executable} -m deploy {words}"
    )
    done = subprocess.run([*command, choose], cwd=workspace.path, env=workspace.environment(), capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "ranks see different newest checkpoints (rank 0: step=000000040.ckpt; rank 1: none)" in done.stderr
    )


def test_the_keyboard_stops_it_with_its_own_code(workspace, tmp_path):
    process = workspace.start(*fit(tmp_path / "run", 4000))
    until(process, lambda: (tmp_path / "run/metrics.jsonl").exists())
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip().endswith("rectify: stopped; the same command goes on from here")


def test_another_set_of_samples_is_not_gone_on_with(workspace, undisturbed_run, tmp_path):
    shutil.copytree(undisturbed_run, tmp_path / "run")
    failed = workspace.rectify(
        *fit(tmp_path / "run", 50, "--data.source", "Pairs", "--data.source.path", "runs/demo/pairs"), code=2
    )
    assert "data.source: the run was begun on other samples" in failed.stderr
