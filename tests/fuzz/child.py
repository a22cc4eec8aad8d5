"""One command in a forked child: limits, captured output, and a record of all that it started or wrote elsewhere."""

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
from types import SimpleNamespace
from typing import Any

LIMIT = 60.0  # seconds: longer is a hang (an undamaged command takes one or two)
MEMORY = 16 * 2**30  # of address space
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "pickle.find_class")
WRITES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")
TEMPORARY = ("/dev/", "/proc/", f"{tempfile.gettempdir()}/tmp")


@dataclass
class Outcome:
    """How a command ended: its exit code (None: it hung, negative: it was killed), what it said, what it did."""

    code: int | None
    said: str
    did: list[str]
    seconds: float


class Watchman:
    """An audit hook that writes down code that is started and files that are written outside a folder."""

    def __init__(self, folder: Path):
        self.folder, self.did = str(folder), []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event in STARTS:
            what = args[1] if event == "pickle.find_class" else args[0]
            self.did.append(f"{event} {what}")
        elif event in WRITES and self._outside(args[0]):
            self.did.append(f"{event} {args[0]}")
        elif event == "open" and self._outside(args[0]) and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            self.did.append(f"write {args[0]}")

    def _outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        whole = os.path.abspath(os.fsdecode(path))
        return not whole.startswith((self.folder, *TEMPORARY))


def in_process(words: list[str], **_: Any) -> SimpleNamespace:
    """Run a pipeline's stage here, instead of in an interpreter of its own: the same `main`, without its start."""
    from deploy.cli import main

    assert words[1:4] == ["-P", "-m", "deploy"], words
    return SimpleNamespace(returncode=main(words[4:]))


def command(words: list[str], folder: Path, report: Path) -> None:
    """Run in the child: call `main`, then write the report. Never returns."""
    import deploy.cli
    import deploy.run

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(folder)
    deploy.cli.VERBS["read"] = ("tests.fuzz.recipes:read", "read every sample")
    deploy.run.subprocess = SimpleNamespace(run=in_process)
    watchman = Watchman(folder)
    sys.addaudithook(watchman)
    code = 99
    try:
        code = deploy.cli.main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    did = list(watchman.did)
    sys.stdout.flush(), sys.stderr.flush()
    report.write_text(json.dumps([code, did]))
    os._exit(0)


def run(words: list[str], folder: Path) -> Outcome:
    """Fork, run a command in a folder, and wait for its end."""
    said, report = folder.parent / f"{folder.name}.said", folder.parent / f"{folder.name}.report"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        command(words, folder, report)
    status = wait(pid, began)
    text = said.read_bytes().decode(errors="replace")
    seconds = time.monotonic() - began
    if status is None or not report.exists():
        return Outcome(None if status is None else -os.WTERMSIG(status) or -99, text, [], seconds)
    code, did = json.loads(report.read_text())
    return Outcome(code, text, did, seconds)


def wait(pid: int, began: float) -> int | None:
    """Wait for a child; return its status, or None after killing one that hangs."""
    while time.monotonic() - began < LIMIT:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
