"""Training with real processes: killed and resumed it gives the same weights; ranks never share their noise."""

import json
import subprocess
import sys

import pytest
import torch

from models import teacher
from tests.distributed.runs import equal, final, fit


def test_a_resumed_log_has_each_step_once(workspace, undisturbed_run, tmp_path):
    """Killed after step 7: two lines of steps that will be made again, and the beginning of a third."""
    out = tmp_path / "run"
    workspace.rectify(*fit(out, 5))
    with (out / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": 9.0}\n{"step": 7, "loss": 9.0}\n{"st')
    workspace.rectify(*fit(out))
    assert equal(final(out), final(undisturbed_run))
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (out, undisturbed_run)]
    assert [line["step"] for line in logs[0]] == list(range(1, 41))
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def test_a_full_disk_keeps_the_last_checkpoint(workspace, small_disk, tmp_path):
    out, large = small_disk.folder / "run", ("--model.denoiser.net.width", "64", "--trainer.logger", "false")
    workspace.rectify(*fit(out, 5, *large))
    before = (out / "checkpoints/step=000000005.ckpt").read_bytes()
    with small_disk.full(int(0.9 * len(before))):  # room for the codec, which is written at the start, not for a checkpoint
        failed = workspace.rectify(*fit(out, 10, *large), code=2)
    assert small_disk.says in failed.stderr and "step=000000010.ckpt" in failed.stderr and "Traceback" not in failed.stderr
    assert teacher.newest(out).read_bytes() == before
    workspace.rectify(*fit(out, 10, *large))
    workspace.rectify(*fit(tmp_path / "undisturbed", 10, *large))
    assert equal(final(out, 10), final(tmp_path / "undisturbed", 10))


def times(run):
    """Return when each of our files in a run was last written (wandb's own process writes its files when it likes)."""
    files = [path for path in run.rglob("*") if path.is_file() and "wandb" not in path.relative_to(run).parts]
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_finished_run_is_left_alone(workspace, undisturbed_run):
    before = times(undisturbed_run)
    assert "is finished" in workspace.rectify(*fit(undisturbed_run)).stderr
    assert times(undisturbed_run) == before


def test_reading_in_workers_changes_nothing(workspace, undisturbed_run, tmp_path):
    workspace.rectify(*fit(tmp_path / "run", 40, "--data.workers", "2"))
    assert equal(final(tmp_path / "run"), final(undisturbed_run))


PARTS = ("--trainer.accumulate_grad_batches", "2")
HELD = ("--data.heldout.class_path", "Latents", "--data.heldout.init_args.path", "runs/demo/latents")


def test_the_loss_curve_does_not_depend_on_processes_strategy_or_accumulation(workspace, tmp_path):
    """The same global batch, order and draws: only the order of sums differs, by less than 1e-5 over 50 steps."""
    ways = {
        "one": (1, "1", HELD),
        "two": (2, "2", ("--trainer.strategy", "ddp", *HELD)),
        "four": (4, "4", ("--trainer.strategy", "ddp")),
        "sharded": (
            2,
            "2",
            ("--trainer.strategy", "fsdp2", "--model.recompute", "true", "--trainer.accumulate_grad_batches", "2"),
        ),
    }
    curves, held = {}, {}
    for name, (processes, devices, words) in ways.items():
        often = ("--trainer.devices", devices, "--trainer.val_check_interval", "10")
        workspace.rectify(*fit(tmp_path / name, 50, *words, *often), processes=processes)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        curves[name] = [line["loss"] for line in lines if "loss" in line]
        held[name] = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    for name, curve in curves.items():
        assert len(curve) == 50 and curve == pytest.approx(curves["one"], rel=1e-5), name
    assert len(held["one"]) == 5 and held["two"] == pytest.approx(held["one"], rel=1e-5)


RANKS = """
import torch, torch.distributed as dist
from data.batch import Steps
from data.latents import Latents
from trainer.draws import Draws
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
batch = next(iter(Steps(Latents("runs/demo/latents"), 64, 0, first=3, rank=rank, world=world)))
mine = Draws(batch).noise(batch.x)
all_ranks = [torch.empty_like(mine) for _ in range(world)]
dist.all_gather(all_ranks, mine)
rows = torch.cat(all_ranks).flatten(1)
assert rows.shape[0] == 64 and len(rows.unique(dim=0)) == 64, "ranks share their noise"
print("distinct", flush=True)
dist.destroy_process_group()
"""


def test_two_ranks_draw_different_noise(workspace, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "ranks.py")]
    done = subprocess.run(command, cwd=workspace.path, env=workspace.environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distinct") == 2


def test_a_batch_that_does_not_divide_is_refused(workspace, tmp_path):
    failed = workspace.rectify(*fit(tmp_path / "run", 6, "--data.batch", "63", "--trainer.accumulate_grad_batches", "2"), code=2)
    assert "data.batch: 63 is not a positive multiple of 1 processes x 2" in failed.stderr


def test_mixed_precision_keeps_float32_weights(workspace, tmp_path):
    workspace.rectify(*fit(tmp_path / "run", 3, "--trainer.precision", "bf16-mixed"))
    found = final(tmp_path / "run", 3)
    assert all(value.dtype == torch.float32 for part in ("state_dict", "ema") for value in found[part].values())
    assert all(value.isfinite().all() for value in found["ema"].values())
