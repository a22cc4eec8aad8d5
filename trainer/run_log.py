"""Reading a run's metrics.jsonl. It imports no torch, so that reports start soon."""

import json
import math
from pathlib import Path
from typing import Any

from data.schema import COUNT, check_schema, shorten


def read_log(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of a log, and their values: NaN where a value was not finite.

    The last line is left out if it is incomplete, because the run was killed while writing it, or
    writes it now.

    Raises:
        ValueError: a line is damaged; the message names it.
    """
    log = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            raise ValueError(
                f"{where}: is not valid JSON ({shorten(line.decode(errors='replace'))}); remove "
                "this line, or restore the file"
            ) from None
        check_schema(values, {"step": COUNT}, where)
        loss = "heldout_loss" if "heldout_loss" in values else "loss"
        check_schema(values, {loss: (None, float)}, where)
        for name, value in values.items():
            if value is None:
                values[name] = math.nan
        log.append((line, values))
    return log
