"""`rectify cancel`: write that work is not wanted any more, and then tell its processes."""

import signal
from pathlib import Path

from data.attempts import read_attempts
from data.intent import Want, write_intent
from deploy.facts import signal_processes
from deploy.hints import nearest
from deploy.launch.engine import find_engine
from deploy.launch.jobs import JOB, WORKERS, read_job
from deploy.pipeline import Stage
from deploy.stage_records import GRAPH, find_records, read_graph, stage_folder
from deploy.status import read_all

NOTICING_SECONDS = 15  # until a command finds out that it is not wanted


def cancel(folder: Path, stage: str | None = None, stop: bool = False) -> None:
    """End the work in a folder: of a run, a set, or the stages of a pipeline.

    It is written into the folder first, so that nothing is started again; running commands save
    and end. They are told by their engine, or by a signal on this host. Elsewhere they find out
    within 15 s. The command that started them, given again, goes on.

    Args:
        folder: of a run, a set or a pipeline.
        stage: only this stage of a pipeline.
        stop: only for now: the state is `stopped`, not `cancelled`, and running jobs of Slurm get
            all the time that they need to save.
    """
    read_all(folder)  # its errors name what is no folder of ours
    want = Want.STOP if stop else Want.CANCEL
    if not (folder / GRAPH).exists():
        if stage is not None:
            raise ValueError(f"--stage {stage}: {folder} is no folder of a pipeline; leave it out")
        write_intent(folder, want)
        print(f"{folder}: {describe_reached(folder)}")
        return

    # the unfinished stages of a pipeline
    pipeline = read_graph(folder)
    names = [one.name for one in pipeline.stages]
    if stage is not None and stage not in names:
        hint = nearest(stage, names) or f"; the stages are {', '.join(names)}"
        raise ValueError(f"--stage {stage}: no such stage{hint}")
    records = find_records(folder)
    chosen = []
    for one in pipeline.stages:
        if one.name == stage or (stage is None and one.name not in records):
            chosen.append(one)

    # first what is wanted, then the engines
    for one in chosen:
        write_intent(stage_folder(folder, one.name), want)
        if one.out and one.out.is_dir():
            write_intent(one.out, want)
    silent = ""
    for one in chosen:
        try:
            text = end_stage(folder, one, stop, is_alone=stage is not None)
        except ValueError as error:  # the engine does not answer, or refuses
            silent = str(error)
            text = silent
        if text:
            print(f"{one.name}: {text}")
    if stage is None:
        end_jobs(folder, stop)
    if silent:
        raise ValueError(
            f"{folder}: {silent}; what is wanted is written (intent.json), and running commands "
            "find out; run the same command again for those that wait"
        )


def end_stage(out: Path, stage: Stage, stop: bool, is_alone: bool) -> str:
    """End the jobs and processes of a stage, and return what was reached.

    Args:
        out: the pipeline's folder.
        stage: the stage.
        stop: let them save as long as they need.
        is_alone: a `rectify run` goes on with other stages: it finds out by itself.
    """
    folder = stage_folder(out, stage.name)
    jobs = end_jobs(folder, stop)
    if jobs:
        return f"job {', '.join(jobs)}"
    return describe_reached(folder, is_alone)


def end_jobs(folder: Path, stop: bool) -> list[str]:
    """End the jobs of a folder, and return their ids.

    Raises:
        ValueError: the engine does not answer, or refuses.
    """
    reached = []
    for name in (JOB, WORKERS):  # the job that waits for the workers first
        job = read_job(folder / name)
        if job is None:
            continue
        engine = find_engine(job.engine)
        identifier = job.id or engine.find(job.name)
        if identifier:
            if stop:
                engine.stop(identifier)
            else:
                engine.cancel(identifier)
            reached.append(identifier)
    return reached


def describe_reached(folder: Path, without_signal: bool = False) -> str:
    """Send SIGTERM to the processes of a folder's open attempts; return what was reached."""
    attempts = [attempt for attempt in read_attempts(folder) if not attempt.end]
    reached = [] if without_signal else signal_processes(attempts, signal.SIGTERM)
    if reached:
        return f"sent SIGTERM to pid {', '.join(str(one.process) for one in reached)}"
    hosts = sorted({host for attempt in attempts for host in attempt.hosts})
    if hosts:
        return f"{', '.join(hosts)} will find out within {NOTICING_SECONDS} s"
    return "nothing runs"
