"""Training failures are named: samples whose loss is not finite, memory, a rank that stalls."""

import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest

from data.latents import latent_sample
from data.noise import noise
from data.shards import ShardReader, ShardWriter
from data.shards.write import array_to_npy
from tests.distributed.processes import find_children, wait_until
from tests.distributed.runs import (
    assert_fails,
    assert_last_line_is_the_error,
    final_state,
    tiny_fit_words,
)
from tests.helpers.refusals import PREFIX, assert_names, refused_line

BAD_INDEX = 37
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def make_latent(index):
    """Return a sample of noise, whose loss is not finite at `BAD_INDEX`."""
    x = noise(0, index, (4, 8, 8)) * (1e30 if index == BAD_INDEX else 1)
    sample = latent_sample(f"{index:09d}", x.clamp(-1, 1), index % 10)
    return sample | {"npy": array_to_npy(x.numpy())}  # float32


@pytest.fixture(scope="module")
def spoiled_options(workspace, tmp_path_factory):
    """Return the options of training on 64 latents of which one is far too large.

    It spoils one step in four.
    """
    folder = tmp_path_factory.mktemp("spoiled")
    manifest = ShardReader(workspace.path / "runs/demo/latents").manifest
    facts = {"codec": manifest["codec"], "classes": manifest["classes"]}
    writer = ShardWriter(folder, "latents", facts, 64, 16)
    for number in writer.numbers():
        writer.write(number, [make_latent(index) for index in writer.indices(number)])
    writer.finish()
    return ("--data.source.path", folder, "--data.batch", "16", "--loss_guard.every", "4")


def test_a_bad_sample_is_named_with_its_time(workspace, spoiled_options, tmp_path):
    words = tiny_fit_words(tmp_path / "run", 8, *spoiled_options)
    err = assert_fails(workspace, words, "indices", f"[{BAD_INDEX}]", "times", code=3)
    assert_last_line_is_the_error(err)
    assert re.search(r"times\W+0\.\d", refused_line(err))


@pytest.mark.slow
def test_bad_steps_are_skipped_and_counted(workspace, spoiled_options, tmp_path):
    run = tmp_path / "run"
    skip = ("--loss_guard.skip", "2")
    words = tiny_fit_words(run, 8, *spoiled_options, *TWO, *skip)
    ended = workspace.rectify(*words, processes=2)
    assert len(re.findall(r"step \d+.*gradients", ended.stderr)) == 2

    # two of the eight steps changed nothing
    state = final_state(run, 8)
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    moments = state["optimizer_states"][0]["state"].values()
    assert all(moment["step"] == 6 for moment in moments)

    # a third bad step stops the run
    words = tiny_fit_words(run, 16, *spoiled_options, *skip)
    assert_fails(workspace, words, run, "3 steps", "gradients", code=3)


def limit_memory():
    """Leave 8 GB of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))


@pytest.mark.slow
def test_running_out_of_memory_names_the_batch(workspace, tmp_path):
    large = ("--data.batch", "30000", "--model.denoiser.net.width", "256")
    process = workspace.start(*tiny_fit_words(tmp_path / "run", 8, *large), preexec=limit_memory)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2, err
    assert_last_line_is_the_error(err)
    line = err.strip().splitlines()[-1]
    assert_names(line, ("memory", "step 0", "(30000, 4, 8, 8)"))


def read_rank(pid):
    """Return the rank that torchrun gave to a process."""
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    ranks = [line.removeprefix("RANK=") for line in variables if line.startswith("RANK=")]
    return ranks[0]


def test_a_stalled_rank_is_named(workspace, tmp_path):
    run = tmp_path / "run"
    words = tiny_fit_words(run, 1500, *TWO, "--watchdog.timeout", "5")
    process = workspace.start(*words, processes=2)
    wait_until(process, lambda: (run / "metrics.jsonl").exists())

    # stop one rank: the other reports it
    victim = find_children(process.pid)[-1]
    rank = read_rank(victim)
    os.kill(victim, signal.SIGSTOP)
    began = time.monotonic()
    line = next(line for line in process.stderr if line.startswith(PREFIX))
    assert f"rank {rank} on " in line
    assert time.monotonic() - began < 20

    os.kill(victim, signal.SIGKILL)
    assert process.wait(timeout=60) != 0
