"""`rectify run` killed at a point of its work with files, counted: no moment is missed.

It imports little, so that a process that is forked from one with it starts at once.
"""

import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import data.pack  # noqa: F401  the verb of the stages
import deploy.run
from data.attempts import RESULTS
from deploy.cli import main

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR
FORKS = get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def is_record(path: Path, out: Path) -> bool:
    """Return whether a path is in a pipeline's folder, or is a record of its stages."""
    return path.parent == out or out / "stages" in path.parents


def kill_at(point: int, out: Path) -> None:
    """Have this process killed before its Nth change of a pipeline's records.

    Args:
        point: N, from 1; 0 for never.
        out: the pipeline's folder.
    """
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        is_change = event in CHANGES or (event == "open" and args[2] & WRITING)
        if not is_change or isinstance(args[0], int) or not is_record(Path(args[0]), out):
            return
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run_in_process(words: list[str], started: object, **options: Any) -> int:
    """Run a stage in this process, as `deploy.run.run_command` does in another one."""
    os.environ[RESULTS] = options["env"][RESULTS]
    code = main(words[4:])
    os.environ.pop(RESULTS)
    return code


def run_rectify(words: Sequence[str], point: int, out: Path, log: Path) -> None:
    """Run `rectify WORDS` in this process; it ends with the exit code, or is killed."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    deploy.run.run_command = run_in_process
    kill_at(point, out)
    sys.exit(main(words))


def fork_rectify(words: Sequence[object], point: int, out: Path, log: Path) -> int | None:
    """Run `rectify WORDS` in a process of its own.

    Args:
        words: the command's words.
        point: before which change of the pipeline's records it is killed; 0 for none.
        out: the pipeline's folder.
        log: file for what it prints.

    Returns:
        its exit code, -9 if it was killed.
    """
    process = FORKS.Process(target=run_rectify, args=([*map(str, words)], point, out, log))
    process.start()
    process.join()
    return process.exitcode
