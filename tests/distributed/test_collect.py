"""Drawing pairs in real processes: any number, killed at any moment, write the same bytes."""

import os
import signal

import pytest

from data.pairs import PairSet
from tests.distributed.processes import wait_until
from tests.distributed.runs import assert_fails
from tests.helpers.results import read_results

SETTINGS = ("--pairs", "640", "--steps", "4", "--shard", "64", "--batch", "32")


def command_words(out):
    """Return the words of the command that writes 10 shards."""
    return ("collect", "--teacher", "runs/demo/teacher", "--out", out, *SETTINGS)


@pytest.fixture(scope="module")
def uninterrupted(workspace, tmp_path_factory) -> dict[str, bytes]:
    """Return the files that an uninterrupted command writes."""
    out = tmp_path_factory.mktemp("pairs") / "uninterrupted"
    workspace.rectify(*command_words(out))
    files = read_results(out)
    assert "manifest.json" in files
    assert sum(name.endswith(".tar") for name in files) == 10
    return files


def test_two_processes_write_the_same_bytes(workspace, uninterrupted, tmp_path):
    workspace.rectify(*command_words(tmp_path / "pairs"), processes=2)
    assert read_results(tmp_path / "pairs") == uninterrupted


def test_repeating_a_finished_command_changes_nothing(workspace, tmp_path, uninterrupted):
    for name, data in uninterrupted.items():
        (tmp_path / name).write_bytes(data)
    workspace.rectify(*command_words(tmp_path))
    assert read_results(tmp_path) == uninterrupted


def test_a_finished_shard_is_not_written_again(workspace, uninterrupted, tmp_path):
    # the plan and all ten shards, one of which lacks its record
    for name, data in uninterrupted.items():
        if name.startswith(("plan", "00000")):
            (tmp_path / name).write_bytes(data)
    (tmp_path / "000004.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    workspace.rectify(*command_words(tmp_path))

    assert read_results(tmp_path) == uninterrupted
    changed = {path.name for path, mtime in before.items() if path.stat().st_mtime_ns != mtime}
    assert changed == {"000004.tar", "000004.npy"}


def test_a_full_disk_keeps_the_finished_shards(workspace, uninterrupted, small_disk):
    out = small_disk.folder / "pairs"
    with small_disk.full(600_000, largest_file=60_000):
        assert_fails(workspace, command_words(out), small_disk.error, out / "0")
    kept = {name: data for name, data in read_results(out).items() if name in uninterrupted}
    assert kept
    assert all(uninterrupted[name] == data for name, data in kept.items())
    workspace.rectify(*command_words(out))
    assert read_results(out) == uninterrupted


def test_the_manifest_records_where_the_pairs_come_from(workspace):
    manifest = PairSet(workspace.path / "runs/demo/pairs").manifest
    assert manifest["sampler"] == "DDIM"
    assert manifest["steps"] == 8
    assert manifest["guidance"] == 1.0
    assert manifest["interpolant"] == {
        "class_path": "models.interpolant.Linear",
        "init_args": {"sigma_min": 0.0},
    }
    assert manifest["prediction"] == {"class_path": "models.prediction.Velocity", "init_args": {}}
    assert manifest["dtype"] == "float16"
    assert len(manifest["teacher"]) == 64
    assert manifest["noise"]["seed"] == 1
    assert len(manifest["noise"]["checksums"]) == 3


def test_other_settings_in_the_same_folder_are_refused(workspace):
    err = assert_fails(workspace, command_words("runs/demo/pairs"), "runs/demo/pairs", "count", 640)
    assert err.strip().count("\n") == 0


def test_processes_that_start_and_die_share_the_shards(workspace, uninterrupted, tmp_path):
    """Three unconnected commands, one of which is killed while it holds a claim on a shard.

    The bytes are the same, and no claim is left behind.
    """
    out = tmp_path / "pairs"
    words = (*command_words(out), "--lease", "2")

    # kill the first of two while it works on a shard
    first = workspace.start(*words)
    second = workspace.start(*words)
    wait_until(first, lambda: (out / ".claims").exists() and list(out.glob("*.tar")))
    os.killpg(first.pid, signal.SIGKILL)

    # a third command joins the second
    third = workspace.start(*words)
    for process in (second, third):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    first.communicate()

    assert read_results(out) == uninterrupted
    assert not (out / ".claims").exists()
