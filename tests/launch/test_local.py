"""`rectify launch --on local`: a pipeline in the background of this host, started once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from data.attempts import read_attempts
from data.intent import Want, read_intent
from deploy.launch.jobs import read_job
from deploy.launch.local import JOB_NAME, Local
from deploy.stage_records import stage_folder
from deploy.status import read_all
from tests.helpers.commands import REPOSITORY, Workspace, run_command
from tests.helpers.pipelines import write_pipeline
from tests.helpers.refusals import assert_refused
from tests.helpers.training import small_config, spec

MOMENTS = ("begun", "before", "during", "after", "recorded")
# Launches a pipeline whose command is `sleep`; the process is killed at a moment.
PROGRAM = """
import os, signal, subprocess, sys
from types import SimpleNamespace
from deploy.launch import jobs, local

def end_at(moment, process=None):
    if moment == sys.argv[2]:
        os.kill(process or os.getpid(), signal.SIGKILL)

def start(words, **options):
    end_at("before")
    parent = os.getpid()
    during = lambda: end_at("during", parent)
    process = subprocess.Popen(["sleep", "60"], preexec_fn=during, **options)
    end_at("after")
    return process

write = jobs.write_job
def write_job(path, job):
    write(path, job)
    end_at("recorded" if job.id else "begun")

jobs.write_job = write_job
jobs.SETTLING_SECONDS = 0.5
local.subprocess = SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)
from deploy.cli import main
sys.exit(main(["launch", sys.argv[1], "--on", "local"]))
"""


@pytest.fixture
def config(tmp_path) -> Path:
    """Return a pipeline of one stage."""
    stage = {"name": "one", "pack": {"out": "{out}/one", "size": 8}}
    return write_pipeline(tmp_path / "x.yaml", [stage])


def processes_of(out: Path) -> list[int]:
    """Return the processes that have the name of a folder's job in their environment."""
    job = read_job(out / "job.json")
    assert job
    prefix = f"{JOB_NAME}={job.name.rpartition('-')[0]}-".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(variable.startswith(prefix) for variable in variables):
            found.append(int(folder.name))
    return found


@pytest.fixture
def launched(config) -> Iterator[Callable[[str], subprocess.CompletedProcess]]:
    """Return a function that launches the pipeline, killed at a moment."""

    def launch(moment: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-c", PROGRAM, str(config), moment]
        return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)

    yield launch
    end_processes(config.parent / "out")


def end_processes(out: Path) -> None:
    """Kill what was launched in a folder."""
    for process in processes_of(out):
        with suppress(ProcessLookupError):  # it has just ended with its parent
            os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_launch_that_is_killed_starts_one_process_in_the_end(launched, config, moment):
    assert launched(moment).returncode == -signal.SIGKILL
    again = launched("never")
    assert again.returncode == 0, again.stderr
    out = config.parent / "out"
    (process,) = processes_of(out)
    job = read_job(out / "job.json")
    assert job and job.id.split("/")[1] == str(process)
    assert job.id in again.stdout


def test_a_pipeline_that_runs_is_not_launched_again(launched, config, capfd):
    first = launched("never")
    assert launched("never").stdout == first.stdout
    assert len(processes_of(config.parent / "out")) == 1
    assert run_command("launch", config, "--on", "local") == 0
    assert capfd.readouterr().out == first.stdout


def test_a_job_that_has_ended_is_followed_by_another(launched, config):
    launched("never")
    out = config.parent / "out"
    (process,) = processes_of(out)
    os.kill(process, signal.SIGKILL)
    while processes_of(out):
        time.sleep(0.01)
    launched("never")
    job = read_job(out / "job.json")
    assert job and job.number == 2
    assert len(processes_of(out)) == 1


def test_nothing_is_known_of_a_job_of_another_host():
    (facts,) = Local().query(["host-123/1/1"]).values()
    assert facts.hosts == "host"
    assert facts.state.name == "NONE"


@pytest.mark.parametrize("content", ["{", "{}", '{"engine": 3}'])
def test_a_damaged_job_is_named(config, capfd, content):
    (config.parent / "out").mkdir()
    path = config.parent / "out/job.json"
    path.write_text(content)
    assert_refused(capfd, ("launch", config, "--on", "local"), path, alone=True)
    path.unlink()


@pytest.mark.parametrize("words", [("--stage", "on"), ("--from", "on"), ("--to", "on")])
def test_an_unknown_stage_is_refused(config, capfd, words):
    words = ("launch", config, "--on", "local", *words)
    assert_refused(capfd, words, "on: no such stage", "`one`", alone=True)
    assert not (config.parent / "out").exists()


def test_a_stage_alone_is_given_alone(config, capfd):
    words = ("launch", config, "--on", "local", "--stage", "one", "--to", "one")
    assert_refused(capfd, words, "--stage", "--from", "--to", alone=True)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_background_pipeline_from_launch_to_cancel_and_on(tmp_path, request):
    """It outlives the launch; a cancel has it save and end with 75; `rectify run` goes on."""
    workspace = Workspace(tmp_path)
    config = small_config(spec("Images", path="out/images/train"))
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    fit = {"config": "fit.yaml", "out": "{out}/run", "trainer.max_steps": 10**6}
    stages = [{"name": "pack", "pack": {"out": "{out}/images", "size": 8}}]
    stages += [{"name": "fit", "fit": {**fit, "trainer.logger": False, "checkpoints.every": 50}}]
    write_pipeline(tmp_path / "x.yaml", stages)
    out = tmp_path / "out"

    # It runs after the launching process has ended; a second launch starts nothing.
    request.addfinalizer(lambda: end_processes(out))
    first = workspace.rectify("launch", "x.yaml", "--on", "local").stdout
    wait_until(lambda: "steps" in workspace.rectify("status", "out").stdout)
    wait_until(lambda: [*(out / "run/checkpoints").glob("step=*")] != [])
    assert workspace.rectify("launch", "x.yaml", "--on", "local").stdout == first
    lines = workspace.rectify("status", "out").stdout.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["finished", "running"]
    assert "steps" in lines[2]
    assert len(workspace.rectify("logs", "out").stdout.splitlines()) > 1

    # A cancel is written before the signal; the command saves, and ends with 75.
    assert "SIGTERM" in workspace.rectify("cancel", "out").stdout
    assert read_intent(stage_folder(out, "fit")).want is Want.CANCEL
    wait_until(lambda: processes_of(out) == [])
    end = read_attempts(stage_folder(out, "fit"))[-1].end
    assert end and end.code == 75
    lines = workspace.rectify("status", "out").stdout.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["finished", "cancelled"]
    step = len([*(out / "run/checkpoints").glob("step=*")])

    # The command, given again, goes on.
    process = workspace.start("run", "x.yaml")
    wait_until(lambda: read_all(out)[1].state.value == "running")
    wait_until(lambda: len([*(out / "run/checkpoints").glob("step=*")]) > step)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert read_all(out)[1].state.value == "stopped"
