"""`rectify run`: run the stages of a pipeline that are not finished.

deploy/pipeline.py describes a pipeline's file. A stage is finished if it was run with the inputs
that it has now, and its files are as it left them (deploy/stage_records.py).
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from filelock import AcquireReturnProxy, FileLock, Timeout

from data.attempts import RESULTS, Recorder, read_attempts
from data.files import atomic_file, read_json
from data.intent import Want, read_intent, want_run
from data.lease import Lease
from data.progress import format_duration
from data.signals import (
    STOP_SIGNALS,
    STOPPED_EXIT_CODE,
    block_signals,
    end_with_parent,
    find_children,
    forward_signals,
    raise_if_stopped,
    send_signal,
    stop_requested,
)
from deploy.cli import fail
from deploy.facts import check_stages_free
from deploy.launcher import LOST_RANK_EXIT_CODE, order_of_causes
from deploy.pipeline import Pipeline, load, select, sort_stages
from deploy.stage_records import (
    StageStatus,
    begin_stage,
    check_stage,
    find_records,
    is_separate,
    remove_leftover_records,
    stage_folder,
    write_graph,
    write_record,
)
from deploy.state import REFUSED_EXIT_CODES
from deploy.targets import PIPELINE_RECORD

LOCK = ".lock"  # held while `rectify run` or `launch` works in a pipeline's folder
STOP = signal.SIGUSR1  # all commands save and end; SIGTERM would make srun kill them
FAILED_LOG_LINES = 5  # of a failed stage's log that are printed


class StageResult(NamedTuple):
    """How a stage's command ended."""

    code: int  # exit code
    line: str  # the error that it printed


def run(
    config: Path,
    out: Path | None = None,
    smoke: bool = False,
    jobs: int = 1,
    from_: str | None = None,
    to: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> None:
    """Run the stages of a pipeline that are not finished, each after those that it needs.

    If it is interrupted or killed, the same command continues where it stopped. A stage whose
    options or files differ from those that it was run with is shown, and run again with --force.

    Args:
        config: YAML file with `out`, the folder of the results, `stages`, each with a name and
            one verb with its options, and perhaps `needs`, and `targets`, which the summary must
            reach.
        out: folder of the results, instead of the YAML's.
        smoke: run every stage in little time, to test the pipeline: with its `smoke` options, and
            only the first value of every loop.
        jobs: how many stages run at once, if none needs another one. They share the processor's
            cores, and each writes its output to OUT/stages/STAGE/logs.
        from_: run only this stage and those that need it; what it needs must be finished.
        to: run only this stage and those that it needs.
        force: run stages that have changed again, and those that need them. What they have made
            before is kept in OUT/stages/STAGE/earlier.
        dry_run: print what is finished, what would run, and how long it took the last time.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be at least 1")
    pipeline = load(config, smoke, out)
    source = config.read_bytes()
    if dry_run:
        for line in describe_plan(pipeline, make_plan(pipeline, from_, to)):
            print(line)
        return
    with lock_folder(pipeline.out):
        remove_leftover_records(pipeline.out)
        plan = make_plan(pipeline, from_, to)
        check_plan(pipeline, plan, force)
        check_stages_free(pipeline, plan, adopt=False)
        with atomic_file(pipeline.out / PIPELINE_RECORD) as file:
            file.write(source)
        write_graph(pipeline.out, pipeline)
        for status in plan:
            want_stage(pipeline, status)
        forward_signals()
        run_stages(pipeline, plan, jobs)
    print_summary(pipeline.out)


def want_stage(pipeline: Pipeline, status: StageStatus) -> None:
    """Take back that a stage is not wanted, if it is not finished."""
    if status.finished:
        return
    want_run(stage_folder(pipeline.out, status.stage.name))
    if status.stage.out and status.stage.out.is_dir():
        want_run(status.stage.out)


def check_wanted(pipeline: Pipeline, name: str) -> None:
    """Check that a stage, which is about to begin, is still wanted.

    Raises:
        SystemExit: it is not.
    """
    intent = read_intent(stage_folder(pipeline.out, name))
    if intent.want is not Want.RUN:
        text = f"stage {name}: is not wanted ({intent.want} by {intent.by} at {intent.at})"
        raise SystemExit(fail(text, STOPPED_EXIT_CODE))


def print_summary(out: Path) -> None:
    """Print the table of a pipeline that has a report."""
    from deploy.report.summary import format_summary

    if (out / "summary.json").exists():
        print(format_summary(read_json(out / "summary.json")))


def lock_folder(out: Path) -> AcquireReturnProxy:
    """Lock a folder; if another process runs a pipeline in it, wait until that process ends.

    Returns:
        a context manager that unlocks it. The system unlocks it, too, when this process is killed.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        message = f"rectify: waiting for another `rectify run` in {out} to end"
        print(message, file=sys.stderr, flush=True)
        return lock.acquire()


def make_plan(pipeline: Pipeline, first: str | None, last: str | None) -> list[StageStatus]:
    """Return which of the chosen stages are finished, in the order in which they can run.

    Args:
        pipeline: the pipeline.
        first: see `pipeline.select`.
        last: see `pipeline.select`.

    Raises:
        ValueError: a stage that is not chosen is needed, and is not finished.
    """
    chosen = select(pipeline, first, last)
    records = find_records(pipeline.out)
    plan = [check_stage(pipeline, stage, records) for stage in chosen]

    # what they need
    names = {stage.name for stage in chosen}
    for stage in sort_stages(pipeline.stages):
        if stage.name in names or not any(stage.name in one.needs for one in chosen):
            continue
        status = check_stage(pipeline, stage, records)
        if not status.finished:
            why = status.difference or status.reason or "it was not run"
            raise ValueError(
                f"--from {first}: stage {stage.name}, which is needed, is not finished ({why}); "
                "run it first"
            )
    return plan


def check_plan(pipeline: Pipeline, plan: Sequence[StageStatus], force: bool) -> None:
    """Check that changed stages may be run again.

    Raises:
        ValueError: one has changed, without --force; the message shows the difference.
    """
    changed = [status for status in plan if status.difference]
    for status in changed:
        out = status.stage.out
        if force and out and out.exists() and not is_separate(pipeline, status.stage):
            raise ValueError(
                f"{pipeline.out}: stage {status.stage.name} has changed ({status.difference}), and "
                f"{out} has the results of other stages, too; rename or delete it yourself"
            )
    if not changed or force:
        return
    first = changed[0]
    names = ", ".join(status.stage.name for status in changed)
    raise ValueError(
        f"{pipeline.out}: stage {first.stage.name} has changed since {first.reason}: "
        f"{first.difference}; give --force to run {names} again (what they made before is kept), "
        "or choose another --out"
    )


def describe_plan(pipeline: Pipeline, plan: Sequence[StageStatus]) -> list[str]:
    """Return a line for each stage: what is done with it, and how long it took the last time."""
    lines = []
    for status in plan:
        text = "runs"
        if status.finished:
            text = "finished"
        elif status.difference:
            text = f"has changed since {status.reason} ({status.difference}); runs with --force"
        elif status.reason:
            text = f"runs again: {status.reason}"
        if status.seconds is not None:
            text += f"; it took {format_duration(status.seconds)}"
        lines.append(f"{title(pipeline, status)}: {text}")
    return lines


def title(pipeline: Pipeline, status: StageStatus) -> str:
    """Return a stage's number and name, e.g. [3/9] teacher."""
    return f"[{status.stage.number}/{len(pipeline.stages)}] {status.stage.name}"


def run_stages(pipeline: Pipeline, plan: Sequence[StageStatus], jobs: int) -> None:
    """Run the unfinished stages, up to `jobs` at once, each after those that it needs.

    A signal is forwarded to them; they save what they can and end, and no other stage begins.

    Args:
        pipeline: the pipeline.
        plan: the chosen stages, in an order in which they can run.
        jobs: how many stages run at once.

    Raises:
        SystemExit: a stage failed; the exit code is the stage's.
        Stopped: a signal asked to stop.
    """
    left = []
    for status in plan:
        if status.finished:
            print(f"{title(pipeline, status)}: finished", file=sys.stderr, flush=True)
        else:
            left.append(status)

    # one at a time, in this thread
    if jobs == 1 or len(left) < 2:
        for status in left:
            exit_on_failure(run_stage(pipeline, status).code)
        return

    # several at once
    running: dict[Future[StageResult], str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while left or running:
                waiting = {status.stage.name for status in left} | set(running.values())
                for status in list(left):
                    if len(running) < jobs and waiting.isdisjoint(status.stage.needs):
                        left.remove(status)
                        future = pool.submit(run_stage, pipeline, status, jobs)
                        running[future] = status.stage.name
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    running.pop(future)
                    exit_on_failure(future.result().code)
        except KeyboardInterrupt:
            send_signal(find_children(), signal.SIGTERM)
            raise


def exit_on_failure(code: int) -> None:
    """Exit with an exit code that is not 0."""
    if code == STOPPED_EXIT_CODE:
        raise_if_stopped()
    if code:
        raise SystemExit(code)


def run_command(
    words: Sequence[str], started: Callable[[subprocess.Popen], None], **options: Any
) -> int:
    """Run a command, and return its exit code; it is killed when this process is.

    Args:
        words: the command.
        started: is called with the process.
        options: of `subprocess.Popen`.
    """
    prepare = partial(end_with_parent, os.getpid())
    with block_signals():  # until the command handles them
        process = subprocess.Popen(words, preexec_fn=prepare, **options)
    started(process)
    if stop_requested():  # while it was being started: it was not yet among the children
        process.send_signal(STOP)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(STOP)
        process.wait()
        raise


def run_stage(
    pipeline: Pipeline,
    status: StageStatus,
    jobs: int = 1,
    launcher: Sequence[str] = (),
    world: int = 1,
) -> StageResult:
    """Run a stage, record how it ends, and return that.

    Args:
        pipeline: the pipeline.
        status: of the stage.
        jobs: how many stages run at once. With more than one, the stage writes to a log file and
            uses its share of the cores.
        launcher: words before the command, which start it on several processes.
        world: number of processes.
    """
    raise_if_stopped()
    stage = status.stage
    check_wanted(pipeline, stage.name)
    name = title(pipeline, status)
    print(f"{name}: rectify {' '.join(stage.words)}", file=sys.stderr, flush=True)

    # Prepare its folder, and begin an attempt.
    folder = stage_folder(pipeline.out, stage.name)
    lease = Lease(folder, world)
    try:
        first = begin_stage(pipeline, status)
    except BaseException:
        lease.release()
        raise
    children: list[subprocess.Popen] = []

    def stop() -> None:
        for child in children:
            child.send_signal(STOP)

    recorder = Recorder(folder, world, stage.out, stop, keep_refused=True)
    log_path = folder / "logs" / f"{recorder.attempt.number:04d}.txt"

    # Run the command, and record how it ended.
    result = StageResult(STOPPED_EXIT_CODE, "")
    try:
        words = [*launcher, sys.executable, "-P", "-m", "deploy", *stage.words]
        with leaving_results(folder / "results") as results:
            options: dict[str, Any] = {"env": {**os.environ, RESULTS: str(results)}}
            code = run_logged(words, children.append, jobs, log_path, options)
            result = find_result(code, results, launcher)
    finally:
        recorder.end(*result)
        lease.release()
    if result.code == 0:
        seconds = measure_seconds(folder, first)
        write_record(pipeline, stage, seconds)
        print(f"{name}: done, {seconds:.0f} s", file=sys.stderr, flush=True)
    elif jobs > 1 and result.code != STOPPED_EXIT_CODE:
        lines = log_path.read_text(errors="replace").splitlines(True)
        end = "".join(lines[-FAILED_LOG_LINES:])
        print(f"{name}: failed; the end of {log_path}:\n{end}", end="", file=sys.stderr)
    return result


@contextmanager
def leaving_results(folder: Path) -> Iterator[Path]:
    """Make a folder in which each process of a command leaves its result, for the block."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_logged(
    words: Sequence[str],
    started: Callable[[subprocess.Popen], None],
    jobs: int,
    log_path: Path,
    options: dict[str, Any],
) -> int:
    """Run a command, and return its exit code.

    Args:
        words: the command.
        started: is called with the process.
        jobs: how many commands run at once: with more than one, it writes to a file and uses its
            share of the cores.
        log_path: the file.
        options: of `subprocess.Popen`.
    """
    if jobs == 1:
        return run_command(words, started, **options)
    options["env"].setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    log_path.parent.mkdir(exist_ok=True)
    with log_path.open("w") as log:
        return run_command(words, started, stdout=log, stderr=subprocess.STDOUT, **options)


def find_result(code: int, results: Path, launcher: Sequence[str] = ()) -> StageResult:
    """Return how a command ended: the exit code of the process at fault, and its line.

    Args:
        code: exit code of what was started, which may be a launcher; negative for a signal.
        results: folder in which each process has left its result.
        launcher: words of the launcher. Where no process has left a result, the code is its code,
            and means something else.
    """
    if code == 0:
        return StageResult(0, "")
    if code < 0:
        # A stage that ended before it could handle the signal lost nothing.
        is_stopped = stop_requested() and -code in STOP_SIGNALS
        code = STOPPED_EXIT_CODE if is_stopped else 128 - code
    found = [StageResult(code, "")]
    for path in sorted(results.glob("*.json")):
        content = read_json(path)
        if content["code"]:
            found.insert(0, StageResult(content["code"], content["line"]))
    if launcher and len(found) == 1 and code in REFUSED_EXIT_CODES:
        text = f"{launcher[0]} ended with exit code {code} before the command did"
        return StageResult(LOST_RANK_EXIT_CODE, text)
    return min(found, key=lambda result: order_of_causes(result.code))


def measure_seconds(folder: Path, first: int) -> float:
    """Return the seconds that a stage's attempts took, from one number on."""
    seconds = 0.0
    for attempt in read_attempts(folder):
        if attempt.number >= first and attempt.end:
            seconds += attempt.end.at - attempt.begin
    return seconds
