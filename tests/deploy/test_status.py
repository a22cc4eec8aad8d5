"""`rectify status`: what is known of runs, sets and pipelines, from their folders."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deploy.facts
import deploy.status
from data.attempts import Recorder, read_attempts
from data.files import read_json, write_json
from data.intent import Want, read_intent, write_intent
from data.progress import Meter
from deploy.facts import EXPIRY_SECONDS, STUCK_SECONDS, read_facts
from deploy.launch.engine import JobFacts
from deploy.stage_records import read_graph
from deploy.state import Engine, State
from deploy.status import read_all
from tests.helpers.commands import REPOSITORY, run_command
from tests.helpers.pipelines import FakeCommands, write_pipeline
from tests.helpers.refusals import assert_refused

LONG = 10_000.0  # seconds


def change(path: Path, **entries: Any) -> None:
    """Change entries of a record."""
    write_json(path, {**read_json(path), **entries})


def age(folder: Path, seconds: float) -> None:
    """Make a folder's heartbeat older."""
    moment = time.time() - seconds
    os.utime(folder / "heartbeat.json", (moment, moment))


def record_killed(folder: Path) -> None:
    """Record an attempt of a process that is killed."""
    program = "import os, sys\nfrom pathlib import Path\nfrom data.attempts import Recorder\n"
    program += "Recorder(Path(sys.argv[1]), 1)\nos.kill(os.getpid(), 9)\n"
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=REPOSITORY, check=False)


@pytest.fixture
def begun(tmp_path) -> Iterator[Path]:
    """Return a run's folder in which this process works, and has made progress."""
    folder = tmp_path / "run"
    with Meter("fit", 100, "steps", shown=False) as meter:
        recorder = Recorder(folder, 1, stop=lambda: None)
        meter.add(5)
        recorder.beat()
        yield folder
    recorder.end(75, "")


@pytest.fixture
def ended(tmp_path):
    """Return a function that makes a run's folder whose last command ended with a code."""

    def end(code: int, line: str = "") -> Path:
        Recorder(tmp_path / "run", 1, keep_refused=True).end(code, line)
        return tmp_path / "run"

    return end


def state_of(folder: Path) -> State:
    """Return the state of a run or a set."""
    (facts,) = read_all(folder)
    return facts.state


def test_a_command_that_works_is_running(begun, capsys):
    assert run_command("status", begun) == 0
    line = capsys.readouterr().out
    for text in (begun, "running", "5/100 steps", "steps/s", "left", f"pid {os.getpid()}"):
        assert str(text) in line
    assert len(line.splitlines()) == 1


def test_one_without_progress_is_stalled(begun, capsys):
    change(begun / "heartbeat.json", quiet=STUCK_SECONDS + 1)
    assert run_command("status", begun) == 0
    assert "stalled" in (line := capsys.readouterr().out)
    assert "no progress for 0:15:0" in line


def test_one_that_has_no_progress_yet_is_not_stalled(begun):
    """It loads its model, or an engine that records no progress runs it."""
    change(begun / "heartbeat.json", quiet=LONG, total=0)
    assert state_of(begun) is State.RUNNING


def test_a_living_process_without_a_sign_of_life_is_stalled(begun):
    age(begun, LONG)
    assert state_of(begun) is State.STALLED


@pytest.mark.parametrize(
    ("seconds", "state"),
    [(0, State.RUNNING), (EXPIRY_SECONDS - 10, State.RUNNING), (EXPIRY_SECONDS + 10, State.LOST)],
)
def test_on_another_machine_signs_of_life_count(begun, seconds, state, capsys):
    change(begun / "attempts/0001.json", space="another", hosts=["node7"])
    age(begun, seconds)
    assert run_command("status", begun) == 0
    line = capsys.readouterr().out
    assert f" {state} " in line
    assert "node7" in line


def test_a_killed_command_is_lost_at_once(tmp_path, capsys):
    record_killed(tmp_path / "run")
    assert run_command("status", tmp_path / "run") == 0
    assert "lost" in (line := capsys.readouterr().out)
    assert "without a record" in line


@pytest.mark.parametrize(
    ("code", "state"),
    [(75, State.STOPPED), (130, State.STOPPED), (2, State.FAILED), (137, State.FAILED)],
)
def test_a_killed_command_does_not_hide_a_later_one(tmp_path, ended, code, state):
    record_killed(tmp_path / "run")
    assert state_of(ended(code)) is state


@pytest.mark.parametrize(
    ("code", "want", "state"),
    [
        (75, Want.RUN, State.STOPPED),
        (75, Want.STOP, State.STOPPED),
        (75, Want.CANCEL, State.CANCELLED),
        (3, Want.RUN, State.FAILED),
        (3, Want.CANCEL, State.CANCELLED),
        (0, Want.CANCEL, State.FINISHED),
    ],
)
def test_how_a_command_ended(ended, capsys, code, want, state):
    folder = ended(code, "the loss is nan")
    write_intent(folder, want, by="ann")
    assert run_command("status", folder) == 0
    line = capsys.readouterr().out
    assert line.split()[1].rstrip(";") == state
    if state is State.FAILED:
        assert "exit code 3: the loss is nan" in line
    if state is State.CANCELLED:
        assert "cancel by ann" in line


@pytest.mark.parametrize("want", [Want.STOP, Want.CANCEL])
def test_a_command_that_is_not_wanted_is_stopping(begun, want):
    write_intent(begun, want)
    assert state_of(begun) is State.STOPPING


@pytest.mark.parametrize("name", ["manifest.json", "finished.json"])
def test_a_set_or_a_run_that_ended_early_is_finished(tmp_path, name):
    """Also one of a version that recorded no attempts."""
    (tmp_path / name).write_text("{}")
    assert state_of(tmp_path) is State.FINISHED


def test_a_worker_that_ended_does_not_hide_one_that_works(begun):
    """Several commands share a set; the signs of life of one are later than the other's end."""
    Recorder(begun, 1).end(75, "")
    assert state_of(begun) is State.RUNNING
    change(begun / "attempts/0001.json", space="another")
    change(begun / "heartbeat.json", time=time.time() + 1)
    assert state_of(begun) is State.RUNNING
    age(begun, LONG)
    assert state_of(begun) is State.STOPPED


def test_a_folder_that_cannot_be_written(begun, monkeypatch):
    def refuse(folder: Path) -> float:
        raise PermissionError(folder)

    monkeypatch.setattr(deploy.facts, "read_clock", refuse)
    assert state_of(begun) is State.RUNNING
    age(begun, LONG)
    assert state_of(begun) is State.STALLED


# Pipelines.


@pytest.fixture
def commands(monkeypatch) -> FakeCommands:
    """Replace the commands of stages by one that writes a file into the stage's folder."""
    return FakeCommands(monkeypatch)


@pytest.fixture
def config(tmp_path) -> Path:
    """Return a pipeline a -> b -> c, and d, which needs a and c."""
    needs = {"a": [], "b": ["a"], "c": ["b"], "d": ["a", "c"]}
    stages = []
    for name, needed in needs.items():
        stages.append({"name": name, "pack": {"out": f"{{out}}/{name}"}, "needs": needed})
    return write_pipeline(tmp_path / "x.yaml", stages)


def states(out: Path) -> list[str]:
    """Return the states of a pipeline's stages."""
    return [facts.state.value for facts in read_all(out)]


def test_a_pipeline_at_every_moment(config, commands, capsys):
    """Finished, running, failed and queued; then stopped, cancelled and finished."""
    out = config.parent / "out"
    found = []
    commands.act = {"b": lambda: found.append(states(out))}
    commands.codes = {"b": 3}
    with pytest.raises(SystemExit, match="3"):
        run_command("run", config)
    assert found == [["finished", "running", "queued", "queued"]]
    assert run_command("status", out) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{out}: 1 of 4 stages finished"
    assert lines[1].split()[:2] == ["a", "finished"]
    assert lines[2].startswith("b  failed     exit code 3")
    assert lines[3].split(maxsplit=2) == ["c", "queued", "needs b"]
    assert lines[4].split(maxsplit=2) == ["d", "queued", "needs c"]

    commands.codes = {"b": 75}
    with pytest.raises(SystemExit, match="75"):
        run_command("run", config)
    assert states(out) == ["finished", "stopped", "queued", "queued"]
    assert run_command("cancel", out) == 0
    assert states(out) == ["finished", "cancelled", "cancelled", "cancelled"]
    commands.codes = {}
    assert run_command("run", config) == 0
    assert states(out) == ["finished"] * 4


def test_a_pipeline_is_read_from_any_current_folder(config, commands, monkeypatch):
    """It was run with a relative path; what its stages write is found all the same."""
    monkeypatch.chdir(config.parent)
    (config.parent / "elsewhere").mkdir()
    found = []

    def look() -> None:
        monkeypatch.chdir("elsewhere")
        with Meter("fit", 100, "steps", shown=False) as meter:
            meter.add(5)
            recorder = Recorder(Path("../out/b"), 1, stop=lambda: None)
            found.extend(read_all(Path("../out")))
            assert run_command("cancel", "../out", "--stage", "b") == 0
            found.append(read_intent(Path("../out/b")).want)
            recorder.end(75, "")
        monkeypatch.chdir("..")

    commands.act = {"b": look}
    monkeypatch.setattr(deploy.facts.os, "kill", lambda *_: None)
    assert run_command("run", config, "--out", "out", "--to", "b") == 0
    assert found[1].heartbeat.total == 100
    assert found[-1] is Want.CANCEL


def test_a_stage_that_has_changed_is_not_what_it_was(config, commands):
    """Its earlier attempts count no more, nor does its record."""
    out = config.parent / "out"
    commands.codes = {"b": 3}
    with pytest.raises(SystemExit, match="3"):
        run_command("run", config)
    config.write_text(config.read_text().replace("{out}/b", "{out}/b2"))
    found = []
    commands.codes = {}
    commands.act = {"b2": lambda: found.append(states(out))}
    assert run_command("run", config, "--force") == 0
    assert found == [["finished", "running", "queued", "queued"]]


def test_a_later_run_counts_more_than_a_job_that_has_ended(config, commands, monkeypatch):
    """A job of Slurm ended or was cancelled; then `rectify run` works on the stage."""
    out = config.parent / "out"
    found = []

    def look() -> None:
        folder = out / "stages/b"
        entries = {"engine": "slurm", "name": "x", "number": 1, "id": "7", "at": 1.0}
        entries |= {"first_attempt": 1, "inode": folder.stat().st_ino}
        write_json(folder / "job.json", entries)
        stage = read_graph(out).stages[1]
        for state in (Engine.ENDED, Engine.CANCELLED, Engine.QUEUED, Engine.SILENT):
            facts = JobFacts(state, "reason")
            known = {out / "stages/b": facts}
            monkeypatch.setattr(deploy.facts, "query_folders", lambda _, known=known: known)
            found.append(read_facts(out, [stage])[0].state.value)

    commands.act = {"b": look}
    assert run_command("run", config, "--to", "b") == 0
    assert found == ["running", "running", "queued", "unknown"]


@pytest.mark.parametrize("code", [0, 3])
def test_watching_ends_when_nothing_runs(config, commands, monkeypatch, capsys, code):
    """Also if stages are left that wait for one that has failed."""
    monkeypatch.setattr(deploy.status, "WATCH_SECONDS", 0)
    commands.codes = {"b": code}
    try:
        run_command("run", config)
    except SystemExit as ended:
        assert ended.code == code
    capsys.readouterr()
    assert run_command("status", config.parent / "out", "--watch") == 0
    assert capsys.readouterr().out.count("stages finished") == (2 if code else 1)


def test_watching_goes_on_while_something_runs(begun, monkeypatch, capsys):
    slept = []

    def end_later(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            end = {"code": 75, "line": "", "at": time.time() + 1, "committed": 0}
            change(begun / "attempts/0001.json", end=end)

    monkeypatch.setattr(deploy.status.time, "sleep", end_later)
    assert run_command("status", begun, "--watch") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [*["running"] * 3, "stopped"]


DAMAGED = (
    *("graph.json", "stages/a/attempts/0001.json", "stages/02-b.json", "stages/a/begun.json"),
    *("stages/c/intent.json", "stages/c/heartbeat.json", "stages/c/job.json"),
)


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'], ids=["cut", "list", "other"])
def test_a_damaged_file_is_named(config, commands, capfd, name, content):
    out = config.parent / "out"
    with pytest.raises(SystemExit, match="3"):
        commands.codes = {"c": 3}
        run_command("run", config)
    (out / name).write_text(content)
    assert_refused(capfd, ("status", out), out / name, alone=True)


@pytest.mark.parametrize("verb", ["status", "cancel", "logs"])
@pytest.mark.parametrize("kind", ["missing", "empty", "file", "someone's"])
def test_a_folder_of_another_kind_is_refused(tmp_path, capfd, verb, kind):
    folder = tmp_path / "x"
    if kind == "file":
        folder.write_text("x")
    elif kind != "missing":
        folder.mkdir()
    if kind == "someone's":
        (folder / "thesis.txt").write_text("x")
        (folder / "logs").mkdir()
        (folder / "logs/a.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    assert_refused(capfd, (verb, folder), folder, alone=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["status", "cancel", "logs"])
def test_a_folder_is_needed(capfd, verb):
    assert_refused(capfd, (verb,), "folder", alone=True)


# Cancelling, and logs.


def test_cancelling_a_run_writes_it_before_the_signal(begun, monkeypatch, capsys):
    found = []
    kill = deploy.facts.os.kill

    def look(process: int, number: int) -> None:
        found.append((process, read_intent(begun).want))
        kill(process, 0)

    monkeypatch.setattr(deploy.facts.os, "kill", look)
    assert run_command("cancel", begun) == 0
    assert found == [(os.getpid(), Want.CANCEL)]
    assert run_command("cancel", begun, "--stop") == 0
    assert found[1:] == [(os.getpid(), Want.STOP)]
    assert f"pid {os.getpid()}" in capsys.readouterr().out


def test_a_command_on_another_machine_finds_out(begun, capsys):
    change(begun / "attempts/0001.json", space="another", hosts=["node7"])
    assert run_command("cancel", begun) == 0
    assert "node7" in capsys.readouterr().out
    assert read_intent(begun).want is Want.CANCEL


def test_cancelling_a_stage_alone(config, commands, capfd):
    out = config.parent / "out"
    assert run_command("run", config, "--to", "a") == 0
    assert run_command("cancel", out, "--stage", "c") == 0
    assert states(out) == ["finished", "queued", "cancelled", "queued"]
    assert_refused(capfd, ("cancel", out, "--stage", "cc"), "--stage cc", "`c`")
    assert_refused(capfd, ("cancel", out / "stages/a", "--stage", "c"), "--stage c", "stages/a")
    assert run_command("run", config) == 0
    assert states(out) == ["finished"] * 4


def test_a_stage_cancelled_before_its_turn_does_not_begin(config, commands, capfd):
    out = config.parent / "out"
    commands.act = {"a": lambda: run_command("cancel", out, "--stage", "b")}
    with pytest.raises(SystemExit, match="75"):
        run_command("run", config)
    assert commands.begun == ["a"]
    assert "stage b" in capfd.readouterr().err
    assert run_command("run", config) == 0


def test_logs_are_of_the_stage_that_failed(config, commands, capsys):
    out = config.parent / "out"
    commands.codes = {"b": 3}
    with pytest.raises(SystemExit, match="3"):
        run_command("run", config)
    for name in ("a", "b"):
        (out / "stages" / name / "logs").mkdir(exist_ok=True)
        (out / "stages" / name / "logs/0001.txt").write_text(f"1 {name}\n2 {name}\n3 {name}\n")
    assert run_command("logs", out, "--lines", 2) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["2 b", "3 b"]
    assert run_command("logs", out, "--stage", "a", "--lines", 0) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["1 a", "2 a", "3 a"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--stage", "aa"), ("--stage aa", "`a`")),
        (("--rank", "7"), ("rank 7",)),
        (("--lines", "-1"), ("lines", "-1")),
        (("--stage", "d"), ("rank 0", "d")),
    ],
)
def test_missing_logs_are_refused(config, commands, capfd, words, named):
    assert run_command("run", config, "--to", "a") == 0
    assert_refused(capfd, ("logs", config.parent / "out", *words), *named, alone=True)


def test_the_attempts_of_a_stage_have_its_exit_codes(config, commands):
    commands.codes = {"a": 3}
    for _ in range(2):
        with pytest.raises(SystemExit, match="3"):
            run_command("run", config)
    ends = [one.end and one.end.code for one in read_attempts(config.parent / "out/stages/a")]
    assert ends == [3, 3]
