"""Temporary files of killed processes are removed, those of other containers are not."""

import os
import subprocess
import time

from data import files
from data.files import atomic_folder, process_space, process_start, remove_leftovers


def make(folder, space, process, age=0.0, start=""):
    """Make a temporary file of a process, written `age` seconds ago."""
    start = start or process_start(process) or "7"
    path = folder / f".x.tar.{space}-{process}-{start}-0123abcd.tmp"
    path.write_text("torn")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_only_a_dead_process_of_this_machine_has_left_its_files(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = make(tmp_path, process_space(), ended.pid)
    alive = make(tmp_path, process_space(), os.getpid(), age=10**6)
    same_number = make(tmp_path, process_space(), os.getpid(), start="1")
    remove_leftovers(tmp_path)
    assert not dead.exists()
    assert not same_number.exists(), "as in a container that was started again"
    assert alive.exists()


def test_containers_of_one_host_name_leave_each_others_files(tmp_path, monkeypatch):
    """Their processes have other ids: one that lives elsewhere does not exist in this one."""
    mine = process_space()
    monkeypatch.setattr(files.os, "stat", lambda path: os.stat_result((0, 1, *[0] * 8)))
    other = process_space()
    monkeypatch.undo()
    assert mine != other
    assert mine.rpartition("-")[0] == other.rpartition("-")[0]
    working = make(tmp_path, other, 2**22 - 1)
    remove_leftovers(tmp_path)
    assert working.exists()


def test_files_that_nobody_has_written_for_a_day_are_removed(tmp_path):
    """As after a restart of the machine. A folder is as young as its youngest file."""
    old = make(tmp_path, "elsewhere-0", 1, age=90_000)
    folder = tmp_path / ".y.elsewhere-0-1-0123abcd.tmp"
    folder.mkdir()
    (folder / "part").touch()
    os.utime(folder, (1, 1))
    remove_leftovers(tmp_path)
    assert not old.exists()
    assert folder.exists()
    os.utime(folder / "part", (1, 1))
    remove_leftovers(tmp_path)
    assert not folder.exists()


def test_a_temporary_name_is_recognised_by_its_maker(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "set") as temporary:
        remove_leftovers(tmp_path)
        assert temporary.exists()
