"""A run folder has one owner: alive it is named, dead it is replaced with a line."""

import json
import os
import shutil
import subprocess
import threading
import time

import pytest

from data import files, lease
from data.lease import NAME, Lease, Owner, hold, release_all
from tests.helpers.refusals import refused


def write_owner(folder, age=0.0, **changes):
    """Write the lease of another command, whose last sign of life is `age` seconds old."""
    folder.mkdir(exist_ok=True)
    owner = Owner("elsewhere-1", "elsewhere", 42, "7", "17", 2, "2026-11-30", "a")
    owner = owner._replace(**changes)
    path = folder / NAME
    path.write_text(json.dumps(owner._asdict()))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_a_second_command_is_refused_and_named_the_first(tmp_path):
    folder = tmp_path / "run"
    first = Lease(folder, 2)
    with refused(folder, os.uname().nodename, f"pid {os.getpid()}", "2 processes", "0 s ago"):
        Lease(folder, 1)
    first.release()
    Lease(folder, 1).release()
    assert not folder.exists(), "a command that left nothing leaves no folder"


def test_a_release_keeps_what_is_in_the_folder(tmp_path):
    held = Lease(tmp_path, 1)
    (tmp_path / "config.yaml").write_text("")
    held.release()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_folder_that_the_user_made_is_kept(tmp_path):
    Lease(tmp_path, 1).release()
    assert tmp_path.is_dir()
    Lease(tmp_path / "new", 1).release()
    assert not (tmp_path / "new").exists()


def test_a_copied_folder_has_no_owner(tmp_path, capfd):
    lease = Lease(tmp_path / "run", 1)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    Lease(tmp_path / "copy", 1).release()
    assert "copy" in capfd.readouterr().err
    lease.release()


def test_an_owner_that_died_on_this_machine_is_replaced_at_once(tmp_path, capfd):
    ended = subprocess.Popen(["true"])
    ended.wait()
    write_owner(tmp_path, space=lease.process_space(), process=ended.pid)
    Lease(tmp_path, 1).release()
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert str(tmp_path) in line and f"pid {ended.pid}" in line


def test_a_killed_owner_that_nobody_has_waited_for_is_dead(tmp_path):
    ended = subprocess.Popen(["sleep", "60"])
    started = files.process_start(ended.pid)
    write_owner(tmp_path, space=lease.process_space(), process=ended.pid, started=started)
    with refused(tmp_path, f"pid {ended.pid}"):
        Lease(tmp_path, 1)
    ended.kill()
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    Lease(tmp_path, 1).release()
    ended.wait()


def test_one_that_is_late_puts_the_lease_of_the_new_owner_back(tmp_path, monkeypatch):
    """Two find a dead owner; the other one was faster."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = Owner(space=lease.process_space(), process=ended.pid, started="7")
    new = Lease(tmp_path, 1)
    late = iter([dead, dead])
    read = lease.read_owner
    monkeypatch.setattr(lease, "read_owner", lambda path: next(late, None) or read(path))
    with refused(tmp_path, f"pid {os.getpid()}"):
        Lease(tmp_path, 1)
    assert read(tmp_path / NAME) == new.me
    new.release()


def test_a_lease_that_is_being_written_is_waited_for(tmp_path, capfd):
    (tmp_path / NAME).touch()
    me = {"process": os.getpid(), "started": files.process_start(os.getpid())}
    space = lease.process_space()
    writing = threading.Timer(0.3, write_owner, [tmp_path], {"space": space, **me})
    writing.start()
    with refused(tmp_path, f"pid {os.getpid()}"):
        Lease(tmp_path, 1)
    writing.join()
    assert not capfd.readouterr().err


def test_a_process_id_that_is_used_again_is_not_the_owner(tmp_path):
    write_owner(tmp_path, space=lease.process_space(), process=os.getpid(), started="1")
    Lease(tmp_path, 1).release()


def test_an_owner_elsewhere_is_replaced_when_its_lease_has_expired(tmp_path, capfd, monkeypatch):
    write_owner(tmp_path, age=1000)
    Lease(tmp_path, 1).release()
    line = capfd.readouterr().err
    assert "elsewhere" in line and "job 17" in line and "1000 s ago" in line

    # without a sign of life, after waiting for one
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 1.5)
    write_owner(tmp_path)
    began = time.monotonic()
    Lease(tmp_path, 1).release()
    assert time.monotonic() - began < 5


def test_an_owner_elsewhere_that_gives_a_sign_of_life_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 30.0)
    path = write_owner(tmp_path)
    timer = threading.Timer(1.5, os.utime, [path])
    timer.start()
    with refused(tmp_path, "elsewhere", "pid 42", "job 17"):
        Lease(tmp_path, 1)
    timer.join()


def test_a_damaged_lease_has_an_unknown_owner(tmp_path):
    write_owner(tmp_path, age=1000).write_text("{")
    os.utime(tmp_path / NAME, (1, 1))
    Lease(tmp_path, 1).release()


def test_a_command_ends_when_another_took_its_lease(tmp_path, monkeypatch, capfd):
    codes = []
    ended = threading.Event()
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(lease.os, "_exit", lambda code: (codes.append(code), ended.set()))
    held = Lease(tmp_path, 1)
    write_owner(tmp_path)
    assert ended.wait(5)
    held.release()
    assert set(codes) == {2}
    assert "elsewhere" in capfd.readouterr().err
    assert (tmp_path / NAME).exists(), "the lease of another is not removed"


def test_renewing_is_a_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    held = Lease(tmp_path, 1)
    os.utime(tmp_path / NAME, (1, 1))
    time.sleep(0.5)
    assert time.time() - (tmp_path / NAME).stat().st_mtime < 10
    held.release()


@pytest.fixture
def held(tmp_path):
    """Hold a folder twice, as one command may, and release it."""
    hold(tmp_path, 1)
    hold(tmp_path, 1)
    yield tmp_path / NAME
    release_all()


def test_one_command_may_hold_a_folder_twice(held):
    assert held.exists()
    release_all()
    assert not held.exists()
