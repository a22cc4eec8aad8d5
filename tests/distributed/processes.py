"""Processes that a test watches and signals."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(process: subprocess.Popen, is_ready: Callable[[], object]) -> None:
    """Wait until a condition holds; the process must not end before it does."""
    while not is_ready():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def find_children(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


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
