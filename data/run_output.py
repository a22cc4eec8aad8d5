"""The lines that a command prints, kept in FOLDER/logs/NNNN-rankRR.txt too.

The folder is known only after the options are parsed: until then the lines are kept in memory.
"""

import io
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

FIRST_CHARACTERS = 1_000_000  # that are kept until the file is known
SEARCH_SECONDS = 1.0  # between attempts to find the file


class RunLog:
    """The log file of this process, once it is known."""

    def __init__(self) -> None:
        self.file: TextIO = io.StringIO()
        self.find_path: Callable[[], Path | None] = lambda: None
        self.searched = 0.0
        self.is_open = False
        self.is_copied = False  # whether this process's streams are copied into it

    def write(self, text: str) -> None:
        """Write a text; a progress bar, which rewrites its line, is left out."""
        if text.startswith("\r"):
            return
        self.search()
        if self.is_open or self.file.tell() < FIRST_CHARACTERS:
            self.file.write(text)

    def search(self, now: bool = False) -> None:
        """Look for the file from time to time, and move into it what was kept.

        Args:
            now: look at once.
        """
        if self.is_open or not (now or time.monotonic() - self.searched > SEARCH_SECONDS):
            return
        self.searched = time.monotonic()
        path = self.find_path()
        if path is None:
            return
        first = cast(io.StringIO, self.file).getvalue()
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", buffering=1, errors="backslashreplace")
        self.is_open = True
        self.file.write(first)


class CopiedStream:
    """A stream whose texts are written to the log, too."""

    def __init__(self, stream: TextIO, log: RunLog):
        self.stream = stream
        self.log = log

    def write(self, text: str) -> int:
        """Write a text to both."""
        with suppress(OSError):  # a full disk: the terminal has it
            self.log.write(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


log = RunLog()


def copy_output() -> None:
    """Copy what this process prints from here on into its log."""
    log.is_copied = True
    sys.stdout = cast(TextIO, CopiedStream(sys.stdout, log))
    sys.stderr = cast(TextIO, CopiedStream(sys.stderr, log))
