"""Collecting with real processes: any number of them, killed at any moment, gives the same bytes."""

import os
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


def test_a_finished_shard_is_not_made_again(workspace, undisturbed, tmp_path):
    for name in (name for name in undisturbed if name.startswith(("plan", "00000"))):
        (tmp_path / name).write_bytes(undisturbed[name])
    (tmp_path / "000004.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    workspace.rectify(*collect(tmp_path))
    assert content(tmp_path) == undisturbed
    changed = {path.name for path, then in before.items() if path.stat().st_mtime_ns != then}
    assert changed == {"000004.tar", "000004.npy"}


def test_a_full_disk_keeps_the_finished_shards(workspace, undisturbed, small_disk):
    out = small_disk.folder / "pairs"
    with small_disk.full(600_000, 60_000):
        failed = workspace.rectify(*collect(out), code=2)
    assert small_disk.says in failed.stderr and str(out / "0") in failed.stderr and "Traceback" not in failed.stderr
    kept = {name: data for name, data in content(out).items() if name in undisturbed}
    assert kept and all(undisturbed[name] == data for name, data in kept.items())
    workspace.rectify(*collect(out))
    assert content(out) == undisturbed


def test_the_manifest_says_where_the_pairs_come_from(workspace):
    manifest = PairSet(workspace.path / "runs/demo/pairs").manifest
    assert manifest["sampler"] == "DDIM" and manifest["steps"] == 8 and manifest["guidance"] == 1.0
    assert manifest["interpolant"] == "Linear(sigma_min=0.0)" and manifest["prediction"] == "Velocity()"
    assert manifest["dtype"] == "float16" and len(manifest["teacher"]) == 64 and manifest["noise"]["seed"] == 1
    assert len(manifest["noise"]["checksums"]) == 3


def test_other_settings_in_the_same_folder_are_refused(workspace):
    failed = workspace.rectify(*collect("runs/demo/pairs"), code=2)
    assert "holds another set" in failed.stderr and failed.stderr.strip().count("\n") == 0


def test_processes_that_come_and_go_share_the_shards(workspace, undisturbed, tmp_path):
    """Three that know nothing of each other, one of which is killed while it holds a claim: the same bytes, each shard once."""
    out = tmp_path / "pairs"
    first, second = (workspace.start(*collect(out), "--lease", "2") for _ in range(2))
    while not (out / ".claims").exists() or not list(out.glob("*.tar")):
        assert first.poll() is None
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGKILL)
    third = workspace.start(*collect(out), "--lease", "2")
    for process in (second, third):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    first.communicate()
    assert content(out) == undisturbed and not (out / ".claims").exists()
