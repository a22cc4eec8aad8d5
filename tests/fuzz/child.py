"""Run one command in a forked child, with limits, and record what it does.

The record has its output, the programs it starts and the files it writes outside its folder.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIME_LIMIT = 60.0  # seconds: longer is a hang (an undamaged command takes one or two)
MEMORY_LIMIT = 16 * 2**30  # bytes of address space
START_EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "pty.spawn",
    "pickle.find_class",
)
WRITE_EVENTS = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "shutil.rmtree",
)
TEMPORARY_PATHS = ("/dev/", "/proc/", f"{tempfile.gettempdir()}/tmp")


@dataclass
class Outcome:
    """How a command ended.

    Args:
        code: its exit code; None if it hung, negative if it was killed.
        output: standard output and standard error.
        actions: the programs that it started, and the files that it wrote outside its folder.
        seconds: its duration.
    """

    code: int | None
    output: str
    actions: list[str]
    seconds: float


class AuditLog:
    """An audit hook that records started code, and files written outside a folder.

    Args:
        folder: the folder in which everything may be written.
    """

    def __init__(self, folder: Path):
        self.folder = str(folder)
        self.actions: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event in START_EVENTS:
            program = args[1] if event == "pickle.find_class" else args[0]
            self.actions.append(f"{event} {program}")
        elif event in WRITE_EVENTS and self._is_outside(args[0]):
            self.actions.append(f"{event} {args[0]}")
        elif event == "open" and self._is_outside(args[0]) and self._writes(args[2]):
            self.actions.append(f"write {args[0]}")

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        absolute = os.path.abspath(os.fsdecode(path))
        return not absolute.startswith((self.folder, *TEMPORARY_PATHS))

    @staticmethod
    def _writes(flags: Any) -> bool:
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def run_stage_in_process(words: list[str], *_: Any, **__: Any) -> int:
    """Run a pipeline's stage in this process.

    It calls the same `main` as a new interpreter would, without its start.
    """
    from deploy.cli import main

    assert words[1:4] == ["-P", "-m", "deploy"], words
    return main(words[4:])


def run_in_child(words: list[str], folder: Path, report: Path) -> None:
    """Call `main` in the child, then write the report. Never returns."""
    import deploy.cli
    import deploy.run

    # limits, and replacements of a few parts of the commands
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(folder)
    deploy.cli.VERBS["read"] = ("tests.fuzz.recipes:read_set", "read every sample")
    deploy.run.run_command = run_stage_in_process
    log = AuditLog(folder)
    sys.addaudithook(log)

    # the command
    code = 99
    try:
        code = deploy.cli.main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()

    # the report, without the actions of writing it
    actions = list(log.actions)
    sys.stdout.flush()
    sys.stderr.flush()
    report.write_text(json.dumps([code, actions]))
    os._exit(0)


def run(words: list[str], folder: Path) -> Outcome:
    """Fork, run a command in a folder, and wait for its end."""
    output = folder.parent / f"{folder.name}.output"
    report = folder.parent / f"{folder.name}.report"
    report.unlink(missing_ok=True)

    # the child
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        run_in_child(words, folder, report)

    # the parent
    status = wait(pid, began)
    text = output.read_bytes().decode(errors="replace")
    seconds = time.monotonic() - began
    if status is None:
        return Outcome(None, text, [], seconds)
    if not report.exists():
        return Outcome(-os.WTERMSIG(status) or -99, text, [], seconds)
    code, actions = json.loads(report.read_text())
    return Outcome(code, text, actions, seconds)


def wait(pid: int, began: float) -> int | None:
    """Wait for a child; return its status, or None after killing one that hangs."""
    while time.monotonic() - began < TIME_LIMIT:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
