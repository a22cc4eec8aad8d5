"""Jobs that were submitted: FOLDER/job.json, written before and after the submission.

A launch that is killed in between leaves `submitting`, with the job's name. The next one looks the
name up, and adopts the job: nothing is submitted twice.
"""

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from data.files import errors_named, read_json, write_json
from data.schema import COUNT, check_schema
from deploy.launch.engine import EngineSilent, JobEngine, JobFacts, Task, find_engine
from deploy.state import Engine

JOB = "job.json"
WORKERS = "workers.json"  # of the array that shares the work
SETTLING_SECONDS = 10.0  # after a submission began, until its job is surely visible
SCHEMA = {"engine": str, "name": str, "number": COUNT, "id": str, "at": float, "inode": COUNT}


class Job(NamedTuple):
    """A job that was submitted, or was about to be."""

    engine: str
    name: str
    number: int  # of the submission
    id: str  # "" while it is being submitted
    at: float  # seconds since 1970
    first_attempt: int  # number of the first attempt that is the job's
    inode: int  # of the folder: a copied one has no job


def read_job(path: Path) -> Job | None:
    """Return the job in a record; None if there is none, or it is that of a copied folder.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    check_schema(content, SCHEMA, str(path))
    with errors_named(path):
        job = Job(**content)
    return job if job.inode == path.parent.stat().st_ino else None


def write_job(path: Path, job: Job) -> None:
    """Write the record of a job."""
    write_json(path, job._asdict())


def adopt_job(engine: JobEngine, path: Path, job: Job) -> Job | None:
    """Return a job with its id, which is looked up if the submission was interrupted.

    Args:
        engine: the job's engine.
        path: of its record.
        job: the job.

    Returns:
        The job; None if it was never submitted.

    Raises:
        EngineSilent: the engine does not answer.
    """
    if job.id:
        return job
    found = engine.find(job.name)
    while found is None and time.time() - job.at < SETTLING_SECONDS:
        time.sleep(1)
        found = engine.find(job.name)
    if found is None:
        return None
    job = job._replace(id=found)
    write_job(path, job)
    return job


def submit_once(
    engine: JobEngine, task: Task, after: list[str], anyhow: bool, first_attempt: int
) -> Job:
    """Submit a task, unless its job waits or runs already.

    Args:
        engine: the engine.
        task: the task; the submission's number is added to its name.
        after: see `JobEngine.render`.
        anyhow: see `JobEngine.render`.
        first_attempt: number of the first attempt that is the job's.

    Raises:
        EngineSilent: the engine does not answer; nothing is submitted.
    """
    path = task.folder / task.record
    job = read_job(path)
    number = 1
    if job:
        number = job.number + 1
        adopted = adopt_job(engine, path, job)
        if adopted and query(engine, adopted).state in (Engine.QUEUED, Engine.RUNNING):
            return adopted
    name = f"{task.name}-{number}"
    task.folder.mkdir(parents=True, exist_ok=True)
    inode = task.folder.stat().st_ino
    begun = Job(engine.name, name, number, "", time.time(), first_attempt, inode)
    write_job(path, begun)
    submitted = begun._replace(id=engine.submit(task._replace(name=name), after, anyhow))
    write_job(path, submitted)
    return submitted


def query(engine: JobEngine, job: Job) -> JobFacts:
    """Return what the engine tells of a job.

    Raises:
        EngineSilent: it does not answer.
    """
    return engine.query([job.id])[job.id]


def query_folders(folders: Sequence[Path]) -> dict[Path, JobFacts]:
    """Return what engines tell of the jobs of folders; each engine is queried once.

    A folder without jobs is left out. That an engine does not answer is a fact, too. Of a job and
    its workers, the first that waits or runs counts.
    """
    # the jobs, by engine
    jobs: dict[Path, list[Job]] = {}
    for folder in folders:
        found = [job for job in map(read_job, (folder / WORKERS, folder / JOB)) if job]
        if found:
            jobs[folder] = found
    by_engine: dict[str, list[Job]] = {}
    for job in chain.from_iterable(jobs.values()):
        by_engine.setdefault(job.engine, []).append(job)

    # what the engines tell, and of that what counts
    known: dict[Job, JobFacts] = {}
    for name, of_engine in by_engine.items():
        known |= query_jobs(find_engine(name), of_engine)
    return {folder: combine_jobs([known[job] for job in found]) for folder, found in jobs.items()}


def query_jobs(engine: JobEngine, jobs: Sequence[Job]) -> dict[Job, JobFacts]:
    """Return what an engine tells of its jobs, which may not have ids yet."""
    try:
        ids = {job: job.id or engine.find(job.name) or "" for job in jobs}
        known = [one for one in ids.values() if one]
        facts = engine.query(known) if known else {}
    except EngineSilent as silent:
        return dict.fromkeys(jobs, JobFacts(Engine.SILENT, str(silent)))
    lost = JobFacts(Engine.ENDED, "its submission was interrupted")
    return {job: facts[ids[job]] if ids[job] else lost for job in jobs}


def combine_jobs(facts: Sequence[JobFacts]) -> JobFacts:
    """Return what counts of several jobs for one stage, the job that finishes it last."""
    for state in (Engine.SILENT, Engine.RUNNING, Engine.QUEUED):
        for one in facts:
            if one.state is state:
                return one
    return facts[-1]
