"""The digits' pipeline on a real Slurm of two nodes, with a preemption and a cancelled worker."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.attempts import read_attempts
from data.files import files_by_step
from deploy.launch.jobs import read_job
from tests.helpers.commands import REPOSITORY
from tests.helpers.launched import Launched, write_pipeline

pytestmark = pytest.mark.service

TEACHER = {
    "trainer.max_steps": 150,
    "checkpoints.every": 10,
    "metrics.every": 1,
    "preemption.every": 1,
    "trainer.logger": False,
}


def digits_stages() -> list[dict[str, Any]]:
    """Return the stages of the digits' pipeline, in short, on two nodes where that is possible."""
    stages = yaml.safe_load((REPOSITORY / "configs/digits/pipeline.yaml").read_text())["stages"]
    for stage in stages:
        verb = next(key for key in stage if key not in ("name", "needs", "smoke"))
        stage[verb] |= stage.pop("smoke", {})
        if verb == "fit":
            stage["resources"] = {"nodes": 2}
            stage["fit"]["trainer.logger"] = False
        if stage["name"] in ("encode", "collect"):
            stage["resources"] = {"array": 2}
        if stage["name"] == "teacher":
            stage["fit"] |= TEACHER
        if stage["name"] == "collect":
            stage["collect"] |= {"shard": 64, "steps": 16}
        if verb == "evaluate":
            stage["evaluate"] |= {"steps": [1, 2, 4, 8, 32]}
    return stages


@pytest.fixture(scope="module")
def digits(cluster, tmp_path_factory) -> dict[str, Any]:
    """Run the digits' pipeline on two nodes, with a preemption and a cancelled worker.

    Returns:
        `folder`, `out`, and what was seen on the way.
    """
    launched = Launched(cluster, tmp_path_factory.mktemp("digits"))
    out = launched.path / "out"
    config = write_pipeline(launched.path, digits_stages())
    found: dict[str, Any] = {"folder": launched, "out": out, "config": config}
    found["launch"] = launched.launch(config)
    found["first"] = launched.states(out)

    # Preempt the teacher in the middle of its training.
    log = out / "teacher/metrics.jsonl"
    launched.wait(lambda: log.exists() and log.read_text().count("\n") > 30, 180)
    found["training"] = launched.details(out)
    job = read_job(out / "stages/teacher/job.json").id
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(job, "PENDING", timeout=60)
    found["preempted"] = launched.states(out)
    found["step"] = read_attempts(out / "teacher")[0].end.committed

    # Cancel one of two workers as soon as they work.
    workers = out / "stages/collect/workers.json"
    launched.wait(lambda: list((out / "pairs").glob("*.json")), 180)
    found["collecting"] = launched.states(out)
    cluster.run("scancel", f"{read_job(workers).id}_1")

    # Wait for the end.
    launched.wait(lambda: set(launched.states(out).values()) == {"finished"}, 240)
    return found


def test_the_whole_graph_is_submitted_at_once(digits):
    assert digits["launch"].count("slurm job") == 10
    assert digits["first"].pop("pack") in ("queued", "running")
    assert set(digits["first"].values()) == {"queued"}


def test_status_is_right_at_every_moment(digits):
    training = digits["training"]
    assert training["teacher"][0] == "running"
    assert re.search(r"\d+/150 steps, .* left, loss [\d.]+", " ".join(training["teacher"]))
    assert [training[name][0] for name in ("pack", "autoencoder", "encode")] == ["finished"] * 3
    assert training["collect"][:3] == ["queued", "needs", "teacher;"]
    assert digits["preempted"]["teacher"] == "queued"
    assert digits["collecting"]["collect"] == "running"
    assert digits["collecting"]["teacher"] == "finished"


def test_the_export_opens_in_diffusers(digits):
    from diffusers import DiffusionPipeline

    assert DiffusionPipeline.from_pretrained(digits["out"] / "export")


def test_attempts_record_nodes_and_the_preemption(digits):
    first, second = read_attempts(digits["out"] / "teacher")
    assert first.end.code == 75
    assert second.end.code == 0
    assert first.world == second.world == 2
    assert first.hosts == second.hosts == ["n1", "n2"]
    assert first.engine == "slurm"
    assert second.job == f"{first.job}.1"
    assert 30 <= first.end.committed == second.committed == digits["step"] < 150


def run_by_hand(digits: dict[str, Any], *words: object) -> None:
    """Run a command without Slurm, in the pipeline's folder."""
    folder = digits["folder"]
    process = [sys.executable, "-P", "-m", "deploy", *map(str, words)]
    environment = {**folder.environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(process, cwd=folder.path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def stage_words(digits: dict[str, Any], name: str, out: Path) -> list[str]:
    """Return the words of a stage's command, with another folder for its results."""
    graph = json.loads((digits["out"] / "graph.json").read_text())
    words = next(stage["words"] for stage in graph["stages"] if stage["name"] == name)
    words[words.index("--out") + 1] = str(out)
    return words


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the weights in a run's newest checkpoint."""
    path = files_by_step(run / "checkpoints", ".ckpt")[-1]
    return torch.load(path, weights_only=True)["state_dict"]


def test_preempted_training_gives_the_undisturbed_weights(digits, tmp_path):
    words = stage_words(digits, "teacher", tmp_path / "teacher")
    run_by_hand(digits, "spread", "--processes", 2, "--", *words)
    preempted = last_weights(digits["out"] / "teacher")
    undisturbed = last_weights(tmp_path / "teacher")
    assert preempted.keys() == undisturbed.keys()
    assert all(torch.equal(preempted[name], undisturbed[name]) for name in preempted)


def test_a_cancelled_worker_changes_no_byte_of_the_set(digits, tmp_path):
    run_by_hand(digits, *stage_words(digits, "collect", tmp_path / "pairs"))
    files = sorted((tmp_path / "pairs").glob("*.tar"))
    assert len(files) > 4
    for file in files:
        assert file.read_bytes() == (digits["out"] / "pairs" / file.name).read_bytes()


def test_a_finished_pipeline_is_not_submitted_again(digits):
    assert "finished" in digits["folder"].launch(digits["config"])
    assert "job" not in digits["folder"].launch(digits["config"])
