"""Processes that a test watches and signals."""

import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def wait_until(process: subprocess.Popen, is_ready: Callable[[], object]) -> None:
    """Wait until a condition holds; the process must not end before it does."""
    while not is_ready():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def find_children(pid: int) -> list[int]:
    """Return the ids of the children of all of a process's threads."""
    children = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has just ended
            text = (thread / "children").read_text()
            children += [int(child) for child in text.split()]
    return children


def find_descendants(pid: int) -> list[int]:
    """Return the ids of a process's children, their children and so on.

    torchrun starts each rank in a new session, so killing a process group misses the ranks.
    """
    try:
        children = find_children(pid)
    except FileNotFoundError:  # it has ended
        return []
    below = [pid for child in children for pid in find_descendants(child)]
    return children + below
