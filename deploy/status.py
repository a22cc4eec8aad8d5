"""`rectify status`: the state of a run or a pipeline, from any machine that has its folder."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.intent import Want
from data.progress import format_duration
from deploy.facts import Facts, read_facts, read_run
from deploy.stage_records import GRAPH, read_graph
from deploy.state import LIVING, State

WATCH_SECONDS = 5.0
CLEAR = "\033[H\033[J"  # a terminal
FULL_UNITS = ("steps",)  # that are shown without a share


def status(folder: Path, watch: bool = False) -> None:
    """Print the state of a run, a set or a pipeline.

    It is one of finished, running, stalled (no progress for 15 minutes), queued, stopping, stopped
    (the same command goes on), failed (with exit code and error), lost (it ended without a record;
    the same command goes on), cancelled, and unknown (the engine does not answer).

    Args:
        folder: of a run, a set or a pipeline.
        watch: print it again every 5 s until nothing runs or waits.
    """
    idle = 0  # times in a row that nothing ran: between two stages nothing does
    while True:
        facts = read_all(folder)
        if watch and sys.stdout.isatty():
            print(CLEAR, end="")
        print("\n".join(format_all(folder, facts)), flush=True)
        living = [one for one in facts if one.state in LIVING]
        runs = any(one.state is not State.QUEUED or one.has_job for one in living)
        idle = 0 if runs else idle + 1
        if not watch or not living or idle == 2:
            return
        time.sleep(WATCH_SECONDS)


def read_all(folder: Path) -> list[Facts]:
    """Return what is known of a run, or of each stage of a pipeline.

    Raises:
        OSError: there is no such folder.
        ValueError: it is no folder of ours, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / GRAPH).exists():
        return read_facts(folder, read_graph(folder).stages)
    return [read_run(folder)]


def format_all(folder: Path, facts: Sequence[Facts]) -> list[str]:
    """Return the lines about a run, or about a pipeline and its stages."""
    width = max(len(one.name) for one in facts)
    lines = [format_line(one, width, facts) for one in facts]
    if len(facts) > 1 or (folder / GRAPH).exists():
        done = sum(one.state is State.FINISHED for one in facts)
        lines.insert(0, f"{folder}: {done} of {len(facts)} stages finished")
    return lines


def format_line(facts: Facts, width: int, others: Sequence[Facts]) -> str:
    """Return a line with a state, and what explains it.

    Args:
        facts: of the stage or run.
        width: characters of the names.
        others: of all stages.
    """
    details = {
        State.FINISHED: describe_end,
        State.RUNNING: describe_progress,
        State.STALLED: describe_progress,
        State.STOPPING: describe_progress,
        State.FAILED: describe_end,
        State.STOPPED: describe_end,
        State.LOST: describe_loss,
    }
    parts = []
    if facts.state in details:
        parts.append(details[facts.state](facts))
    if facts.intent.want is not Want.RUN and facts.intent.by:
        parts.append(f"{facts.intent.want} by {facts.intent.by} at {facts.intent.at}")
    if facts.state is State.QUEUED:
        states = {one.name: one.state for one in others}
        missing = [need for need in facts.needs if states[need] is not State.FINISHED]
        parts.append(f"needs {', '.join(missing)}" if missing else "")
    if facts.state is not State.FINISHED:
        parts.append(facts.job.reason)
        parts.append(f"on {facts.job.hosts}" if facts.job.hosts else "")
    if facts.attempt and facts.attempt.number > 1:
        parts.append(f"attempt {facts.attempt.number}")
    text = "; ".join(part for part in parts if part)
    return f"{facts.name:{width}}  {facts.state:9}  {text}".rstrip()


def describe_progress(facts: Facts) -> str:
    """Return how far the work is, its rate, and when the last sign of life was."""
    beat = facts.heartbeat
    parts = []
    if beat and beat.total:
        parts.append(f"{beat.done:,}/{beat.total:,} {beat.unit}, {beat.rate:.3g} {beat.unit}/s")
        if beat.seconds_left is not None:
            parts.append(f"{format_duration(beat.seconds_left)} left")
        if beat.loss is not None:
            parts.append(f"loss {beat.loss:.4f}")
    if facts.state is State.STALLED and beat:
        parts.append(f"no progress for {format_duration(beat.quiet + facts.age)}")
    if facts.age != float("inf"):
        parts.append(f"last sign of life {facts.age:.0f} s ago")
    return ", ".join(parts)


def describe_end(facts: Facts) -> str:
    """Return how the last command ended, or how long a finished stage took."""
    if facts.state is State.FINISHED:
        return format_duration(facts.seconds) if facts.seconds is not None else ""
    end = facts.attempt.end if facts.attempt else None
    if end is None:
        return ""
    return f"exit code {end.code}: {end.line}" if end.line else f"exit code {end.code}"


def describe_loss(facts: Facts) -> str:
    """Return when the last sign of life of work was that ended without a record."""
    if facts.attempt is None:
        return "its job has ended before it began"
    return f"ended without a record, last sign of life {format_duration(facts.age)} ago"
