"""This host as an engine: a pipeline in the background, which outlives the terminal."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data.files import process_space, process_start
from deploy.launch.engine import JobFacts, Task
from deploy.launch.resources import read_secrets
from deploy.state import Engine

JOB_NAME = "RECTIFY_JOB"  # variable with the name of a process's job


class Local:
    """This host. A job's id is SPACE/PID/START: where the process's id is valid, and its start."""

    name = "local"
    keeps_graph = False

    def check(self) -> None:
        """Do nothing: this host can always be used."""

    def render(self, task: Task, after: Sequence[str] = (), anyhow: bool = False) -> str:
        """Return the command, in a shell's words."""
        import shlex

        return shlex.join(["rectify", *task.words])

    def check_fit(self, task: Task) -> None:
        """Check that the host has the cores.

        Raises:
            ValueError: it has not.
        """
        cores = os.cpu_count() or 1
        if task.resources.cpus > cores:
            raise ValueError(
                f"resources: cpus is {task.resources.cpus}, and this host has {cores}; lower it"
            )

    def submit(self, task: Task, after: Sequence[str] = (), anyhow: bool = False) -> str:
        """Start the command in a session of its own, with its output in FOLDER/logs."""
        logs = task.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **read_secrets(task.resources), JOB_NAME: task.name}
        with (logs / f"{task.name}.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "deploy", *task.words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return f"{process_space()}/{process.pid}/{process_start(process.pid)}"

    def find(self, name: str) -> str | None:
        """Return the id of the first process that has a job's name in its environment."""
        wanted = f"{JOB_NAME}={name}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is another user's
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        if not found:
            return None
        return f"{process_space()}/{min(found)}/{process_start(min(found))}"

    def query(self, ids: Sequence[str]) -> dict[str, JobFacts]:
        """Return whether processes run; nothing is known of those of other hosts."""
        facts = {}
        for job in ids:
            space, process, start = job.split("/")
            if space != process_space():
                facts[job] = JobFacts(Engine.NONE, hosts=space.rpartition("-")[0])
            else:
                is_alive = process_start(int(process)) == start
                facts[job] = JobFacts(Engine.RUNNING if is_alive else Engine.ENDED)
        return facts

    def stop(self, job: str) -> None:
        """Send SIGTERM to the process, if it runs on this host."""
        space, process, start = job.split("/")
        if space == process_space() and process_start(int(process)) == start:
            os.kill(int(process), signal.SIGTERM)

    def cancel(self, job: str) -> None:
        """Send SIGTERM, too: the command saves and ends."""
        self.stop(job)
