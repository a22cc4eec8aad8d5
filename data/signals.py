"""Signals that ask a command to stop: it saves what it can, and ends with exit code 75.

`handle_signals` stands from the first line of `main`, because the first process of a container
ignores a signal that it does not handle. By default a signal raises `Stopped`. Training notes it
instead and stops after a step; a command that starts others forwards it to them.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from types import FrameType

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: run the same command again
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
UNWIND_SECONDS = 10.0  # for a command that does not note signals to end after one


class Stopped(BaseException):
    """A signal asked the command to stop. It is no Exception: handlers of errors let it pass."""


class Response(Enum):
    """What a signal does."""

    RAISE = "raise Stopped in the main thread"
    NOTE = "nothing; the command polls `stop_requested`"
    FORWARD = "it is sent to the children; without children it raises Stopped"


class _Request:
    """The signal that this command has received, and what it does."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.response = Response.RAISE
        self.forwarded: signal.Signals | None = None  # what is sent to children instead
        self.ended = threading.Event()
        self.terminals = [handle for handle in (1, 2) if os.isatty(handle)]

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second one does not interrupt the end that the first has begun."""
        is_first = self.received is None
        self.received = signal.Signals(number)
        if number == signal.SIGHUP:
            self.leave_terminal()
        if self.response is Response.NOTE:
            return
        if self.response is Response.FORWARD:
            children = find_children()
            send_signal(children, self.forwarded or number)
            if children:
                return
        if is_first:
            raise Stopped(self.received.name)

    def leave_terminal(self) -> None:
        """Write to nowhere what was written to a terminal: it is closed, and writing would fail."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in self.terminals:
            os.dup2(nowhere, handle)
        os.close(nowhere)

    def watch(self, source: int) -> None:
        """End the process if a signal does not end it in time.

        The main thread may be inside a library that does not return to Python, such as a
        collective that waits for another rank.

        Args:
            source: where Python writes the number of each signal at once.
        """
        while number := os.read(source, 1):
            if number[0] not in STOP_SIGNALS or self.ended.wait(UNWIND_SECONDS):
                continue
            waits_for_children = self.response is Response.FORWARD and find_children()
            if waits_for_children or self.response is Response.NOTE:
                continue
            text = f"stopped by {signal.Signals(number[0]).name}"
            print(f"rectify: {text}; run the same command again", file=sys.stderr, flush=True)
            for end in before_exit:
                end(STOPPED_EXIT_CODE, text)
            os._exit(STOPPED_EXIT_CODE)
        os.close(source)


_request = _Request()
before_exit: list[Callable[[int, str], object]] = []  # of modules that import this one


@contextmanager
def handle_signals(ends_process: bool) -> Iterator[None]:
    """Handle the signals that ask this command to stop, inside the block.

    In another thread than the main one, which cannot handle signals, it does nothing.

    Args:
        ends_process: the process ends after the block, and ignores further signals meanwhile.
            Otherwise the handlers are restored.

    Raises:
        Stopped: a signal was received.
    """
    global _request
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # Set the handlers, then take the signals that were blocked while this process started.
    outer = _request
    request = _Request()
    _request = request
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    outer_sink = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    threading.Thread(target=request.watch, args=(source,), daemon=True).start()
    handlers = {}
    try:
        for number in STOP_SIGNALS:
            is_ignored = signal.getsignal(number) is signal.SIG_IGN
            if not (is_ignored and number == signal.SIGHUP):  # nohup
                handlers[number] = signal.signal(number, request.handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOP_SIGNALS, signal.SIGINT))
        yield
    finally:
        request.ended.set()
        if ends_process:
            handlers = dict.fromkeys((*STOP_SIGNALS, signal.SIGINT), signal.SIG_IGN)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(outer_sink)
        os.close(sink)
        _request = outer


def note_signals() -> None:
    """From here on a signal is only noted; the command polls `stop_requested`."""
    _request.response = Response.NOTE


def forward_signals(number: signal.Signals | None = None) -> None:
    """From here on a signal is sent to the processes that this one has started.

    Args:
        number: what is sent for each signal, instead of the same one.
    """
    _request.response = Response.FORWARD
    _request.forwarded = number


def stop_requested() -> bool:
    """Whether a signal has asked this command to stop."""
    return _request.received is not None


def raise_if_stopped() -> None:
    """Raise if a signal has asked this command to stop, unless it is only to be noted.

    It is for signals that were forwarded, and for the rare one whose exception got lost, in a
    destructor for example.

    Raises:
        Stopped: there was one.
    """
    if _request.received is not None and _request.response is not Response.NOTE:
        raise Stopped(_request.received.name)


@contextmanager
def block_signals() -> Iterator[None]:
    """Block the signals, in this thread and in the processes that it starts in the block.

    These processes take them when `handle_signals` stands: none is lost while they start.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int | None = None) -> None:
    """Have Linux kill this process when its parent ends, even by SIGKILL: no orphan.

    Args:
        parent: id of the process that started this one, which may have ended already.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent not in (None, os.getppid()):
        os._exit(128 + signal.SIGKILL)


def prepare_reader(_: int) -> None:
    """Prepare a reading process, by its number: the training process handles the signals."""
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def find_children() -> list[int]:
    """Return the ids of the processes that this one has started."""
    children = []
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            text = (thread / "children").read_text()
            children += [int(child) for child in text.split()]
    return children


def send_signal(processes: list[int], number: int) -> None:
    """Send a signal to processes; one that has ended is passed over."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
