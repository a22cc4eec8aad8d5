"""`rectify launch`: submit the unfinished stages of a pipeline to an engine."""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from data.attempts import read_attempts
from data.files import atomic_file, digest
from deploy.facts import check_stages_free
from deploy.launch.engine import JobEngine, Task, find_engine
from deploy.launch.jobs import JOB, WORKERS, Job, adopt_job, query, read_job, submit_once
from deploy.launch.resources import parse_resources, read_secrets
from deploy.pipeline import Pipeline, Stage, load
from deploy.run import LOCK, check_plan, describe_plan, make_plan, want_stage
from deploy.stage_records import (
    StageStatus,
    begin_stage,
    stage_folder,
    write_graph,
    write_launched,
)
from deploy.state import Engine
from deploy.targets import PIPELINE_RECORD

LAUNCH_LOCK = ".launch.lock"


class StageTasks(NamedTuple):
    """What is submitted for a stage."""

    stage: Stage
    main: Task  # finishes the stage
    workers: Task | None  # share its work before


def launch(
    config: Path,
    on: str,
    out: Path | None = None,
    smoke: bool = False,
    stage: str | None = None,
    from_: str | None = None,
    to: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Submit the stages of a pipeline that are not finished to an engine, and print their jobs.

    The engine keeps the graph: a stage begins when those that it needs are done. The same command
    again submits only what neither waits nor runs. `rectify status`, `cancel` and `logs` take the
    folder of the results. docs/cluster.md describes resources, secrets and preemption.

    Args:
        config: YAML file of the pipeline, as for `rectify run`.
        on: the engine: slurm, or local for this host in the background.
        out: folder of the results, instead of the YAML's; all nodes must see it.
        smoke: run every stage in little time, as for `rectify run`.
        stage: submit only this stage; what it needs must be finished.
        from_: submit only this stage and those that need it; what it needs must be finished.
        to: submit only this stage and those that it needs.
        force: run stages that have changed again, as for `rectify run`.
        dry_run: print what would be submitted, with its scripts.
    """
    # What is to be submitted.
    if stage is not None and (from_ or to):
        raise ValueError("--stage is one stage; give it without --from and --to")
    engine = find_engine(on)
    pipeline = load(config, smoke, out)
    source = config.read_bytes()
    plan = make_plan(pipeline, stage or from_, stage or to)
    for status in plan:
        read_secrets(parse_resources(status.stage))
    if dry_run:
        show_plan(pipeline, plan, engine)
        return
    check_plan(pipeline, plan, force)
    engine.check()

    # Submit it. A second launch or a `rectify run` at the same time would submit the same.
    words = ["run", str(config), "--out", str(pipeline.out), "--smoke", str(smoke).lower()]
    for option, value in (("from", stage or from_), ("to", stage or to)):
        words += [f"--{option}", value] if value else []
    submission = Submission(pipeline, plan, engine, [*words, "--force", str(force).lower()])
    pipeline.out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(pipeline.out / LAUNCH_LOCK, blocking=False):
            if engine.keeps_graph:
                with FileLock(pipeline.out / LOCK, blocking=False):
                    living = check_stages_free(pipeline, plan, adopt=True)
                    lines = submission.submit_stages(source, living)
            else:
                lines = submission.submit_pipeline(source)
    except Timeout:
        raise ValueError(
            f"{pipeline.out}: another `rectify run` or `launch` works in it; wait for its end, or "
            f"stop it: rectify cancel {pipeline.out}"
        ) from None
    print("\n".join(lines))


def show_plan(pipeline: Pipeline, plan: Sequence[StageStatus], engine: JobEngine) -> None:
    """Print what would be submitted, with its scripts."""
    print("\n".join(describe_plan(pipeline, plan)))
    for status in plan:
        if engine.keeps_graph and not status.finished:
            tasks = make_tasks(pipeline, status.stage)
            for task in (tasks.workers, tasks.main):
                if task:
                    print(f"\n# {task.name}, after: {', '.join(status.stage.needs) or 'nothing'}")
                    print(engine.render(task))


def make_tasks(pipeline: Pipeline, stage: Stage) -> StageTasks:
    """Return what is submitted for a stage."""
    out = pipeline.out
    folder = stage_folder(out, stage.name)
    resources = parse_resources(stage)
    words = ["stage", "--out", str(out), "--name", stage.name]
    name = job_name(pipeline, stage.number, stage.name)
    main = Task(name, words, folder, JOB, resources)
    if resources.array == 1:
        return StageTasks(stage, main, None)
    workers = main._replace(
        name=f"{name}-workers",
        words=[*words, "--worker"],
        record=WORKERS,
        workers=resources.array,
    )
    return StageTasks(stage, main, workers)


def job_name(pipeline: Pipeline, number: int, name: str) -> str:
    """Return the name of a job: the same for the same folder, and another for another one."""
    folder = digest(str(pipeline.out.resolve()).encode())[:10]
    return f"rectify-{folder}-{number:02d}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)}"


class Submission:
    """What `rectify launch` submits.

    Args:
        pipeline: the pipeline.
        plan: its chosen stages.
        engine: where they will run.
        words: of the command that runs them all on one host.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        plan: Sequence[StageStatus],
        engine: JobEngine,
        words: Sequence[str],
    ):
        self.pipeline = pipeline
        self.plan = plan
        self.engine = engine
        self.words = list(words)

    def submit_stages(self, source: bytes, living: Collection[str]) -> list[str]:
        """Submit each unfinished stage after those that it needs; return a line for each.

        Args:
            source: content of the pipeline's file.
            living: names of stages whose jobs wait or run.

        Raises:
            ValueError: the engine refuses a stage, or does not answer; the message says so.
        """
        # Check all before the first is submitted.
        unfinished = [status for status in self.plan if not status.finished]
        tasks = [make_tasks(self.pipeline, status.stage) for status in unfinished]
        for one in tasks:
            try:
                self.engine.check_fit(one.workers or one.main)
            except ValueError as error:
                raise ValueError(f"stage {one.stage.name}: {error}") from error
        self.record_pipeline(source)

        # Submit them in order. A finished stage needs no job to be waited for.
        lines = []
        ids: dict[str, str] = {}
        for one, status in zip(tasks, unfinished):
            stage = one.stage
            is_living = stage.name in living
            if not is_living:
                begin_stage(self.pipeline, status)
                want_stage(self.pipeline, status)
                write_launched(self.pipeline.out, stage)
            after = [ids[need] for need in stage.needs if need in ids]
            job = self._submit_tasks(one, after, is_living)
            ids[stage.name] = job.id
            text = f", after {one.workers.workers} workers" if one.workers else ""
            lines.append(f"{stage.name}: {self.engine.name} job {job.id}{text}")
        return lines or [f"{self.pipeline.out}: all stages are finished"]

    def _submit_tasks(self, tasks: StageTasks, after: list[str], is_living: bool) -> Job:
        """Submit the jobs of a stage, and return the one that finishes it.

        Args:
            tasks: of the stage.
            after: ids of jobs that must be done before.
            is_living: a job of the stage waits or runs; its workers are not submitted again.
        """
        folder = tasks.main.folder
        attempts = read_attempts(folder)
        first = attempts[-1].number + 1 if attempts else 1
        if tasks.workers is None:
            return submit_once(self.engine, tasks.main, after, False, first)
        workers = read_job(folder / WORKERS) if is_living else None
        if workers is None or not workers.id:
            workers = submit_once(self.engine, tasks.workers, after, False, first)
        return submit_once(self.engine, tasks.main, [workers.id], True, first)

    def submit_pipeline(self, source: bytes) -> list[str]:
        """Submit one job that runs all stages on one host; return a line about it.

        Args:
            source: content of the pipeline's file.
        """
        out = self.pipeline.out
        if all(status.finished for status in self.plan):
            return [f"{out}: all stages are finished"]
        resources = [parse_resources(status.stage) for status in self.plan]
        names = {name for one in resources for name in one.environment}
        files = {one.secrets for one in resources if one.environment}
        if len(files) > 1:
            raise ValueError(
                f"resources: secrets: stages have {', '.join(sorted(files))}; on this host they "
                "share one process: give all of them one file"
            )
        combined = replace(
            resources[0],
            cpus=max(one.cpus for one in resources),
            environment=sorted(names),
            secrets=min(files, default=resources[0].secrets),
        )
        task = Task(job_name(self.pipeline, 0, "run"), self.words, out, JOB, combined)
        self.engine.check_fit(task)
        job = read_job(out / JOB)
        adopted = adopt_job(self.engine, out / JOB, job) if job else None
        if not adopted or query(self.engine, adopted).state is not Engine.RUNNING:
            check_stages_free(self.pipeline, self.plan, adopt=False)
        self.record_pipeline(source)
        job = submit_once(self.engine, task, [], False, 1)
        return [f"{out}: {self.engine.name} job {job.id}; rectify status {out}"]

    def record_pipeline(self, source: bytes) -> None:
        """Write what the jobs and `rectify status` read."""
        with atomic_file(self.pipeline.out / PIPELINE_RECORD) as file:
            file.write(source)
        write_graph(self.pipeline.out, self.pipeline)
