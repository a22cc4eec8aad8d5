"""`rectify stage`: what a job that `rectify launch` submitted runs.

It starts the stage's command on the nodes of the job, and decides by exit code, intent and progress
whether the job is to be queued again.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from data.attempts import RESULTS, Attempt, count_committed, read_attempts
from data.intent import Want, read_intent
from data.signals import forward_signals, raise_if_stopped
from deploy.cli import fail
from deploy.launch import slurm
from deploy.launch.engine import EngineSilent
from deploy.launch.jobs import JOB, read_job
from deploy.launch.resources import Resources, parse_resources, read_secrets
from deploy.launcher import SHARED_VERBS
from deploy.pipeline import Pipeline, Stage, merge
from deploy.run import STOP, find_result, leaving_results, run_command, run_stage
from deploy.stage_records import (
    check_stage,
    find_records,
    read_graph,
    read_launched,
    stage_folder,
)
from deploy.state import MOST_IDLE_ATTEMPTS, Next, choose_next

GAVE_UP_EXIT_CODE = 1
LEASE_SECONDS = "60"  # without a sign of life, after which a worker's claim expires
QUERIES = 30  # that a controller which does not answer is asked for the job to be requeued
QUERY_SECONDS = 10


class StageJob(NamedTuple):
    """The job that this process is, and its stage."""

    pipeline: Pipeline
    stage: Stage
    resources: Resources
    id: str  # of Slurm

    @property
    def folder(self) -> Path:
        """The folder of the stage's records."""
        return stage_folder(self.pipeline.out, self.stage.name)


def run_in_job(out: Path, name: str, worker: bool = False) -> None:
    """Run a stage of a launched pipeline inside its job; the job's script calls this.

    Args:
        out: folder of the pipeline.
        name: of the stage.
        worker: only share the work, as one of several jobs; another job finishes the stage.
    """
    # What is to be run, and whether it is still wanted.
    pipeline = read_graph(out)
    found = read_launched(out, name)
    others = [one for one in pipeline.stages if one.name != name]
    pipeline = pipeline._replace(stages=[*others, found])
    resources = parse_resources(found)
    if resources.array > 1 and "--lease" not in found.words:
        found = found._replace(words=[*found.words, "--lease", LEASE_SECONDS])
    job = StageJob(pipeline, found, resources, slurm_job())
    if find_want(job) is not Want.RUN:
        raise SystemExit(fail(f"stage {name}: is not wanted any more (intent.json)", 1))
    os.environ.update(read_secrets(job.resources))
    os.environ.setdefault("OMP_NUM_THREADS", str(job.resources.cpus))
    forward_signals(STOP)
    if worker:
        work_as_one_of_several(job)
    else:
        work_alone(job)


def find_want(job: StageJob) -> Want:
    """Return what is wanted of a stage: what is written beside its records, or in its folder."""
    folders = [job.folder, job.stage.out] if job.stage.out else [job.folder]
    for want in (read_intent(folder).want for folder in folders):
        if want is not Want.RUN:
            return want
    return Want.RUN


def work_alone(job: StageJob) -> None:
    """Run the stage and finish it; queue the job again where that helps.

    Raises:
        SystemExit: the stage did not end well.
    """
    status = check_stage(job.pipeline, job.stage, find_records(job.pipeline.out))
    if status.finished:
        print(f"stage {job.stage.name} is finished", file=sys.stderr)
        return
    record = read_job(job.folder / JOB)
    first = record.first_attempt if record else 1
    if count_idle(job, first) >= MOST_IDLE_ATTEMPTS:  # attempts that were killed with their node
        raise SystemExit(give_up(job))
    allocated = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    nodes = usable_nodes(job, allocated) if job.stage.verb in SHARED_VERBS else 0
    launcher = slurm.launcher_words(job.resources, nodes)
    world = max(1, nodes * job.resources.processes)
    result = run_stage(job.pipeline, status, launcher=launcher, world=world)
    want = find_want(job)
    following = choose_next(result.code, want, count_idle(job, first))
    if following is Next.AGAIN and go_again(job):
        raise SystemExit(result.code)
    if following is Next.FAIL and want is Want.RUN and result.code not in (1, 2, 3):
        raise SystemExit(give_up(job))
    raise_if_stopped()
    if result.code:
        raise SystemExit(result.code)


def usable_nodes(job: StageJob, allocated: int) -> int:
    """Return the number of nodes that a stage uses: training splits its batch evenly.

    Args:
        job: the job.
        allocated: nodes of the job.
    """
    batch = find_setting(job.stage, "data.batch")
    parts = find_setting(job.stage, "trainer.accumulate_grad_batches") or 1
    if job.stage.verb != "fit" or not batch:
        return allocated
    for nodes in range(allocated, 0, -1):
        if batch % (nodes * job.resources.processes * parts) == 0:
            if nodes < allocated:
                text = f"data.batch {batch} is split evenly over {nodes} of {allocated} nodes"
                print(f"rectify: stage {job.stage.name}: {text}", file=sys.stderr, flush=True)
            return nodes
    return allocated  # the command refuses, and names the numbers


def find_setting(stage: Stage, key: str) -> int | None:
    """Return a number of a stage's configuration; None if it is not there.

    Args:
        stage: the stage.
        key: with dots, e.g. data.batch.
    """
    options = stage.inputs["options"]
    nested: dict[str, Any] = {}
    for name, word in options.items():
        if key.startswith(name) and isinstance(word, str):
            with suppress(ValueError):  # a text
                nested = merge(nested, nest(name, json.loads(word)))
    files = [stage.inputs["files"].get(path) for path in reversed(options.get("config", []))]
    for value in (nested, *files):
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int):
            return value
    return None


def nest(key: str, value: Any) -> dict[str, Any]:
    """Return a value under a key with dots as nested mappings."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return dict(value)


def work_as_one_of_several(job: StageJob) -> None:
    """Share the work of a stage with other jobs, until nothing is left.

    Raises:
        SystemExit: the command did not end well.
    """
    launcher = slurm.launcher_words(job.resources, nodes=1)
    words = [*launcher, sys.executable, "-P", "-m", "deploy", *job.stage.words]
    assert job.stage.out
    before = count_committed(job.stage.out)
    with leaving_results(job.folder / f"worker-{job.id}") as results:
        environment = {**os.environ, RESULTS: str(results)}
        code = run_command(words, lambda _: None, env=environment)
        code = find_result(code, results, launcher).code
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    idle = 1 if count_committed(job.stage.out) > before else restarts + 1
    if choose_next(code, find_want(job), idle) is Next.AGAIN:
        go_again(job)
    raise_if_stopped()
    if code:
        raise SystemExit(code)


def count_idle(job: StageJob, first: int) -> int:
    """Return the number of attempts in a row, up to the last, that committed nothing.

    Args:
        job: the job.
        first: number of the first attempt that counts.
    """
    attempts = [one for one in read_attempts(job.folder) if one.number >= first]
    committed = count_committed(job.stage.out) if job.stage.out else 0
    idle = 0
    for attempt in reversed(attempts):
        if end_of(attempt, committed) > attempt.committed:
            break
        committed = attempt.committed
        idle += 1
    return idle


def end_of(attempt: Attempt, later: int) -> int:
    """Return the steps or shards at the end of an attempt: those that the next one found."""
    return attempt.end.committed if attempt.end else later


def go_again(job: StageJob) -> bool:
    """Queue this job again; return whether that worked.

    A job that was cancelled, or that Slurm ends or queues itself, is left alone.
    """
    for _ in range(QUERIES):
        try:
            if not slurm.is_running_normally(job.id):
                return False
            slurm.requeue(job.id)
            break
        except EngineSilent as silent:
            print(f"rectify: {silent}; asking again", file=sys.stderr, flush=True)
            time.sleep(QUERY_SECONDS)
    else:
        return False
    print(f"rectify: job {job.id} is queued again", file=sys.stderr, flush=True)
    return True


def give_up(job: StageJob) -> int:
    """Print that attempts made no progress, and return the exit code."""
    attempts = read_attempts(job.folder)
    end = attempts[-1].end if attempts else None
    last = f"; the last one ended with exit code {end.code}: {end.line}" if end else ""
    return fail(
        f"stage {job.stage.name}: {MOST_IDLE_ATTEMPTS} attempts in a row made no progress{last}",
        end.code if end else GAVE_UP_EXIT_CODE,
    )


def slurm_job() -> str:
    """Return the id of the job that this process belongs to.

    Raises:
        ValueError: it belongs to none.
    """
    variables = os.environ
    if "SLURM_JOB_ID" not in variables:
        raise ValueError("stage: runs inside a job that `rectify launch` has submitted")
    if "SLURM_ARRAY_JOB_ID" in variables:
        return f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    return variables["SLURM_JOB_ID"]
