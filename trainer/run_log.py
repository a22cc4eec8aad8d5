"""Reading a run's metrics.jsonl. It imports no torch, so that reports start soon."""

import json
from pathlib import Path
from typing import Any

from data.files import errors_named
from data.schema import COUNT, check_schema


def read_log(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of a log, and their values.

    The last line is left out if it is incomplete, because the run was killed while writing it.
    """
    log = []
    lines = path.read_bytes().split(b"\n")[:-1]
    with errors_named(path):
        for line in lines:
            log.append((line, json.loads(line)))
    for number, (_, values) in enumerate(log, 1):
        loss = "heldout_loss" if "heldout_loss" in values else "loss"
        check_schema(values, {"step": COUNT, loss: float}, f"{path}: line {number}")
    return log
