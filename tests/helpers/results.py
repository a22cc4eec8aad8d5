"""The results of commands: the same however often they were interrupted.

What a folder tells of the commands that worked in it, and when, is no part of them.
"""

from pathlib import Path
from typing import Any

from data.lease import NAME as LEASE
from tests.helpers.training import log_lines

RECORDS = {"attempts", "heartbeat.json", "intent.json", "logs", LEASE}
# Entries of metrics.jsonl that depend on the clock, the machine or the command.
CIRCUMSTANCES = (
    *("seconds", "time", "attempt", "world", "peak_memory", "mfu", "data_wait"),
    *("samples_per_second", "samples_per_second_per_device"),
)


def is_result(name: Path) -> bool:
    """Return whether a path, relative to a folder of results, is one of them."""
    return not RECORDS & set(name.parts)


def list_results(folder: Path) -> list[Path]:
    """Return all files of a folder that are results."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in paths if is_result(path.relative_to(folder)))


def read_results(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all results in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in list_results(folder)}


def result_lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log without the circumstances."""
    lines = log_lines(run)
    for line in lines:
        for name in CIRCUMSTANCES:
            line.pop(name, None)
    return lines
