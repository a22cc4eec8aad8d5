"""SIGKILL at random moments, then the same command again.

No incomplete file ever has a final name, and the finished result is identical.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from models.checkpoint import read_checkpoint
from tests.distributed.processes import find_descendants
from tests.distributed.runs import TRAINING_STATE, equal, tiny_fit_words
from tests.helpers.commands import Workspace
from tests.helpers.results import is_result, result_lines

HELDOUT = (
    *("--data.heldout", "Latents", "--data.heldout.path", "runs/demo/latents"),
    *("--trainer.val_check_interval", "10"),
)
FIT = ("--checkpoints.keep", "100", "--trainer.logger", "false", *HELDOUT)
TWO = ("--trainer.devices", "2", "--trainer.strategy")


@dataclass(frozen=True)
class Command:
    """A command that is killed: its words for an output folder, and its number of processes."""

    words: Callable[[Path], tuple]
    processes: int = 1


IMAGES = ("--images", "runs/demo/images/train")
ENCODE = ("encode", *IMAGES, "--codec", "runs/demo/autoencoder", "--shard", "64")
TEACHER = ("--teacher", "runs/demo/teacher")
COLLECT = ("collect", *TEACHER, "--pairs", "640", "--steps", "8", "--shard", "64")
COMMANDS = {
    "pack": Command(lambda out: ("pack", "--out", out, "--shard", "128", "--size", "64")),
    "encode": Command(lambda out: (*ENCODE, "--out", out)),
    "collect": Command(lambda out: (*COLLECT, "--out", out)),
    "export": Command(lambda out: ("export", "--run", "runs/demo/student", "--out", out)),
    "fit": Command(lambda out: tiny_fit_words(out, 40, *FIT)),
    "fit ddp": Command(lambda out: tiny_fit_words(out, 40, *FIT, *TWO, "ddp"), processes=2),
    "fit fsdp2": Command(lambda out: tiny_fit_words(out, 40, *FIT, *TWO, "fsdp2"), processes=2),
}


def read_state(path: Path) -> dict:
    """Return the part of a checkpoint that training resumes from."""
    checkpoint = read_checkpoint(path, resume=True)
    return {key: checkpoint[key] for key in (*TRAINING_STATE, "lr_schedulers")}


def read_config(path: Path) -> str:
    """Return a run's configuration without the name of its folder."""
    return path.read_text().replace(str(path.parent), "")


def is_intact(path: Path, expected: Path) -> bool:
    """Return whether a file has the content that the uninterrupted command wrote."""
    if path.suffix == ".ckpt":
        return equal(read_state(path), read_state(expected))
    if path.name == "metrics.jsonl":
        return True  # an open log: a kill may cut its last line
    if path.name == "config.yaml":
        return read_config(path) == read_config(expected)
    return path.read_bytes() == expected.read_bytes()


def find_final_files(out: Path) -> dict[str, Path]:
    """Return the files with final names; a temporary name begins with a dot.

    A sharded checkpoint, which is a folder, counts as one file.
    """
    in_checkpoints = {path for folder in out.rglob("*.ckpt") for path in folder.rglob("*")}
    files = {}
    for path in out.rglob("*"):
        name = path.relative_to(out)
        is_file = path.is_file() or path.suffix == ".ckpt"
        is_temporary = any(part.startswith(".") for part in name.parts)
        if is_file and is_result(name) and not is_temporary and path not in in_checkpoints:
            files[str(name)] = path
    return files


def read_log(out: Path) -> list[dict]:
    """Return the lines of a run's log; none if the command has no log."""
    return result_lines(out) if (out / "metrics.jsonl").exists() else []


def assert_intact(out: Path, uninterrupted: Path) -> None:
    """Assert that every file with a final name is complete."""
    files = find_final_files(out)
    expected = find_final_files(uninterrupted)
    assert files.keys() <= expected.keys(), files.keys() - expected.keys()
    torn = [name for name, path in files.items() if not is_intact(path, expected[name])]
    assert not torn, f"incomplete under a final name: {torn}"


def assert_finished(out: Path, uninterrupted: Path) -> None:
    """Assert that every file is complete, that none is missing and that none is left over."""
    assert_intact(out, uninterrupted)
    files = find_final_files(out)
    expected = find_final_files(uninterrupted)
    assert files.keys() == expected.keys(), expected.keys() - files.keys()
    leftovers = [*out.rglob(".*"), *out.parent.glob(".*")]
    assert not leftovers, f"left over: {leftovers}"
    assert read_log(out) == read_log(uninterrupted)


def is_rank(pid: int) -> bool:
    """Return whether a process is `python -m deploy`."""
    return "-m\0deploy" in Path(f"/proc/{pid}/cmdline").read_text()


def kill(process: subprocess.Popen, rng: random.Random) -> None:
    """Kill a command with all its processes.

    With several ranks, half of the time only one is killed; torchrun then ends the other.
    """
    below = find_descendants(process.pid)
    ranks = [pid for pid in below if is_rank(pid)]
    only_one = len(ranks) > 1 and rng.random() < 0.5
    victims = [rng.choice(ranks)] if only_one else [process.pid, *below]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it had just ended
    process.communicate(timeout=120)


@dataclass(frozen=True)
class Chain:
    """A command that is started and killed again and again, and at last finishes.

    Args:
        workspace: where it runs.
        command: what runs.
        uninterrupted: the output folder of the same command, never killed.
        seconds: how long that took; each kill comes before.
    """

    workspace: Workspace
    command: Command
    uninterrupted: Path
    seconds: float

    def run(self, out: Path, rng: random.Random, kills: int) -> int:
        """Run one chain; returns how many kills hit a running command."""
        hits = 0
        while hits < kills:
            process = self._start(out)
            moment = time.monotonic() + rng.uniform(0, self.seconds)
            while time.monotonic() < moment and process.poll() is None:
                time.sleep(0.001)
            if process.poll() is not None:
                text = process.communicate()
                assert process.returncode == 0, text
                break
            kill(process, rng)
            hits += 1
            assert_intact(out, self.uninterrupted)
        self.workspace.rectify(*self.command.words(out), processes=self.command.processes)
        assert_finished(out, self.uninterrupted)
        return hits

    def _start(self, out: Path) -> subprocess.Popen:
        return self.workspace.start(*self.command.words(out), processes=self.command.processes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_finishes_with_the_same_files(
    workspace, tmp_path, request, chronicle, name
):
    command = COMMANDS[name]
    kills = 20 if request.config.getoption("--long") else 2

    # without a kill
    began = time.monotonic()
    uninterrupted = tmp_path / "uninterrupted" / "run"
    uninterrupted.parent.mkdir()
    workspace.rectify(*command.words(uninterrupted), processes=command.processes)
    seconds = time.monotonic() - began

    # chains of up to four kills
    chain = Chain(workspace, command, uninterrupted, seconds)
    hits = 0
    chains = 0
    while hits < kills:
        out = tmp_path / f"chain-{chains}" / "run"
        out.parent.mkdir()
        hits += chain.run(out, random.Random(chains), min(4, kills - hits))
        chains += 1

    # the log of the campaign
    elapsed = time.monotonic() - began
    seeds = f"{chains} chains (seeds 0 to {chains - 1}) of {seconds:.1f} s each"
    chronicle(f"{name}: {hits} kills in {seeds}, {elapsed:.0f} s: identical")
    words = " ".join(map(str, command.words(Path("OUT"))))
    chronicle(f"    rectify {words} (processes: {command.processes})")
