"""What goes wrong in training is named: bad batches, memory, ranks that stall."""

import os
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from data.latents import latent_sample
from data.noise import noise
from data.shards import ShardReader, ShardWriter
from tests.distributed.runs import final, fit
from tests.distributed.test_signals import children, until

BAD = 37  # the index of a latent that is not finite


@pytest.fixture(scope="module")
def spoiled(workspace, tmp_path_factory):
    """Return a set of 64 latents of which one is not finite: it spoils one step in four."""
    folder = tmp_path_factory.mktemp("spoiled")
    origin = ShardReader(workspace.path / "runs/demo/latents").manifest
    writer = ShardWriter(folder, "latents", {"codec": origin["codec"], "classes": origin["classes"]}, 64, 16)
    for number in writer.numbers():
        latents = [noise(0, i, (4, 8, 8)) * (np.nan if i == BAD else 1) for i in writer.indices(number)]
        writer.write(number, [latent_sample(f"{i:09d}", x, i % 10) for i, x in zip(writer.indices(number), latents)])
    writer.finish()
    return ("--data.source.path", folder, "--data.batch", "16", "--watch.every", "4")


def test_a_bad_sample_is_named_with_its_time(workspace, spoiled, tmp_path):
    failed = workspace.rectify(*fit(tmp_path / "run", 8, *spoiled), code=3)
    line = failed.stderr.strip().splitlines()[-1]
    assert f"(1 samples, indices [{BAD}], times 0." in line and "Traceback" not in failed.stderr


def test_bad_steps_are_left_out_and_counted(workspace, spoiled, tmp_path):
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    done = workspace.rectify(*fit(tmp_path / "run", 8, *spoiled, *two, "--watch.skip", "2"), processes=2)
    assert done.stderr.count("watch: left out step") == 2
    assert all(value.isfinite().all() for value in final(tmp_path / "run", 8)["state_dict"].values())
    state = final(tmp_path / "run", 8)["optimizer_states"][0]["state"]
    assert all(value["step"] == 6 for value in state.values())
    failed = workspace.rectify(*fit(tmp_path / "run", 16, *spoiled, "--watch.skip", "2"), code=3)
    assert "3 steps with gradients that are not finite" in failed.stderr


def test_running_out_of_memory_is_told_with_what_to_change(workspace, tmp_path):
    process = workspace.start(
        *fit(tmp_path / "run", 8, "--data.batch", "30000", "--model.denoiser.net.width", "256"),
        preexec=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)),
    )
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2, err
    assert "out of memory at step 0 with a batch of (30000, 4, 8, 8)" in err.strip().splitlines()[-1]


def test_a_stalled_rank_is_named(workspace, undisturbed_run, tmp_path):
    words = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--watchdog.timeout", "5")
    process = workspace.start(*fit(tmp_path / "run", 4000, *words), processes=2)
    until(process, lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    victim = children(process.pid)[-1]
    words = Path(f"/proc/{victim}/environ").read_text().split("\0")
    rank = next(word.removeprefix("RANK=") for word in words if word.startswith("RANK="))
    os.kill(victim, signal.SIGSTOP)
    began = time.monotonic()
    line = next(line for line in process.stderr if line.startswith("rectify: error"))
    assert f"no sign of life from rank {rank} on " in line and time.monotonic() - began < 20
    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=60) != 0
