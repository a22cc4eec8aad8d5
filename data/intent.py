"""Intent: whether the work in a folder is wanted. It is written before a signal is sent.

Without it a cancelled command looks like a preempted one, and would be started again.
"""

import getpass
import json
import os
import re
import time
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from data.files import atomic_file, canonical, errors_named
from data.schema import check_schema

NAME = "intent.json"
SCHEMA = {"want": re.compile("run|stop|cancel")}


class Want(StrEnum):
    """What is wanted of a folder's work."""

    RUN = "run"
    STOP = "stop"  # for now: a later command goes on
    CANCEL = "cancel"  # for good


class Intent(NamedTuple):
    """What is wanted, by whom, and since when."""

    want: Want = Want.RUN
    by: str = ""
    at: str = ""


def read_intent(folder: Path) -> Intent:
    """Return what is wanted of a folder's work: that it runs, if nothing is written.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / NAME
    try:
        with errors_named(path):
            content = json.loads(path.read_bytes())  # without a checksum: users may write it
    except FileNotFoundError:
        return Intent()
    check_schema(content, SCHEMA, str(path))
    by = str(content.get("by", ""))
    at = str(content.get("at", ""))
    return Intent(Want(content["want"]), by, at)


def write_intent(folder: Path, want: Want, by: str = "") -> None:
    """Write what is wanted of a folder's work.

    Args:
        folder: the folder.
        want: what is wanted.
        by: who wants it; this user on this host by default.
    """
    at = time.strftime("%Y-%m-%d %H:%M:%S %z")
    with atomic_file(folder / NAME) as file:
        file.write(canonical({"want": want, "by": by or describe_user(), "at": at}))


def want_run(folder: Path) -> None:
    """Take back that a folder's work is not wanted: a user has started it again."""
    if read_intent(folder).want != Want.RUN:
        write_intent(folder, Want.RUN)


def describe_user() -> str:
    """Return USER@HOST; a container's user may have no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{os.uname().nodename}"
