"""Progress of long work: a bar on a terminal, lines in a log."""

import fcntl
import os
import struct
import sys
import termios
from contextlib import suppress

import pytest

from data import progress
from data.progress import Meter, print_message


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def count_slowly(clock, done=0, shown=True):
    """Count 4 x 256 pairs, each time in 5 s."""
    with Meter("collect", 10_000, "pairs", done, shown) as meter:
        for i in range(4):
            clock.now += 5
            meter.add(256, f"loss {i}")


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(clock, capsys):
    count_slowly(clock)
    assert capsys.readouterr().err.splitlines() == [
        "collect: 512/10000 pairs, 51.2 pairs/s, 0:03:05 left loss 1",
        "collect: 1024/10000 pairs, 51.2 pairs/s, 0:02:55 left loss 3",
        "collect: 1024/10000 pairs, 51.2 pairs/s, 0:02:55 left loss 3",
    ]


def test_a_line_has_the_last_note(clock, capsys):
    """Work is counted in every step, its loss noted in some."""
    with Meter("fit", 100, "steps") as meter:
        meter.add(1, "loss 0.5")
        clock.now += 10
        meter.add(1)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.endswith("left loss 0.5") for line in lines)


def test_earlier_work_does_not_count_for_the_rate(clock, capsys):
    count_slowly(clock, done=5000)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "collect: 6024/10000 pairs, 51.2 pairs/s, 0:01:17 left loss 3"


def test_other_ranks_print_nothing(clock, capsys):
    count_slowly(clock, shown=False)
    assert capsys.readouterr().err == ""


class Terminal:
    """A pseudo-terminal as stderr."""

    def __init__(self, monkeypatch, rows, columns):
        self.screen, writer = os.openpty()
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
        os.set_blocking(self.screen, False)
        self.stderr = os.fdopen(writer, "w")
        monkeypatch.setattr(sys, "stderr", self.stderr)

    def read(self):
        """Return what has been printed."""
        self.stderr.flush()
        found = b""
        with suppress(BlockingIOError):
            while True:
                found += os.read(self.screen, 1 << 16)
        return found.decode()


def test_a_terminal_gets_a_bar_with_the_amount_the_rate_and_the_time_left(monkeypatch):
    terminal = Terminal(monkeypatch, 24, 100)
    with Meter("collect", 1000, "pairs") as meter:
        for _ in range(3):
            meter.add(250, "loss 0.5")
    last = terminal.read().removesuffix("\r\n").rsplit("\r", 1)[-1]
    assert last.startswith("collect:  75%|")
    assert "| 750/1000 pairs, " in last
    assert " pairs/s, 00:00 left, loss 0.5" in last
    assert len(last) <= 100


def test_a_message_stands_above_the_bar(monkeypatch):
    terminal = Terminal(monkeypatch, 24, 100)
    with Meter("collect", 1000, "pairs"):
        print_message("skipped step 5")
    lines = [line.rsplit("\r", 1)[-1] for line in terminal.read().split("\r\n")]
    assert lines[0] == "skipped step 5"
    assert lines[1].startswith("collect:")


def test_a_terminal_without_a_size_gets_lines(monkeypatch):
    terminal = Terminal(monkeypatch, 0, 0)
    with Meter("collect", 1000, "pairs") as meter:
        meter.add(250)
    assert terminal.read().startswith("collect: 250/1000 pairs, ")
