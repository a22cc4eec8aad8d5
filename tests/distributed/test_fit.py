"""Training with real processes: killed and resumed it gives the same weights; ranks never share their noise."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from models import teacher
from tests.distributed.runs import equal, final, fit


@pytest.mark.parametrize("seed", range(2))
def test_killed_and_resumed_gives_the_same_weights(workspace, undisturbed_run, tmp_path, seed):
    out, moment = tmp_path / "run", random.Random(seed)
    process, wanted = workspace.start(*fit(out)), moment.randint(1, 5)
    while len(list((out / "checkpoints").glob("step=*"))) < min(wanted, 2) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(moment.random() * 0.3)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before the kill"
    before = teacher.newest(out)
    assert before.name < "step=000000040"
    workspace.rectify(*fit(out))
    assert equal(final(out), final(undisturbed_run))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps == list(range(1, 41)), "metrics.jsonl has each step once"
    losses = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()] for run in (out, undisturbed_run)]
    assert losses[0] == losses[1]


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


def test_two_processes_train_as_one_does(workspace, tmp_path):
    """The same global batch, order and draws: only the order of sums differs."""
    workspace.rectify(*fit(tmp_path / "one", 6))
    workspace.rectify(*fit(tmp_path / "two", 6, "--trainer.devices", "2", "--trainer.strategy", "ddp"), processes=2)
    workspace.rectify(*fit(tmp_path / "parts", 6, "--trainer.accumulate_grad_batches", "2"))
    one, two, parts = (final(tmp_path / name, 6)["state_dict"] for name in ("one", "two", "parts"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(parts[name], one[name], rtol=1e-3, atol=2e-5)


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
