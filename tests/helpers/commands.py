"""Run `rectify` commands: in this process, or as real processes in a folder of their own."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

from deploy.cli import main

REPOSITORY = Path(__file__).parent.parent.parent


def run_command(*words: object) -> int:
    """Run `rectify WORDS` in this process and return its exit code."""
    return main([str(word) for word in words])


def succeed(*words: object) -> None:
    """Run `rectify WORDS` in this process; it must end with exit code 0."""
    assert run_command(*words) == 0, f"rectify {' '.join(map(str, words))}"


class Workspace:
    """A folder with the repository's configs, in which commands run as a user would run them."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / "configs").exists():
            with suppress(FileExistsError):  # another process made it
                (path / "configs").symlink_to(REPOSITORY / "configs")

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**os.environ, "WANDB_MODE": "offline", "PATH": path}

    def start(
        self,
        *words: object,
        processes: int = 1,
        torchrun: Sequence[str] = (),
        before: Sequence[str] = (),
        preexec: Callable[[], None] | None = None,
    ) -> subprocess.Popen:
        """Start `rectify WORDS`.

        Args:
            words: the command's words.
            processes: more than one run under torchrun.
            torchrun: options of torchrun.
            before: words of a command that runs ours, e.g. `timeout 10`.
            preexec: called in the new process before the command.
        """
        if processes > 1:
            torchrun = ("--standalone", f"--nproc-per-node={processes}")
        launcher = ("torch.distributed.run", *torchrun, "-m", "--") if torchrun else ()
        command = [*before, sys.executable, "-m", *launcher, "deploy", *map(str, words)]
        return subprocess.Popen(
            command,
            cwd=self.path,
            env=self.environment(),
            preexec_fn=preexec,
            stdout=PIPE,
            stderr=PIPE,
            text=True,
            start_new_session=True,
        )

    def rectify(
        self, *words: object, processes: int = 1, code: int = 0
    ) -> subprocess.CompletedProcess:
        """Run `rectify WORDS` to its end; its exit code must be `code`."""
        process = self.start(*words, processes=processes)
        out, err = process.communicate(timeout=500)
        command = f"rectify {' '.join(map(str, words))}"
        assert process.returncode == code, f"{command}: exit {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(words, process.returncode, out, err)
