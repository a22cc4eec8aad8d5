"""SIGKILL at random moments, restarted by the same command: nothing torn under a final name, the finished result identical."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from models import teacher
from tests.distributed.runs import equal, fit

HELD = ("--data.heldout", "Latents", "--data.heldout.path", "runs/demo/latents", "--trainer.val_check_interval", "10")
SMALL = ("--checkpoints.keep", "100", "--trainer.logger", "false", *HELD)
TWO = ("--trainer.devices", "2", "--trainer.strategy")


@dataclass(frozen=True)
class Mode:
    """A command that is killed: its words for a folder, and on how many processes."""

    words: Callable[[Path], tuple]
    processes: int = 1


ENCODE = ("encode", "--images", "runs/demo/images/train", "--codec", "runs/demo/autoencoder", "--shard", "64")
COLLECT = ("collect", "--teacher", "runs/demo/teacher", "--pairs", "640", "--steps", "8", "--shard", "64")
MODES = {
    "pack": Mode(lambda out: ("pack", "--out", out, "--shard", "128", "--size", "64")),
    "encode": Mode(lambda out: (*ENCODE, "--out", out)),
    "collect": Mode(lambda out: (*COLLECT, "--out", out)),
    "export": Mode(lambda out: ("export", "--run", "runs/demo/student", "--out", out)),
    "fit": Mode(lambda out: fit(out, 40, *SMALL)),
    "fit ddp": Mode(lambda out: fit(out, 40, *SMALL, *TWO, "ddp"), processes=2),
    "fit fsdp2": Mode(lambda out: fit(out, 40, *SMALL, *TWO, "fsdp2"), processes=2),
}


def whole(path: Path, wanted: Path) -> bool:
    """Tell whether a file is what the undisturbed run has under this name."""
    if path.suffix == ".ckpt":
        return equal(lasting(path), lasting(wanted))
    if path.name == "metrics.jsonl":
        return True  # an open log, whose last line a kill may tear
    if path.name == "config.yaml":
        return path.read_text().replace(str(path.parent), "") == wanted.read_text().replace(str(wanted.parent), "")
    return path.read_bytes() == wanted.read_bytes()


def lasting(checkpoint: Path) -> dict:
    """Return what of a checkpoint training goes on from."""
    whole = teacher.read(checkpoint)
    names = ("state_dict", "ema", "ema_profiles", "optimizer_states", "lr_schedulers", "global_step", "evaluations")
    return {key: whole[key] for key in names}


def final_names(out: Path) -> dict[str, Path]:
    """Return what stands under final names (a sharded checkpoint is one); temporary names begin with a dot."""
    within = {path for folder in out.rglob("*.ckpt") for path in folder.rglob("*")}
    paths = {p.relative_to(out): p for p in out.rglob("*") if (p.is_file() or p.suffix == ".ckpt") and p not in within}
    return {str(name): path for name, path in paths.items() if not any(part.startswith(".") for part in name.parts)}


def compare(out: Path, undisturbed: Path, finished: bool) -> None:
    """Check that all files are whole, and that none is missing if the command has finished."""
    found, wanted = final_names(out), final_names(undisturbed)
    assert found.keys() <= wanted.keys(), found.keys() - wanted.keys()
    torn = [name for name, path in found.items() if not whole(path, wanted[name])]
    assert not torn, f"torn under a final name: {torn}"
    if finished:
        assert found.keys() == wanted.keys(), wanted.keys() - found.keys()
        leftovers = [path for path in (*out.rglob(".*"), *out.parent.glob(".*"))]
        assert not leftovers, f"left over: {leftovers}"
        assert said(out) == said(undisturbed)


def said(out: Path) -> list[dict]:
    """Return the lines of a run's log, without what its clock said."""
    lines = map(json.loads, (out / "metrics.jsonl").open()) if (out / "metrics.jsonl").exists() else []
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def descendants(pid: int) -> list[int]:
    """Return a process's children, their children and so on: torchrun gives its ranks sessions of their own."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return children + [below for child in children for below in descendants(child)]


def kill(process, draw: random.Random) -> None:
    """Kill a command with all its processes; of several ranks, at times only one, after which torchrun ends the other."""
    below = descendants(process.pid)
    ranks = [pid for pid in below if "-m\0deploy" in Path(f"/proc/{pid}/cmdline").read_text()] if below else []
    alone = len(ranks) > 1 and draw.random() < 0.5
    for pid in [draw.choice(ranks)] if alone else [process.pid, *below]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it had just ended by itself
    process.communicate(timeout=120)


def chain(workspace, mode: Mode, undisturbed: Path, seconds: float, out: Path, draw: random.Random, kills: int) -> int:
    """Start, kill, start, kill, ... and at last finish; return how many kills hit a running command."""
    hits = 0
    while hits < kills:
        process = workspace.start(*mode.words(out), processes=mode.processes)
        moment = time.monotonic() + draw.uniform(0, seconds)
        while time.monotonic() < moment and process.poll() is None:
            time.sleep(0.001)
        if process.poll() is not None:
            text = process.communicate()
            assert process.returncode == 0, text
            break
        kill(process, draw)
        hits += 1
        compare(out, undisturbed, finished=False)
    workspace.rectify(*mode.words(out), processes=mode.processes)
    compare(out, undisturbed, finished=True)
    return hits


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODES)
def test_killed_at_any_moment_the_same_command_gives_the_same_files(workspace, tmp_path, request, chronicle, name):
    mode, kills, began = MODES[name], 20 if request.config.getoption("--long") else 2, time.monotonic()
    undisturbed = tmp_path / "undisturbed" / "run"
    undisturbed.parent.mkdir()
    workspace.rectify(*mode.words(undisturbed), processes=mode.processes)
    seconds, done, chains = time.monotonic() - began, 0, 0
    while done < kills:
        out = tmp_path / f"chain-{chains}" / "run"
        out.parent.mkdir()
        done += chain(workspace, mode, undisturbed, seconds, out, random.Random(chains), min(4, kills - done))
        chains += 1
    words = " ".join(map(str, mode.words(Path("OUT"))))
    took = time.monotonic() - began
    chronicle(
        f"{name}: {done} kills in {chains} chains (seeds 0 to {chains - 1}) of {seconds:.1f} s each, {took:.0f} s: identical"
    )
    chronicle(f"    rectify {words} (processes: {mode.processes})")
