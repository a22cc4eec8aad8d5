"""The state of a stage or a run: a pure function of what folder, engine and user tell.

It is computed afresh each time; nothing stores it.
"""

from enum import StrEnum

from data.intent import Want
from data.signals import STOPPED_EXIT_CODE

INTERRUPTED_EXIT_CODE = 130  # from the keyboard
REFUSED_EXIT_CODES = (1, 2, 3)  # the same command would end in the same way
MOST_IDLE_ATTEMPTS = 3  # in a row, without progress


class Work(StrEnum):
    """What a folder tells of the work in it."""

    NEW = "no command has begun"
    ACTIVE = "a command has begun, and gives signs of life"
    STUCK = "a command gives signs of life, but makes no progress"
    SILENT = "a command has begun, and gives no sign of life"
    ENDED = "the last command has ended"
    FINISHED = "all is done"


class Engine(StrEnum):
    """What the engine that gives a command its processes tells of it."""

    NONE = "no engine is known, or the process is on another machine"
    QUEUED = "it waits"
    RUNNING = "it runs"
    ENDED = "it has ended, or is not known"
    CANCELLED = "it was cancelled"
    SILENT = "the engine does not answer"


class State(StrEnum):
    """The state of a stage or a run."""

    FINISHED = "finished"
    RUNNING = "running"
    STALLED = "stalled"  # it runs, without progress or signs of life
    QUEUED = "queued"
    STOPPING = "stopping"
    STOPPED = "stopped"  # the same command goes on
    FAILED = "failed"
    LOST = "lost"  # it ended without a record: the same command goes on
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"  # the engine does not answer: nothing is done


LIVING = (State.RUNNING, State.STALLED, State.QUEUED, State.STOPPING)


def find_state(work: Work, engine: Engine, want: Want, code: int = 0) -> State:
    """Return the state of a stage or a run.

    Args:
        work: what its folder tells.
        engine: what its engine tells.
        want: what the user wants.
        code: exit code of the last command, if it has ended.
    """
    # What is certain, whatever else is told.
    if work is Work.FINISHED:
        return State.FINISHED
    if engine is Engine.SILENT:
        return State.UNKNOWN
    if engine is Engine.CANCELLED:
        return State.STOPPED if want is Want.STOP else State.CANCELLED

    # Something waits or runs.
    has_signs = work in (Work.ACTIVE, Work.STUCK)
    runs = engine is Engine.RUNNING or (engine is Engine.NONE and has_signs)
    if runs or engine is Engine.QUEUED:
        if want is not Want.RUN:
            return State.STOPPING
        if not runs:
            return State.QUEUED
        return State.STALLED if work in (Work.STUCK, Work.SILENT) else State.RUNNING

    # Nothing does.
    if want is Want.CANCEL:
        return State.CANCELLED
    if work is Work.NEW:
        if want is Want.STOP:
            return State.STOPPED
        return State.LOST if engine is Engine.ENDED else State.QUEUED
    if work is not Work.ENDED or code == 0:
        return State.LOST
    is_stopped = code in (STOPPED_EXIT_CODE, INTERRUPTED_EXIT_CODE)
    return State.STOPPED if is_stopped else State.FAILED


class Next(StrEnum):
    """What follows the end of a command on an engine."""

    DONE = "done"
    FAIL = "fail"
    AGAIN = "again"


def choose_next(code: int, want: Want, idle_attempts: int) -> Next:
    """Return what follows the end of a command.

    Args:
        code: its exit code.
        want: what the user wants.
        idle_attempts: attempts in a row, this one included, that committed no step or shard.
    """
    if code == 0:
        return Next.DONE
    if code in REFUSED_EXIT_CODES or want is not Want.RUN:
        return Next.FAIL
    return Next.AGAIN if idle_attempts < MOST_IDLE_ATTEMPTS else Next.FAIL
