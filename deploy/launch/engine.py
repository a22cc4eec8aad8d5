"""What an engine is to us: something that gives a command processes, and tells of its jobs."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from deploy.launch.resources import Resources
from deploy.state import Engine as EngineState


class EngineSilent(ValueError):
    """An engine does not answer. Nothing is done then."""


class Task(NamedTuple):
    """What is submitted: one job, or one array of workers."""

    name: str  # deterministic: a job is found again by it
    words: list[str]  # of the `rectify` command that it runs
    folder: Path  # of its record, script and log
    record: str  # name of its record in the folder
    resources: Resources
    workers: int = 0  # size of the array; 0 for a single job


class JobFacts(NamedTuple):
    """What an engine tells of a job."""

    state: EngineState
    reason: str = ""  # in the engine's words
    hosts: str = ""
    is_ending: bool = False  # its end has begun


class JobEngine(Protocol):
    """An engine. Every method but `render` raises EngineSilent if it does not answer."""

    name: str
    keeps_graph: bool  # it starts jobs after others, so that each stage is a job

    def check(self) -> None:
        """Check that the engine can be used from this machine.

        Raises:
            ValueError: it cannot; the message names what is missing.
        """

    def render(self, task: Task, after: Sequence[str] = (), anyhow: bool = False) -> str:
        """Return the script of a task.

        Args:
            task: the task.
            after: ids of the jobs that must be done before.
            anyhow: it is enough that they have ended.
        """

    def check_fit(self, task: Task) -> None:
        """Check that the engine could ever run a task.

        Raises:
            ValueError: it could not; the message has its reason.
        """

    def submit(self, task: Task, after: Sequence[str] = (), anyhow: bool = False) -> str:
        """Submit a task, and return its id. The arguments are those of `render`."""

    def find(self, name: str) -> str | None:
        """Return the id of the job with a name; None if there is none."""

    def query(self, ids: Sequence[str]) -> dict[str, JobFacts]:
        """Return what is known of jobs."""

    def stop(self, job: str) -> None:
        """Ask a job to save and end; one that waits never begins."""

    def cancel(self, job: str) -> None:
        """End a job."""


def find_engine(name: str) -> JobEngine:
    """Return an engine by its name.

    Raises:
        ValueError: there is no such engine.
    """
    from deploy.launch.local import Local
    from deploy.launch.slurm import Slurm

    engines: dict[str, JobEngine] = {"local": Local(), "slurm": Slurm()}
    if name not in engines:
        raise ValueError(f"--on {name}: no such engine; the engines are {', '.join(engines)}")
    return engines[name]
