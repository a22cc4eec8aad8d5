"""What folder, engine and user tell of a stage or a run, and the state that follows."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data.attempts import REFUSED_EXIT_CODE, Attempt, Heartbeat, read_attempts, read_heartbeat
from data.files import process_space, process_start, read_clock, read_json
from data.intent import Intent, Want, read_intent
from data.schema import find_difference, shorten
from deploy.launch.engine import JobFacts
from deploy.launch.jobs import JOB, query_folders, read_job
from deploy.pipeline import Pipeline, Stage
from deploy.stage_records import (
    StageStatus,
    describe_difference,
    find_records,
    first_attempt,
    read_launched,
    stage_folder,
)
from deploy.state import Engine, State, Work, find_state

EXPIRY_SECONDS = 90.0  # without a heartbeat, after which a command gives no sign of life
STUCK_SECONDS = 900.0  # without progress, after which a living command is stalled
FINISHED_FILES = ("manifest.json", "finished.json")  # of a set; of a run that ended early


class Facts(NamedTuple):
    """What is known of a stage or a run."""

    name: str
    state: State
    attempt: Attempt | None  # the last one
    heartbeat: Heartbeat | None
    age: float  # seconds since the last sign of life
    intent: Intent
    job: JobFacts  # what the engine tells
    has_job: bool = False  # one was submitted
    seconds: float | None = None  # that a finished stage took
    needs: Sequence[str] = ()


def read_run(folder: Path) -> Facts:
    """Return what is known of a run's or a set's folder.

    Raises:
        ValueError: no command has recorded anything in it.
    """
    attempts = read_attempts(folder)
    finished = any((folder / name).exists() for name in FINISHED_FILES)
    if not attempts and not finished:
        raise ValueError(
            f"{folder}: no attempts/ or graph.json in it, so this is no folder of a run, a set or "
            "a pipeline; give one"
        )
    last = last_attempt(attempts)
    if last and last.end and last.end.code == 0:
        finished = True
    return combine(str(folder), [folder], attempts, finished, None)


def read_facts(out: Path, stages: Sequence[Stage]) -> list[Facts]:
    """Return what is known of stages; their engines are queried once.

    Args:
        out: the pipeline's folder.
        stages: the stages.
    """
    records = find_records(out)
    jobs = query_folders([stage_folder(out, stage.name) for stage in stages])
    return [read_stage(out, stage, records.get(stage.name), jobs) for stage in stages]


def read_stage(
    out: Path, stage: Stage, record: Path | None, jobs: Mapping[Path, JobFacts]
) -> Facts:
    """Return what is known of a stage.

    Args:
        out: the pipeline's folder.
        stage: the stage.
        record: of the finished stage; None if there is none.
        jobs: what engines tell of the jobs of stages, by their folders.
    """
    folder = stage_folder(out, stage.name)
    content = read_json(record) if record else {}
    finished = content.get("fingerprint") == stage.fingerprint
    folders = [folder]
    if stage.out and not stage.out.is_file():
        folders.append(stage.out)
    attempts = read_attempts(folder)
    first = first_attempt(out, stage)
    if first is None:  # of other inputs, but for the last one if it was refused
        attempts = [one for one in attempts[-1:] if one.end and one.end.code == REFUSED_EXIT_CODE]
    else:
        attempts = [one for one in attempts if one.number >= first]
    facts = combine(stage.name, folders, attempts, finished, jobs.get(folder))
    return facts._replace(seconds=content.get("seconds"), needs=stage.needs)


def check_stages_free(pipeline: Pipeline, plan: Sequence[StageStatus], adopt: bool) -> set[str]:
    """Check that nothing works, or is about to work, on the unfinished stages of a plan.

    Args:
        pipeline: the pipeline.
        plan: its chosen stages.
        adopt: jobs that wait or run are right, if nothing has changed.

    Returns:
        The names of the stages whose jobs wait or run.

    Raises:
        ValueError: something does, or the engine does not answer; the message names it.
    """
    living: set[str] = set()
    begun = []
    for status in plan:
        if not status.finished and stage_folder(pipeline.out, status.stage.name).exists():
            begun.append(status)
    found = read_facts(pipeline.out, [status.stage for status in begun])
    for status, facts in zip(begun, found):
        where = f"{pipeline.out}: stage {facts.name}"
        if facts.state is State.UNKNOWN:
            raise ValueError(f"{where}: is unknown: {facts.job.reason}; nothing is started")
        has_job = facts.job.state in (Engine.QUEUED, Engine.RUNNING) and facts.has_job
        is_alive = has_job or facts.state in (State.RUNNING, State.STALLED, State.STOPPING)
        if not is_alive:
            continue
        is_ending = facts.job.is_ending or facts.state is State.STOPPING
        changed = describe_relaunch(pipeline.out, status.stage) if adopt and has_job else ""
        if adopt and has_job and not changed and not is_ending:
            living.add(facts.name)
            continue
        details = [changed, facts.job.reason, f"on {facts.job.hosts}" if facts.job.hosts else ""]
        text = ", ".join(detail for detail in details if detail)
        advice = "wait for its end"
        if not is_ending:
            advice += f", or stop it: rectify cancel {pipeline.out} --stage {facts.name}"
        raise ValueError(f"{where}: is {facts.state} ({text}); {advice}")
    return living


def describe_relaunch(out: Path, stage: Stage) -> str:
    """Return how a stage differs from the one that its job was launched with; "" if not at all."""
    launched = read_launched(out, stage.name)
    difference = describe_difference(stage, launched._asdict())
    if not difference and launched.resources != stage.resources:
        found = find_difference("resources", launched.resources, stage.resources)
        difference = f"{found.key} is {shorten(found.now)}, and was {shorten(found.before)}"
    return difference


def combine(
    name: str,
    folders: Sequence[Path],
    attempts: Sequence[Attempt],
    finished: bool,
    submitted: JobFacts | None,
) -> Facts:
    """Return what is known of the work in some folders.

    Args:
        name: of the work.
        folders: of its records, the first one with those of its jobs.
        attempts: the attempts that count.
        finished: whether all is done.
        submitted: what an engine tells of the work's job; None without one.
    """
    # the last attempt, and the last sign of life
    last = last_attempt(attempts)
    heartbeat, age = find_heartbeat(folders, last)
    intent = find_intent(folders)

    # the work and its engine
    work = find_work(last, heartbeat, age, finished)
    job = JobFacts(Engine.NONE)
    if not finished:
        job = submitted or query_processes(attempts)
        if submitted and submitted.state in (Engine.ENDED, Engine.CANCELLED, Engine.NONE):
            job = query_processes(attempts) if is_later(folders[0], last) else job
    code = last.end.code if last and last.end else 0
    state = find_state(work, job.state, intent.want, code)
    return Facts(name, state, last, heartbeat, age, intent, job, submitted is not None)


def is_later(folder: Path, last: Attempt | None) -> bool:
    """Whether the last attempt is not of a folder's job, but of a `rectify run` after it."""
    job = read_job(folder / JOB)
    if last is None or job is None:
        return False
    identifier = re.split(r"[._]", last.job)[0]  # without requeues, and an array's task
    return identifier != job.id and last.number >= job.first_attempt


def last_attempt(attempts: Sequence[Attempt]) -> Attempt | None:
    """Return the attempt that runs here, or else the one that began or ended last.

    An open one that does not run here was killed, or is on another machine.
    """

    def moment(one: Attempt) -> float:
        if one.end:
            return one.end.at
        return float("inf") if is_running(one) else one.begin

    return max(attempts, key=moment, default=None)


def is_running(attempt: Attempt) -> bool:
    """Whether the process of an open attempt runs on this machine."""
    is_near = not attempt.end and attempt.space == process_space()
    return is_near and process_start(attempt.process) == attempt.started


def find_heartbeat(folders: Sequence[Path], last: Attempt | None) -> tuple[Heartbeat | None, float]:
    """Return the heartbeat that tells most of the last attempt, and the age of the newest sign.

    Args:
        folders: where heartbeats are; the last one knows the progress.
        last: the last attempt.
    """
    found = None
    age = float("inf")
    for folder in folders:
        heartbeat = read_heartbeat(folder)
        if heartbeat is None or (last and heartbeat.time < last.begin):
            continue
        age = min(age, measure_age(folder))
        if found is None or heartbeat.total:
            found = heartbeat
    if last and age == float("inf"):
        age = max(0.0, time.time() - last.begin)
    return found, age


def measure_age(folder: Path) -> float:
    """Return the seconds since a folder's last heartbeat, by the clock of the file server."""
    try:
        now = read_clock(folder)
    except OSError:  # a folder that cannot be written
        now = time.time()
    return max(0.0, now - (folder / "heartbeat.json").stat().st_mtime)


def find_intent(folders: Sequence[Path]) -> Intent:
    """Return the first intent that is not to run, or else the first."""
    intents = [read_intent(folder) for folder in folders]
    for intent in intents:
        if intent.want is not Want.RUN:
            return intent
    return intents[0]


def find_work(
    last: Attempt | None, heartbeat: Heartbeat | None, age: float, finished: bool
) -> Work:
    """Return what a folder tells of the work in it.

    Args:
        last: the last attempt.
        heartbeat: the last heartbeat.
        age: seconds since the last sign of life.
        finished: whether all is done.
    """
    if finished:
        return Work.FINISHED
    if last is None:
        return Work.NEW
    is_fresh = age <= EXPIRY_SECONDS
    if last.end:  # a later sign of life is of another worker
        is_followed = is_fresh and heartbeat is not None and heartbeat.time > last.end.at
        return Work.ACTIVE if is_followed else Work.ENDED
    if not is_fresh:
        return Work.SILENT
    knows_progress = heartbeat is not None and heartbeat.total > 0
    if heartbeat and knows_progress and heartbeat.quiet + age > STUCK_SECONDS:
        return Work.STUCK
    return Work.ACTIVE


def query_processes(attempts: Sequence[Attempt]) -> JobFacts:
    """Return whether the processes of open attempts run, as far as this machine can tell."""
    facts = JobFacts(Engine.NONE)
    for attempt in attempts:
        if attempt.end:
            continue
        hosts = ",".join(attempt.hosts)
        if is_running(attempt):
            return JobFacts(Engine.RUNNING, f"pid {attempt.process}", hosts)
        is_near = attempt.space == process_space()
        facts = JobFacts(Engine.ENDED if is_near else Engine.NONE, hosts=hosts)
    return facts


def signal_processes(attempts: Sequence[Attempt], number: int) -> list[Attempt]:
    """Send a signal to the processes of open attempts on this machine; return these attempts."""
    reached = []
    for attempt in attempts:
        if is_running(attempt):
            os.kill(attempt.process, number)
            reached.append(attempt)
    return reached
