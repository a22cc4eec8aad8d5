"""Signals that ask a command to stop: raised, noted, forwarded; never lost, and never for ever."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

import deploy.cli
from data import signals
from data.signals import STOP_SIGNALS, Stopped, handle_signals, raise_if_stopped, stop_requested
from tests.helpers.commands import REPOSITORY, run_command


def send(number):
    """Send a signal to this process."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_a_verb_with_75_and_one_line(monkeypatch, capfd, number):
    def wait(*_):
        send(number)
        time.sleep(30)

    before = signal.getsignal(number)
    monkeypatch.setattr(deploy.cli, "call", wait)
    assert run_command("pack") == 75
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert number.name in line
    assert signal.getsignal(number) is before
    assert not stop_requested()


def test_a_noted_signal_interrupts_nothing():
    with handle_signals(ends_process=False):
        signals.note_signals()
        send(signal.SIGTERM)
        raise_if_stopped()
        assert stop_requested()


def test_a_forwarded_signal_reaches_the_children_and_is_remembered(monkeypatch):
    """This process may have children of other tests, such as wandb's service: they are left out."""
    others = signals.find_children()
    with handle_signals(ends_process=False):
        child = subprocess.Popen(["sleep", "30"])
        children = signals.find_children
        monkeypatch.setattr(signals, "find_children", lambda: list({*children()} - {*others}))
        signals.forward_signals()
        send(signal.SIGUSR1)
        assert child.wait() == -signal.SIGUSR1
        with pytest.raises(Stopped, match="SIGUSR1"):
            raise_if_stopped()
    with pytest.raises(Stopped), handle_signals(ends_process=False):
        signals.forward_signals()
        send(signal.SIGTERM)  # there is no child: nothing to wait for


def test_a_second_signal_does_not_interrupt_the_end():
    cleaned = False
    with pytest.raises(Stopped), handle_signals(ends_process=False):
        try:
            send(signal.SIGTERM)
            time.sleep(30)
        finally:
            send(signal.SIGTERM)
            cleaned = True
    assert cleaned


def test_nohup_is_respected(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handle_signals(ends_process=False):
            send(signal.SIGHUP)
            assert not stop_requested()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_was_blocked_while_the_process_started_is_taken():
    with signals.block_signals():
        signal.raise_signal(signal.SIGTERM)  # to this thread: pytest may have others
        with pytest.raises(Stopped), handle_signals(ends_process=False):
            time.sleep(30)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_during_the_imports_is_taken(number, code):
    """The program's own imports come before `main`, which handles signals."""
    script = f"""
import builtins, signal, sys
from deploy.__main__ import start
before = builtins.__import__
def interrupted_import(name, *more):
    if name == "deploy.cli":
        signal.raise_signal({int(number)})
    return before(name, *more)
builtins.__import__ = interrupted_import
sys.exit(start())
"""
    words = [sys.executable, "-c", script, "pack"]
    ended = subprocess.run(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == code
    assert ended.stderr.startswith("rectify: stopped")
    assert ended.stderr.count("\n") == 1


def test_a_library_that_does_not_return_cannot_hold_the_process():
    """The main thread is inside one long call, as in a collective that waits for another rank."""
    code = """
import hashlib, sys
import deploy.cli
from data import signals
signals.UNWIND_SECONDS = 0.3
def wait(*_):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
deploy.cli.call = wait
sys.exit(deploy.cli.main())
"""
    words = [sys.executable, "-c", code, "pack"]
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 75


def test_a_closed_terminal_does_not_break_what_is_being_saved(tmp_path):
    """The command goes on to print, as training does until it has saved."""
    code = f"""
import time
from pathlib import Path
from data.signals import handle_signals, note_signals, stop_requested
with handle_signals(ends_process=True):
    note_signals()
    while not stop_requested():
        print("step", flush=True)
        time.sleep(0.01)
    print("saving", flush=True)
    Path({str(tmp_path / "saved")!r}).touch()
"""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [sys.executable, "-c", code])
    os.read(terminal, 4)
    os.close(terminal)  # its processes receive SIGHUP
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "saved").exists()


def test_a_command_ends_if_its_parent_was_killed_before_it_began(tmp_path):
    begun = tmp_path / "begun"
    code = f"""
import os, signal, subprocess, time
from functools import partial
from pathlib import Path
from data.signals import end_with_parent
parent = os.getpid()
def prepare():
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.001)
    end_with_parent(parent)
subprocess.Popen(["touch", {str(begun)!r}], preexec_fn=prepare)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert not begun.exists()  # its output is closed, so it has ended
