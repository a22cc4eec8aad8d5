"""SIGKILL to `rectify run` at random moments, and at each change of its records.

The same command then makes the same results, and the records tell what happened.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from data.attempts import Attempt, list_records, read_attempts
from data.files import process_start, read_json
from deploy.stage_records import read_graph, stage_folder
from deploy.status import read_all
from models.checkpoint import read_checkpoint
from tests.distributed.crash_points import fork_rectify
from tests.distributed.processes import find_descendants, wait_until
from tests.distributed.runs import TRAINING_STATE, equal
from tests.distributed.test_kills import is_rank
from tests.helpers.commands import REPOSITORY, Workspace
from tests.helpers.pipelines import write_pipeline
from tests.helpers.results import is_result, result_lines

FILE = "short.yaml"
OUT = Path("runs/short")
TRAINING = {"trainer.logger": False, "metrics.every": 1}
SMALL = {
    **TRAINING,
    "trainer.max_steps": 40,
    "checkpoints.every": 10,
    "data.batch": 32,
    "model.denoiser.net.size": 4,
    "model.denoiser.net.width": 16,
    "model.denoiser.net.depth": 1,
}
# What is added to the options of the stages of configs/digits/pipeline.yaml.
SHORTER = {
    "pack": {"size": 16, "shard": 512},
    "autoencoder": {
        **TRAINING,
        "trainer.max_steps": 12,
        "checkpoints.every": 4,
        "data.batch": 8,
    },
    "encode": {"shard": 512},
    "teacher": SMALL,
    "collect": {"pairs": 128, "steps": 4, "shard": 32},
    "student": SMALL,
    "evaluate-teacher": {"steps": [1, 2], "samples": 128},
    "evaluate-student": {"steps": [1, 2], "samples": 128},
}
TIMED = ("summary.json", "evaluation.json")  # have the seconds that something took
# What a stage's record has of their content varies; that of a checkpoint has the git revision.
VARYING = re.compile(r".*(summary\.json|evaluation\.json|report\.html|metrics\.jsonl|\.ckpt)")
MODES = ("run", "stage", "group")  # what is killed: `rectify run`, a stage's process, or all
ACTIVE = {"running", "stalled", "stopping"}


def comparable_record(path: Path) -> dict[str, Any]:
    """Return a stage's record without seconds and times of files."""
    record = read_json(path)
    record.pop("seconds")
    files = {}
    for name, (size, _, xxh3) in record["files"].items():
        files[name] = None if VARYING.fullmatch(name) else (size, xxh3)
    return {**record, "files": files}


def comparable(path: Path) -> Any:
    """Return what a file has in common with that of an undisturbed command."""
    if path.suffix == ".ckpt":
        checkpoint = read_checkpoint(path, resume=True)
        return {key: checkpoint.get(key) for key in (*TRAINING_STATE, "lr_schedulers")}
    if path.suffix == ".safetensors":  # its metadata are in any order
        with safe_open(path, "pt") as file:
            return load_file(path), file.metadata()
    if path.name == "metrics.jsonl":
        return result_lines(path.parent)
    if path.name in TIMED:
        content = json.loads(path.read_bytes())
        return {**content, "seconds": None, "seal": None}
    if path.name == "report.html":
        return None
    if path.parent.name == "stages":
        return comparable_record(path)
    return path.read_bytes()


def read_comparable(out: Path) -> dict[str, Any]:
    """Return what the results and records of a pipeline have in common, by the files' names."""
    content = {}
    for path in out.rglob("*"):
        name = path.relative_to(out)
        if path.is_file() and is_result(name) and path.name != ".lock":
            content[str(name)] = comparable(path)
    return content


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that two pipelines have the same results and records, and nothing is left over."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    other = [name for name, content in found.items() if not equal(content, expected[name])]
    assert not other, f"other content: {other}"


def stage_attempts(out: Path) -> dict[str, list[Attempt]]:
    """Return the attempts of a pipeline's stages by name."""
    stages = read_graph(out).stages
    return {stage.name: read_attempts(stage_folder(out, stage.name)) for stage in stages}


def find_open(out: Path) -> set[tuple[str, int]]:
    """Return the attempts without an end: the stage and the number."""
    if not (out / "graph.json").exists():
        return set()
    found = set()
    for name, attempts in stage_attempts(out).items():
        found |= {(name, attempt.number) for attempt in attempts if not attempt.end}
    return found


def assert_attempts(out: Path, killed: set[tuple[str, int]], codes: set[int]) -> None:
    """Assert that the attempts of a finished pipeline tell what happened.

    Args:
        out: the pipeline's folder.
        killed: attempts that have no end.
        codes: exit codes that others than a stage's last one may have.
    """
    assert find_open(out) == killed
    for name, attempts in stage_attempts(out).items():
        numbers = [int(path.stem) for path in list_records(stage_folder(out, name))]
        assert numbers == list(range(1, len(numbers) + 1)), name
        ends = [attempt.end.code for attempt in attempts if attempt.end]
        assert ends[-1] == 0 and attempts[-1].end, (name, attempts)
        assert set(ends[:-1]) <= codes, (name, ends)
        assert sorted(attempt.begin for attempt in attempts) == [one.begin for one in attempts]


# ---- random moments ----


@dataclass(frozen=True)
class Undisturbed:
    """The short pipeline, not disturbed.

    Args:
        content: what its results and records have in common with others.
        began: when the attempt of each stage began, in seconds since the command.
        seconds: that the command took.
    """

    content: dict[str, Any]
    began: dict[str, float]
    seconds: float

    def find_stage(self, moment: float) -> tuple[str, float]:
        """Return the stage that ran at a moment, and since when; "" before the first one."""
        began = {"": 0.0, **self.began}
        name = max((name for name in began if began[name] <= moment), key=began.__getitem__)
        return name, moment - began[name]


def make_workspace(folder: Path) -> Workspace:
    """Return a new folder with the short pipeline: its paths are relative, so all are alike."""
    folder.mkdir()
    content = yaml.safe_load((REPOSITORY / "configs/digits/pipeline.yaml").read_text())
    stages = content["stages"]
    for stage in stages:
        stage.pop("smoke", None)
        verb = next(key for key in stage if key not in ("name", "needs"))
        stage[verb] = {**stage[verb], **SHORTER.get(stage["name"], {})}
    (folder / FILE).write_text(yaml.safe_dump({"out": str(OUT), "stages": stages}))
    return Workspace(folder)


def run_undisturbed(folder: Path) -> Undisturbed:
    """Run the short pipeline in a new folder."""
    workspace = make_workspace(folder)
    began = time.time()
    workspace.rectify("run", FILE, "--jobs", 2)
    seconds = time.time() - began
    out = workspace.path / OUT
    begins = {name: one[0].begin - began for name, one in stage_attempts(out).items()}
    return Undisturbed(read_comparable(out), begins, seconds)


def wait_for(process: subprocess.Popen, out: Path, stage: str, seconds: float) -> bool:
    """Wait until a stage has begun a new attempt, and some seconds; return False if it is over."""
    folder = stage_folder(out, stage)
    before = len(list_records(folder))
    while stage and process.poll() is None and len(list_records(folder)) == before:
        time.sleep(0.002)
    moment = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < moment:
        time.sleep(0.002)
    return process.poll() is None


def kill(process: subprocess.Popen, mode: str) -> None:
    """Kill a `rectify run`, with or without its stages, or only a stage; all must end."""
    below = find_descendants(process.pid)
    stages = [pid for pid in below if is_rank(pid)]
    if mode == "group":
        os.killpg(process.pid, signal.SIGKILL)
    elif mode == "stage" and stages:
        os.kill(stages[0], signal.SIGKILL)
    else:
        process.kill()
    process.communicate(timeout=120)
    deadline = time.monotonic() + 10
    while any(process_start(pid) for pid in below):
        assert time.monotonic() < deadline, f"orphans: {below}"
        time.sleep(0.01)


def read_states(workspace: Workspace) -> dict[str, str]:
    """Return the state of each stage as `rectify status` prints it; none before the first run."""
    if not (workspace.path / OUT / "graph.json").exists():
        return {}
    lines = workspace.rectify("status", OUT).stdout.splitlines()[1:]
    return dict(line.split()[:2] for line in lines)


def run_chain(
    workspace: Workspace, expected: Undisturbed, seed: int, kills: int, jobs: int
) -> list[str]:
    """Run the short pipeline, killed at some moments; returns what was killed in which stage."""
    rng = random.Random(seed)
    moments = sorted(rng.uniform(0, expected.seconds) for _ in range(kills))
    out = workspace.path / OUT
    command = ("run", FILE, "--jobs", jobs)
    killed: set[tuple[str, int]] = set()
    hits = []
    for i, moment in enumerate(moments):
        stage, seconds = expected.find_stage(moment)
        mode = MODES[(seed + i) % len(MODES)]
        process = workspace.start(*command)
        if wait_for(process, out, stage, seconds):
            kill(process, mode)
        if process.returncode == 0:  # just before
            break
        hits.append(f"{mode} in {stage or 'start'} + {seconds:.1f} s")

        # what the records tell
        lost = {name for name, _ in find_open(out) - killed}
        states = read_states(workspace)
        assert process.returncode in (-signal.SIGKILL, 137), (mode, process.returncode)
        assert not lost or process.returncode == -signal.SIGKILL
        assert not ACTIVE & set(states.values()), states
        assert {states[name] for name in lost} <= {"lost"}, (lost, states)
        killed = find_open(out)

    # the end
    workspace.rectify(*command)
    assert_same(read_comparable(out), expected.content)
    assert_attempts(out, killed, {0, 137})
    assert set(read_states(workspace).values()) == {"finished"}
    assert workspace.rectify(*command).stderr.count("finished") == len(expected.began)
    return hits


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_killed_pipeline_ends_with_the_same_results(tmp_path, request, chronicle, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected = run_undisturbed(tmp_path / "undisturbed")
    kills = 20 if request.config.getoption("--long") else 3

    # chains of up to four kills
    began = time.monotonic()
    hits: list[str] = []
    chains = 0
    while len(hits) < kills:
        workspace = make_workspace(tmp_path / f"chain-{chains}")
        jobs = 2 - chains % 2
        hits += run_chain(workspace, expected, chains, min(4, kills - len(hits)), jobs)
        shutil.rmtree(workspace.path)
        chains += 1

    # the log of the campaign
    seeds = f"{chains} chains (seeds 0 to {chains - 1}) of {expected.seconds:.1f} s each"
    elapsed = time.monotonic() - began
    chronicle(f"run: {len(hits)} kills in {seeds}, {elapsed:.0f} s: identical")
    chronicle(f"    {'; '.join(hits)}")


# ---- each change of the records ----


def write_packs(folder: Path, size: int) -> Path:
    """Write a pipeline of two stages that pack the same few images."""
    images = folder / "images"
    for i in range(4):
        path = images / str(i % 2) / f"{i}.png"
        if path.exists():  # the set's plan has the times of its images
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(path)
    stages = []
    for name in ("first", "second"):
        options = {"images": str(images), "size": size, "out": f"{{out}}/{name}"}
        stages.append({"name": name, "pack": options})
    return write_pipeline(folder / "pipeline.yaml", stages)


class Packs:
    """A pipeline of two stages that is killed at one change of its records.

    Args:
        folder: a new folder.
        scenario: `new`; `resumed`, after a first kill in its first stage; `changed`, a finished
            one with other options.
    """

    def __init__(self, folder: Path, scenario: str):
        self.folder = folder
        self.out = folder / "out"
        self.scenario = scenario
        self.words: tuple[object, ...] = ("run", folder / "pipeline.yaml")
        if scenario == "changed":
            self.words += ("--force",)

    def prepare(self) -> None:
        """Make the pipeline's folder as it is before the command."""
        if self.out.exists():
            shutil.rmtree(self.out)
        write_packs(self.folder, 8)
        if self.scenario == "resumed":
            assert self.fork(35) == -signal.SIGKILL
            assert find_open(self.out)
        if self.scenario == "changed":
            assert self.fork(0) == 0
            write_packs(self.folder, 16)

    def fork(self, point: int) -> int | None:
        """Run the command, and return its exit code."""
        return fork_rectify(self.words, point, self.out, self.folder / "log.txt")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["new", "resumed", "changed"])
def test_a_run_killed_at_any_change_of_its_records(tmp_path, request, chronicle, scenario):
    packs = Packs(tmp_path, scenario)
    packs.prepare()
    before = read_comparable(packs.out) if scenario == "changed" else {}
    assert packs.fork(0) == 0
    expected = read_comparable(packs.out)
    for name, content in before.items():  # what other options made is kept
        stage, _, file = name.partition("/")
        if stage in ("first", "second"):
            assert expected[f"stages/{stage}/earlier/1/{stage}/{file}"] == content

    step = 1 if request.config.getoption("--long") else 11
    point = 1
    while True:
        # killed there
        packs.prepare()
        opened = find_open(packs.out)
        code = packs.fork(point)
        if code == 0:
            break
        assert code == -signal.SIGKILL, (packs.folder / "log.txt").read_text()
        killed = find_open(packs.out)
        facts = read_all(packs.out) if (packs.out / "graph.json").exists() else []
        states = {one.name: str(one.state) for one in facts}
        assert not ACTIVE & set(states.values()), (point, states)
        assert {states[name] for name, _ in killed - opened} <= {"lost"}, (point, states)
        assert opened <= killed

        # the same command again
        assert packs.fork(0) == 0, (point, (packs.folder / "log.txt").read_text())
        found = read_comparable(packs.out)
        assert_same(found, expected)
        assert_attempts(packs.out, killed, {0})
        assert {str(one.state) for one in read_all(packs.out)} == {"finished"}
        point += step
    assert point > 80
    chronicle(f"run, {scenario}: killed at each of {point - 1} changes of its records: identical")


@pytest.mark.slow
def test_runs_of_one_folder_wait_for_each_other(tmp_path):
    workspace = Workspace(tmp_path)
    words = ("run", write_packs(tmp_path, 8))
    out = tmp_path / "out"
    first = workspace.start(*words)
    wait_until(first, lambda: find_open(out))
    others = [workspace.start(*words) for _ in range(3)]
    for process in others:
        assert "waiting" in process.stderr.readline()

    # one that waits is killed, then the one that runs
    kill(others.pop(), "run")
    assert first.poll() is None
    states = {one.name: str(one.state) for one in read_all(out)}
    assert "running" in states.values()
    kill(first, "run")
    killed = find_open(out)
    assert len(killed) == 1

    # of the two others, one goes on, and then the other finds all finished
    texts = [process.communicate(timeout=120)[1] for process in others]
    assert [process.returncode for process in others] == [0, 0], texts
    assert sum("] second: finished" in text for text in texts) == 1, texts
    assert sum("] second: rectify pack" in text for text in texts) == 1, texts
    assert_attempts(out, killed, set())
