"""The records of commands in a folder: attempts, heartbeat, intent, logs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from data import attempts, progress
from data.attempts import (
    Recorder,
    begin_attempt,
    count_committed,
    end_attempts,
    hide_secrets,
    note_line,
    read_attempts,
    read_heartbeat,
    recorded_number,
    set_hosts,
)
from data.intent import Want, read_intent, write_intent
from data.progress import Meter
from tests.helpers.commands import REPOSITORY
from tests.helpers.refusals import refused

FEW = 5  # attempts that a process makes


def start_python(program, *words):
    """Start a Python program that imports this repository."""
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def record_attempt(folder, code, line=""):
    """Record an attempt from its begin to its end."""
    begin_attempt(folder, 1, 0)
    note_line(line)
    end_attempts(code)


def test_commands_that_begin_at_once_get_different_numbers(tmp_path):
    program = (
        "import sys; from pathlib import Path; from data.attempts import Recorder\n"
        f"for _ in range({FEW}): print(Recorder(Path(sys.argv[1]), 1).attempt.number)"
    )
    processes = [start_python(program, tmp_path) for _ in range(2)]
    numbers = [int(word) for process in processes for word in process.communicate()[0].split()]
    assert sorted(numbers) == list(range(1, 2 * FEW + 1))
    assert [attempt.number for attempt in read_attempts(tmp_path)] == sorted(numbers)


def test_an_attempt_records_its_circumstances_and_its_end(tmp_path):
    """The line of one command is not that of the next."""
    before = time.time()
    ends = [(3, "the loss is not finite"), (75, "stopped by SIGUSR1"), (2, "wrong key"), (0, "")]
    for code, line in ends:
        record_attempt(tmp_path, code, line)
    record_attempt(tmp_path, 0)
    found = read_attempts(tmp_path)
    assert [(one.end.code, one.end.line) for one in found] == [*ends, (0, "")]
    first = found[0]
    assert (first.number, first.world, first.engine) == (1, 1, "local")
    assert (first.hosts, first.process) == ([os.uname().nodename], os.getpid())
    assert before - 1 < first.begin <= first.end.at <= time.time() + 1
    assert first.revision


def test_a_killed_command_has_no_end(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from data.attempts import begin_attempt\n"
        "begin_attempt(Path(sys.argv[1]), 1, 0); print(1, flush=True); time.sleep(60)"
    )
    process = start_python(program, tmp_path)
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [attempt.end for attempt in read_attempts(tmp_path)] == [None]


def test_a_refused_first_command_leaves_nothing(tmp_path):
    record_attempt(tmp_path / "new", 2, "wrong key")
    assert not (tmp_path / "new").exists()
    (tmp_path / "made").mkdir()
    record_attempt(tmp_path / "made", 2, "wrong key")
    assert list((tmp_path / "made").iterdir()) == []


def test_the_rank_that_failed_by_itself_is_the_cause_of_the_end(tmp_path):
    begin_attempt(tmp_path, 2, 0)
    program = (
        "import sys; from pathlib import Path; from data.attempts import *\n"
        "begin_attempt(Path(sys.argv[1]), 2, 1); note_line('a bug'); end_attempts(1)"
    )
    assert start_python(program, tmp_path).wait() == 0
    note_line("another rank ended")
    end_attempts(4)
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.end.code, attempt.end.line) == (1, "a bug")


def test_hosts_are_those_of_all_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "_hosts", [])
    begin_attempt(tmp_path, 3, 0)
    set_hosts(["b", "a", "b"])
    end_attempts(0)
    assert read_attempts(tmp_path)[0].hosts == ["a", "b"]


def test_only_a_recording_command_has_a_number(tmp_path):
    begin_attempt(tmp_path, 1, 0)
    assert recorded_number(tmp_path / "." / ".." / tmp_path.name) == 1
    assert recorded_number(tmp_path / "other") == 0
    end_attempts(0)
    assert recorded_number(tmp_path) == 0


def test_a_damaged_record_is_named(tmp_path):
    record_attempt(tmp_path, 0)
    path = tmp_path / "attempts/0001.json"
    path.write_text(path.read_text().replace('"world": 1', '"world": 2'))
    with refused(path):
        read_attempts(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.logger.api_key=abc"],
        ["--token", "abc"],
        ["--wandb_API-KEY", "abc def 'abc'"],
        ["--logger", '{"init_args": {"api_key": "abc", "name": "n"}}'],
        ["--logger", "{api_key: abc, name: n}"],
        ["--data.source.path", "https://user:abc@host/set"],
        ["--data.source.path", "https://host/set?token=abc"],
        ["--AWS_SECRET_ACCESS_KEY=abc"],
    ],
)
def test_values_that_are_named_like_secrets_are_hidden(words):
    shown = hide_secrets(["fit", *words, "--out", "run"])
    assert len(shown) == len(words) + 3
    assert "abc" not in " ".join(shown)
    assert shown[0] == "fit" and shown[-2:] == ["--out", "run"]


def test_other_values_are_shown():
    words = ["fit", "--tokenizer", "t5", "--out", "a b", "--data.batch=8"]
    assert hide_secrets(words) == words


def test_what_is_committed_is_the_newest_step_or_the_finished_shards(tmp_path):
    assert count_committed(tmp_path / "none") == 0
    (tmp_path / "run/checkpoints/step=000000010.ckpt").mkdir(parents=True)  # sharded
    (tmp_path / "run/checkpoints/step=000000005.ckpt").touch()
    assert count_committed(tmp_path / "run") == 10
    (tmp_path / "set").mkdir()
    for name in ("000000.json", "000001.json", "000002.tar", "plan.json", "heartbeat.json"):
        (tmp_path / "set" / name).touch()
    assert count_committed(tmp_path / "set") == 2


# Heartbeat


def test_a_heartbeat_has_the_progress_of_the_work(tmp_path):
    """It is quiet for longer and longer while nothing moves."""
    recorder = Recorder(tmp_path, 1)
    with Meter("fit", 100, "steps", done=20, shown=False) as meter:
        meter.values = {"loss": float("nan"), "data_wait": 0.25}
        meter.add(10)
        recorder.beat()
        moved = read_heartbeat(tmp_path)
        meter.values["loss"] = 0.5
        time.sleep(0.2)
        recorder.beat()
        waiting = read_heartbeat(tmp_path)
        meter.add(1)
        recorder.beat()
    assert (moved.attempt, moved.done, moved.total, moved.unit) == (1, 30, 100, "steps")
    assert moved.rate > 0 and moved.seconds_left >= 0 and moved.memory > 1e6
    assert (moved.loss, moved.data_wait) == (None, 0.25)
    assert abs(moved.time - time.time()) < 60
    assert moved.quiet < 0.2 <= waiting.quiet and waiting.loss == 0.5
    assert read_heartbeat(tmp_path).quiet < 0.2
    recorder.end(0, "")


def test_the_work_under_way_is_the_innermost_that_has_not_ended(tmp_path, monkeypatch):
    """A finished one comes back for none that follows it."""
    monkeypatch.setattr(progress, "_latest", None)  # of an earlier test
    recorder = Recorder(tmp_path, 1)
    for total in (3, 4):
        with Meter("outer", total, "steps", shown=False):
            with Meter("inner", 9, "pairs", shown=False):
                recorder.beat()
                assert read_heartbeat(tmp_path).total == 9
            recorder.beat()
            assert read_heartbeat(tmp_path).total == total
        recorder.end(0, "")
        assert read_heartbeat(tmp_path).total == total


# Intent


def wait_for(event):
    """Wait until an event is set."""
    assert event.wait(5)


def test_work_that_is_no_longer_wanted_is_stopped_once(tmp_path, monkeypatch):
    """A file that is not complete yet is read again."""
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0.02)
    stops = []
    stopped = threading.Event()

    def stop():
        stops.append(read_intent(tmp_path).want)
        stopped.set()

    recorder = Recorder(tmp_path, 1, stop=stop)
    (tmp_path / "intent.json").write_text('{"want": "st')
    time.sleep(0.1)
    assert not stops
    (tmp_path / "intent.json").write_text('{"want": "stop"}')  # as a user may write it
    wait_for(stopped)
    time.sleep(0.1)
    recorder.end(75, "stopped")
    assert stops == [Want.STOP]


def test_a_later_command_is_wanted(tmp_path):
    write_intent(tmp_path, Want.CANCEL, by="u@h")
    assert read_intent(tmp_path)[:2] == (Want.CANCEL, "u@h")
    record_attempt(tmp_path, 0)
    assert read_intent(tmp_path).want == Want.RUN


def test_other_ranks_stop_at_what_is_written_after_their_begin(tmp_path, monkeypatch):
    """Rank 0 takes back what was wanted before."""
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0.02)
    stopped = threading.Event()
    monkeypatch.setattr(attempts, "stop_process", stopped.set)
    write_intent(tmp_path, Want.STOP, by="earlier")
    threading.Thread(target=attempts.stop_unwanted, args=(tmp_path,), daemon=True).start()
    time.sleep(0.1)
    assert not stopped.is_set()
    write_intent(tmp_path, Want.STOP, by="now")
    wait_for(stopped)


@pytest.mark.parametrize("content", ["", "[]", '{"want": "go"}', '{"by": "x"}'])
def test_a_wrong_intent_is_named_before_anything_is_written(tmp_path, content):
    path = tmp_path / "intent.json"
    path.write_text(content)
    with refused(path):
        begin_attempt(tmp_path, 1, 0)
    assert list(tmp_path.iterdir()) == [path]


# Logs

PRINTING = """
import logging, sys, warnings
from pathlib import Path
from data.attempts import begin_attempt, end_attempts, exit_now
from data.run_output import copy_output
copy_output()
print("before")
begin_attempt(Path(sys.argv[1]), 2, int(sys.argv[2]))
logging.basicConfig()
logging.warning("logged")
warnings.warn("warned")
sys.stderr.write("\\rbar 10 %")
print("after")
print("begun", end="", flush=True)
sys.stdin.readline()
exit_now(4, "stalled")
"""


def test_each_rank_keeps_what_it_prints_until_it_ends(tmp_path):
    """A progress bar, which rewrites its line, is left out."""
    ranks = []
    for rank in (0, 1):
        command = [sys.executable, "-c", PRINTING, tmp_path, str(rank)]
        ranks.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        assert ranks[rank].stdout.readline() == "before\n"
        assert ranks[rank].stdout.readline() == "after\n"
    for rank, process in reversed(list(enumerate(ranks))):
        process.communicate("\n")
        assert process.returncode == 4
        text = (tmp_path / f"logs/0001-rank{rank:02d}.txt").read_text()
        for part in ("before\n", "logged\n", "warned\n", "after\n", "begun", "error: stalled\n"):
            assert part in text
        assert "bar" not in text
    end = json.loads((tmp_path / "attempts/0001.json").read_text())["end"]
    assert (end["code"], end["line"]) == (4, "stalled")
