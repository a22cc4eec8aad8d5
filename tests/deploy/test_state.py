"""The state of a stage or a run, for everything that folder, engine and user can tell."""

from itertools import product

import pytest

from data.intent import Want
from deploy.state import (
    LIVING,
    MOST_IDLE_ATTEMPTS,
    Engine,
    Next,
    State,
    Work,
    choose_next,
    find_state,
)

# A row for each of Work x Engine, in the order NONE, QUEUED, RUNNING, ENDED, CANCELLED, SILENT.
# Each cell has the state if the work is wanted, if it is to stop, and if it is cancelled.
#
#   U  An engine that does not answer may do anything: nothing is known, whatever the folder tells.
#      Only what is finished stays finished.
#   C  What the engine has cancelled is cancelled, though nobody wrote it into the folder. A waiting
#      job that is only to stop is cancelled there, too.
#   N  Nothing has begun and no engine is known: it waits for the command that was begun.
#   B  A job that has ended before its command began is lost: it left no reason.
#   S  Without an engine the folder's signs of life count. With one that says "it runs", a silent
#      command is stalled: its process is there, but does nothing.
#   L  A sign of life of less than 90 s does not help if the engine says that the job has ended.
#   Q  A job that waits again after its last command ended (requeued) is queued.
#   P  Something is about to run or runs, and is not wanted: it is stopping.
#   E  The exit code counts (CODES) if nothing waits or runs, and it was not cancelled.
TABLE = {
    Work.NEW: """
        queued stopped cancelled          # N
        queued stopping stopping          # P
        running stopping stopping         # P: its command is about to begin
        lost stopped cancelled            # B
        cancelled stopped cancelled       # C
        unknown unknown unknown           # U
    """,
    Work.ACTIVE: """
        running stopping stopping         # S P
        queued stopping stopping          # Q: of the attempt before
        running stopping stopping         # P
        lost lost cancelled               # L
        cancelled stopped cancelled       # C
        unknown unknown unknown           # U
    """,
    Work.STUCK: """
        stalled stopping stopping         # S P
        queued stopping stopping          # Q
        stalled stopping stopping         # P
        lost lost cancelled               # L
        cancelled stopped cancelled       # C
        unknown unknown unknown           # U
    """,
    Work.SILENT: """
        lost lost cancelled               # S
        queued stopping stopping          # Q
        stalled stopping stopping         # S P
        lost lost cancelled               # L
        cancelled stopped cancelled       # C
        unknown unknown unknown           # U
    """,
    Work.ENDED: """
        ended ended cancelled             # E
        queued stopping stopping          # Q P
        running stopping stopping         # Q P
        ended ended cancelled             # E
        cancelled stopped cancelled       # C
        unknown unknown unknown           # U
    """,
    Work.FINISHED: """
        finished finished finished        # whatever an engine or a user says later
        finished finished finished
        finished finished finished
        finished finished finished
        finished finished finished
        finished finished finished
    """,
}
# "ended", by exit code. One that ended with 0 and left no record of a finished stage is lost: the
# process that would have written it was killed in between.
CODES = {
    0: State.LOST,
    1: State.FAILED,
    2: State.FAILED,
    3: State.FAILED,
    4: State.FAILED,
    75: State.STOPPED,
    130: State.STOPPED,
    137: State.FAILED,
    143: State.FAILED,
}


def read_table() -> dict[tuple[Work, Engine, Want], str]:
    """Return the word in each cell of the table."""
    cells = {}
    for work, text in TABLE.items():
        rows = [line.partition("#")[0].split() for line in text.strip().splitlines()]
        for (engine, row), (i, want) in product(zip(Engine, rows, strict=True), enumerate(Want)):
            cells[work, engine, want] = row[i]
    return cells


CELLS = read_table()


def test_the_table_has_every_cell():
    assert len(CELLS) == len(Work) * len(Engine) * len(Want)
    assert {*CELLS.values()} - {"ended"} <= {*State}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("work", Work, ids=lambda work: work.name)
def test_every_cell(work, code):
    for engine, want in product(Engine, Want):
        word = CELLS[work, engine, want]
        expected = CODES[code] if word == "ended" else State(word)
        assert find_state(work, engine, want, code) is expected, (work, engine, want, code)


def test_nothing_that_an_engine_may_still_do_is_called_ended():
    """A launch submits what is not living: never what waits or runs, or may do so."""
    for (work, engine, want), word in CELLS.items():
        if work is not Work.FINISHED and engine in (Engine.QUEUED, Engine.RUNNING):
            assert State(word) in LIVING, (work, engine, want)
        if work is not Work.FINISHED and engine is Engine.SILENT:
            assert word == State.UNKNOWN


# The rows: wanted, to stop, cancelled. The columns: idle attempts before and at the limit.
NEXT = {
    0: ("done done", "done done", "done done"),  # a signal that came too late changes nothing
    1: ("fail fail", "fail fail", "fail fail"),
    2: ("fail fail", "fail fail", "fail fail"),
    3: ("fail fail", "fail fail", "fail fail"),
    4: ("again fail", "fail fail", "fail fail"),  # a lost rank; "fail": a user does not want it
    75: ("again fail", "fail fail", "fail fail"),  # what a cancel leaves, too: then not again
    137: ("again fail", "fail fail", "fail fail"),  # out of memory: again, if it makes progress
    143: ("again fail", "fail fail", "fail fail"),
}


@pytest.mark.parametrize("code", NEXT)
def test_what_follows_an_end(code):
    for want, row in zip(Want, NEXT[code], strict=True):
        before, after = row.split()
        for idle in range(MOST_IDLE_ATTEMPTS):
            assert choose_next(code, want, idle) is Next(before), (code, want, idle)
        for idle in (MOST_IDLE_ATTEMPTS, MOST_IDLE_ATTEMPTS + 1):
            assert choose_next(code, want, idle) is Next(after), (code, want, idle)
