"""SIGTERM to any verb, as an orchestrator sends it: what can be saved is, and the code is 75."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.distributed.processes import find_children, find_descendants, wait_until
from tests.distributed.runs import CONFIG, TINY_RUN, tiny_fit_words
from tests.helpers.refusals import refused_line
from tests.helpers.results import read_results

FIRST_PROCESS = ("unshare", "-pf", "--mount-proc")  # as in a container
GRACE_SECONDS = 60  # on a machine that is busy with other tests
NO_LOGGER = ("--trainer.logger", "false")
TEACHER = ("--teacher", "runs/demo/teacher")


@pytest.fixture
def first_process():
    """Return the words that run a command as the first process of a container."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a namespace of processes needs root and unshare")
    return FIRST_PROCESS


def stop(process, target):
    """Send SIGTERM; the process must end with exit code 75 in time. Returns its messages."""
    began = time.monotonic()
    os.kill(target, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert time.monotonic() - began < GRACE_SECONDS
    assert "Traceback" not in err
    return err


def has_loaded_torch(pid):
    """Return whether a process has begun with what takes time."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def write_pipeline(folder, out):
    """Write a pipeline of two long trainings, and of a stage that is not to begin."""
    options = dict(zip(TINY_RUN[::2], TINY_RUN[1::2]))
    fit = {name.removeprefix("--"): value for name, value in options.items()}
    fit |= {
        "config": [str(path) for path in CONFIG],
        "out": "{out}/{seed}",
        "trainer.logger": False,
    }
    fit |= {"trainer.max_steps": 1500, "checkpoints.every": 1500, "seed_everything": "{seed}"}
    teachers = {"name": "teacher-{seed}", "for": {"seed": [0, 1]}, "fit": fit}
    stages = [teachers, {"name": "next", "sample": {"run": "x", "out": "x"}}]
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"out": str(out), "stages": stages}))
    return path


@pytest.mark.slow
def test_a_pipeline_in_a_container_saves_and_ends_with_75(workspace, first_process, tmp_path):
    """The signal reaches `run` alone, the first process, which forwards it to the stage."""
    pipeline = write_pipeline(tmp_path, tmp_path / "out")
    process = workspace.start("run", pipeline, before=first_process)
    run = tmp_path / "out/0"
    wait_until(process, lambda: (run / "metrics.jsonl").exists())
    err = stop(process, find_children(process.pid)[0])
    assert "saved" in err
    assert "next" not in err and "teacher-1" not in err
    assert 0 < read_checkpoint(newest_checkpoint(run))["global_step"] < 1500
    assert not (run / "lease.json").exists()


@pytest.mark.slow
def test_a_signal_stops_all_stages_that_run_at_once(workspace, tmp_path):
    pipeline = write_pipeline(tmp_path, tmp_path / "out")
    process = workspace.start("run", pipeline, "--jobs", "2")
    runs = [tmp_path / "out" / name for name in "01"]
    wait_until(process, lambda: all((run / "metrics.jsonl").exists() for run in runs))
    err = stop(process, process.pid)
    assert "next" not in err
    assert all(newest_checkpoint(run) for run in runs)


VERBS = {
    "fit": tiny_fit_words("OUT", 1500, *NO_LOGGER),
    "collect": ("collect", *TEACHER, "--out", "OUT", "--pairs", "100000", "--shard", "32"),
    "encode": (
        *("encode", "--images", "runs/demo/images/train", "--codec", "runs/demo/autoencoder"),
        *("--out", "OUT", "--shard", "1"),
    ),
    "evaluate": (
        *("evaluate", "--run", "runs/demo/teacher", "--images", "runs/demo/images"),
        *("--out", "OUT", "--samples", "100000"),
    ),
    "export": ("export", "--run", "runs/demo/student", "--out", "OUT", "--steps", "900"),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_in_a_container_ends_with_75(workspace, first_process, tmp_path, verb):
    out = tmp_path / "out"
    words = [out if word == "OUT" else word for word in VERBS[verb]]
    process = workspace.start(*words, before=first_process)
    wait_until(process, lambda: find_children(process.pid))
    target = find_children(process.pid)[0]
    begun = {"fit": "metrics.jsonl", "collect": "*.tar", "encode": "*.tar"}.get(verb)
    if begun:
        wait_until(process, lambda: list(out.glob(begun)))
    else:
        wait_until(process, lambda: has_loaded_torch(target))
    stop(process, target)
    if verb == "fit":
        assert newest_checkpoint(out)
    assert not list(out.glob(".*.tmp"))


@pytest.mark.slow
def test_a_signal_in_a_long_validation_does_not_wait_for_its_end(workspace, tmp_path):
    run = tmp_path / "run"
    heldout = ("--data.heldout", "Latents", "--data.heldout.path", "runs/demo/latents")
    long = ("--data.heldout_batches", "100000", "--trainer.val_check_interval", "3")
    words = tiny_fit_words(run, 40, *heldout, *long, *NO_LOGGER)
    process = workspace.start(*words)
    wait_until(process, lambda: (run / "metrics.jsonl").exists())
    time.sleep(2)
    stop(process, process.pid)
    assert newest_checkpoint(run).name == "step=000000003.ckpt"
    assert "heldout" not in (run / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_killed_reading_process_is_named_and_leaves_no_other(workspace, tmp_path):
    run = tmp_path / "run"
    words = tiny_fit_words(run, 1500, "--data.workers", "2", *NO_LOGGER)
    process = workspace.start(*words)
    wait_until(process, lambda: (run / "metrics.jsonl").exists())
    readers = find_descendants(process.pid)
    began = time.monotonic()
    os.kill(readers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 137, err
    assert time.monotonic() - began < GRACE_SECONDS
    assert re.search(rf"pid .*{readers[0]}", refused_line(err))
    assert not any(Path(f"/proc/{reader}").exists() for reader in readers)


@pytest.mark.slow
def test_a_run_folder_has_one_owner(workspace, first_process, tmp_path):
    run = tmp_path / "run"
    words = tiny_fit_words(run, 1500, *NO_LOGGER)
    first = workspace.start(*words)
    wait_until(first, lambda: list(run.glob("checkpoints/step=*")))
    ended = workspace.rectify(*words, code=2)
    line = refused_line(ended.stderr)
    assert all(str(part) in line for part in (run, f"pid {first.pid}", os.uname().nodename))
    assert first.poll() is None

    # nor does a container of the same host name get it: it waits for a sign of life
    other = workspace.start(*words, before=first_process)
    _, err = other.communicate(timeout=120)
    assert other.returncode == 2, err
    assert f"pid {first.pid}" in refused_line(err)
    assert first.poll() is None

    # killed, it owns the folder no more
    first.kill()
    first.communicate()
    again = workspace.rectify(*tiny_fit_words(run, 1, *NO_LOGGER))
    assert f"pid {first.pid}" in again.stderr
    assert "is finished" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["encode", "collect"])
def test_two_containers_of_one_host_name_write_one_set(workspace, first_process, tmp_path, stage):
    """Each is process 1 of its container; the set is the one that a single command wrote."""
    (record,) = (workspace.path / "runs/demo/stages").glob(f"*-{stage}.json")
    words = json.loads(record.read_text())["words"]
    position = words.index("--out") + 1
    words[position] = tmp_path / "set"
    both = [workspace.start(*words, "--shard", "64", before=first_process) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert not list(tmp_path.rglob(".*"))
    workspace.rectify(*words[:position], tmp_path / "one", *words[position + 1 :], "--shard", "64")
    assert read_results(tmp_path / "set") == read_results(tmp_path / "one")


@pytest.mark.slow
def test_a_busy_port_is_named_and_leaves_no_rank(workspace, tmp_path):
    """Two processes that were started by hand."""
    import socket

    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        variables = (f"MASTER_PORT={port}", "MASTER_ADDR=localhost", "WORLD_SIZE=2", "RANK=0")
        words = tiny_fit_words(tmp_path / "run", 40, *NO_LOGGER)
        process = workspace.start(*words, before=("env", *variables, "LOCAL_WORLD_SIZE=2"))
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert f"MASTER_PORT {port}" in refused_line(err)
