"""Collecting with real processes: any number of them, killed at any moment, gives the same bytes."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from data.pairs import PairSet

SETTINGS = ("--pairs", "640", "--steps", "4", "--shard", "64", "--batch", "32")


def collect(out):
    return ("collect", "--teacher", "runs/demo/teacher", "--out", out, *SETTINGS)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def undisturbed(workspace, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("pairs") / "undisturbed"
    workspace.rectify(*collect(out))
    found = content(out)
    assert "manifest.json" in found and sum(name.endswith(".tar") for name in found) == 10
    return found


def test_two_processes_collect_the_same_bytes(workspace, undisturbed, tmp_path):
    workspace.rectify(*collect(tmp_path / "pairs"), processes=2)
    assert content(tmp_path / "pairs") == undisturbed


def test_repeating_a_finished_collection_changes_nothing(workspace, tmp_path, undisturbed):
    for name, data in undisturbed.items():
        (tmp_path / name).write_bytes(data)
    workspace.rectify(*collect(tmp_path))
    assert content(tmp_path) == undisturbed


@pytest.mark.parametrize("seed", range(3))
def test_killed_and_run_again_gives_the_same_set(workspace, undisturbed, tmp_path, seed):
    out, moment = tmp_path / "pairs", random.Random(seed)
    process = workspace.start(*collect(out))
    shards = moment.randint(1, 6)
    while len(list(out.glob("*.tar"))) < shards and process.poll() is None:
        time.sleep(0.002)
    time.sleep(moment.random() * 0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before the kill"
    assert not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.json") if path.name != "plan.json"}
    workspace.rectify(*collect(out))
    assert content(out) == undisturbed
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items()), "a finished shard was made again"


def test_a_full_disk_keeps_the_finished_shards(workspace, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=600k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        failed = workspace.rectify(*collect(disk / "pairs"), code=2)
        assert (
            "No space left on device" in failed.stderr
            and str(disk / "pairs/0") in failed.stderr
            and "Traceback" not in failed.stderr
        )
        kept = {name: data for name, data in content(disk / "pairs").items() if name in undisturbed}
        assert kept and all(undisturbed[name] == data for name, data in kept.items())
        assert any(name.endswith(".tar") for name in kept)
        os.system(f"mount -o remount,size=20m {disk}")
        workspace.rectify(*collect(disk / "pairs"))
        assert content(disk / "pairs") == undisturbed
    finally:
        os.system(f"umount {disk}")


def test_the_manifest_says_where_the_pairs_come_from(workspace):
    manifest = PairSet(workspace.path / "runs/demo/pairs").manifest
    assert manifest["sampler"] == "DDIM" and manifest["steps"] == 8 and manifest["guidance"] == 1.0
    assert manifest["interpolant"] == "Linear(sigma_min=0.0)" and manifest["prediction"] == "Velocity()"
    assert manifest["dtype"] == "float16" and len(manifest["teacher"]) == 64 and manifest["noise"]["seed"] == 1
    assert len(manifest["noise"]["checksums"]) == 3


def test_other_settings_in_the_same_folder_are_refused(workspace):
    failed = workspace.rectify(*collect("runs/demo/pairs"), code=2)
    assert "holds another set" in failed.stderr and failed.stderr.strip().count("\n") == 0
