"""Training in real processes: a killed run resumes to the same weights; ranks draw other noise."""

import subprocess
import sys

import pytest
import torch

from models.checkpoint import newest_checkpoint
from tests.distributed.runs import (
    assert_fails,
    equal,
    final_state,
    tiny_fit_words,
)
from tests.helpers.training import log_lines, losses


def test_a_resumed_log_has_each_step_once(workspace, uninterrupted_run, tmp_path):
    """Killed after step 7: the log has two lines of lost steps, and the beginning of a third."""
    out = tmp_path / "run"
    workspace.rectify(*tiny_fit_words(out, 5))
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": 9.0}\n{"step": 7, "loss": 9.0}\n{"st')
    workspace.rectify(*tiny_fit_words(out))
    assert equal(final_state(out), final_state(uninterrupted_run))
    log = log_lines(out)
    expected = log_lines(uninterrupted_run)
    assert [line["step"] for line in log] == list(range(1, 41))
    assert [line["loss"] for line in log] == [line["loss"] for line in expected]


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_saved_step(workspace, small_disk, tmp_path):
    out = small_disk.folder / "run"
    large = ("--model.denoiser.net.width", "64", "--trainer.logger", "false")
    workspace.rectify(*tiny_fit_words(out, 5, *large))
    before = (out / "checkpoints/step=000000005.ckpt").read_bytes()

    # the codec, which is written at the start, fits on the disk; a checkpoint does not
    with small_disk.full(int(0.9 * len(before))):
        words = tiny_fit_words(out, 10, *large)
        assert_fails(workspace, words, small_disk.error, "step=000000010.ckpt")
    assert newest_checkpoint(out).read_bytes() == before

    # the same command resumes once there is space
    uninterrupted = tmp_path / "uninterrupted"
    workspace.rectify(*tiny_fit_words(out, 10, *large))
    workspace.rectify(*tiny_fit_words(uninterrupted, 10, *large))
    assert equal(final_state(out, 10), final_state(uninterrupted, 10))


def modification_times(run):
    """Return the modification time of each file of a run, except those of wandb's process."""
    times = {}
    for path in run.rglob("*"):
        if path.is_file() and "wandb" not in path.relative_to(run).parts:
            times[path] = path.stat().st_mtime_ns
    return times


def test_a_finished_run_is_not_touched(workspace, uninterrupted_run):
    before = modification_times(uninterrupted_run)
    ended = workspace.rectify(*tiny_fit_words(uninterrupted_run))
    assert "step=000000040.ckpt" in ended.stderr
    assert modification_times(uninterrupted_run) == before


def test_reading_in_workers_changes_nothing(workspace, uninterrupted_run, tmp_path):
    workspace.rectify(*tiny_fit_words(tmp_path / "run", 40, "--data.workers", "2"))
    assert equal(final_state(tmp_path / "run"), final_state(uninterrupted_run))


HELDOUT = (
    *("--data.heldout.class_path", "Latents"),
    *("--data.heldout.init_args.path", "runs/demo/latents"),
)
DDP = ("--trainer.strategy", "ddp")
FSDP2 = ("--trainer.strategy", "fsdp2", "--model.recompute", "true")
ACCUMULATED = ("--trainer.accumulate_grad_batches", "2")
WAYS = {  # number of processes, options
    "one": (1, HELDOUT),
    "two": (2, (*DDP, *HELDOUT)),
    "four": (4, DDP),
    "sharded": (2, (*FSDP2, *ACCUMULATED)),
}


@pytest.mark.slow
def test_losses_do_not_depend_on_processes_strategy_or_accumulation(workspace, tmp_path):
    """The global batch, its order and its random draws are the same.

    Only the order of sums differs, by less than 1e-5 over 50 steps.
    """
    curves = {}
    norms = {}
    heldout_curves = {}
    for name, (processes, options) in WAYS.items():
        out = tmp_path / name
        devices = ("--trainer.devices", str(processes), "--trainer.val_check_interval", "10")
        workspace.rectify(*tiny_fit_words(out, 50, *options, *devices), processes=processes)
        curves[name] = losses(out)
        norms[name] = [line["gradient_norm"] for line in log_lines(out) if "loss" in line]
        validations = [line for line in log_lines(out) if "heldout_loss" in line]
        heldout_curves[name] = [line["heldout_loss"] for line in validations]
    for name, curve in curves.items():
        assert len(curve) == 50, name
        assert curve == pytest.approx(curves["one"], rel=1e-5), name
        assert norms[name] == pytest.approx(norms["one"], rel=1e-4), name
    assert len(heldout_curves["one"]) == 5
    assert heldout_curves["two"] == pytest.approx(heldout_curves["one"], rel=1e-5)


RANK_PROGRAM = """
import torch, torch.distributed as dist
from data.batch import RankBatches
from data.latents import Latents
from trainer.step_random import StepRandom
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
latents = Latents("runs/demo/latents")
batch = next(iter(RankBatches(latents, 64, 0, first_step=3, rank=rank, world=world)))
noise = StepRandom(batch).noise(batch.x)
all_ranks = [torch.empty_like(noise) for _ in range(world)]
dist.all_gather(all_ranks, noise)
samples = torch.cat(all_ranks).flatten(1)
assert samples.shape[0] == 64 and len(samples.unique(dim=0)) == 64, "ranks share their noise"
print("distinct", flush=True)
dist.destroy_process_group()
"""


def test_two_ranks_draw_different_noise(workspace, tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(RANK_PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    ended = subprocess.run(
        [sys.executable, *torchrun, str(program)],
        cwd=workspace.path,
        env=workspace.environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("distinct") == 2


def test_a_batch_that_does_not_divide_is_refused(workspace, tmp_path):
    words = tiny_fit_words(tmp_path / "run", 6, "--data.batch", "63", *ACCUMULATED)
    assert_fails(workspace, words, "data.batch", 63, "x 2")


def test_mixed_precision_keeps_float32_weights(workspace, tmp_path):
    workspace.rectify(*tiny_fit_words(tmp_path / "run", 3, "--trainer.precision", "bf16-mixed"))
    state = final_state(tmp_path / "run", 3)
    for part in ("state_dict", "ema"):
        assert all(value.dtype == torch.float32 for value in state[part].values())
    assert all(value.isfinite().all() for value in state["ema"].values())
