"""Faults around jobs on a real Slurm: bad input, kills, lost nodes, secrets."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from data.attempts import read_attempts
from deploy.launch.jobs import read_job
from tests.helpers.launched import fit_stage, write_pipeline

pytestmark = pytest.mark.service


def test_a_bad_configuration_is_not_tried_again(launched):
    bad = fit_stage(10, **{"optimizer.lrx": 1})
    after = {"name": "pack", "pack": {"out": "{out}/images"}}
    out = launched.path / "out"
    launched.launch(write_pipeline(launched.path, [bad, after]))
    launched.wait_for(out, "fit", "failed")
    launched.wait_for(out, "pack", "cancelled")
    details = " ".join(launched.details(out)["fit"])
    assert "exit code 2" in details
    assert "lrx" in details
    assert len(read_attempts(out / "stages/fit")) == 1
    assert launched.cluster.show(read_job(out / "stages/fit/job.json").id)["Restarts"] == "0"

    # The corrected pipeline works in the same folder.
    good = fit_stage(2)
    launched.launch(write_pipeline(launched.path, [good, after]))
    launched.wait_for(out, "pack", "finished")


SBATCH = """#!/bin/bash
# The real sbatch, around which the launch that started it is killed.
if [ "$1" != --parsable ]; then exec {sbatch} "$@"; fi
case "$POINT" in
    before) kill -9 "$PPID"; sleep 1; exit 1 ;;
    during) {sbatch} "$@" & kill -9 "$PPID"; wait ;;
    after) {sbatch} "$@"; kill -9 "$PPID" ;;
esac
"""


@pytest.mark.parametrize("point", ["before", "during", "after"])
def test_a_launch_that_is_killed_leaves_one_job(launched, point):
    out = launched.path / "out"
    stage = fit_stage(100_000)
    config = write_pipeline(launched.path, [stage])
    wrapper = launched.path / "bin/sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(SBATCH.replace("{sbatch}", shutil.which("sbatch")))
    wrapper.chmod(0o755)
    real = dict(launched.environment)
    launched.environment |= {"PATH": f"{wrapper.parent}:{real['PATH']}", "POINT": point}
    launched.launch(config, code=-9)
    assert read_job(out / "stages/fit/job.json").id == ""

    launched.environment = real
    launched.launch(config)
    job = read_job(out / "stages/fit/job.json").id
    assert launched.cluster.run("squeue", "--noheader", "--format=%i").split() == [job]
    assert launched.states(out)["fit"] in ("queued", "running")
    assert job in launched.launch(config)


def test_secrets_are_in_no_file_and_no_process_list(launched, tmp_path):
    secret = "s3cr3t-0123456789"
    file = tmp_path / "secrets.env"
    file.write_text(f"RECTIFY_TEST_KEY={secret}\n")
    file.chmod(0o600)
    stage = fit_stage(3000)
    resources = {"environment": ["RECTIFY_TEST_KEY"], "secrets": str(file)}
    launched.launch(write_pipeline(launched.path, [{**stage, "resources": resources}]))
    out = launched.path / "out"
    launched.wait(lambda: list((out / "fit").glob("metrics.jsonl")))

    # A process of the job has it; the list of processes has not.
    listed = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True).stdout
    assert secret not in listed
    environments = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environments.append(path.read_bytes())
        except OSError:
            continue  # the process has ended
    assert any(f"RECTIFY_TEST_KEY={secret}".encode() in text for text in environments)
    launched.rectify("cancel", out)
    launched.wait_for(out, "fit", "cancelled", "finished")

    # No file has it: of results, scripts, logs or Slurm.
    for folder in (launched.path, launched.cluster.folder):
        for path in folder.rglob("*"):
            if path.is_file() and path != file and not path.is_symlink():
                assert secret.encode() not in path.read_bytes(), path


def test_training_goes_on_with_one_node_after_the_other_is_lost(launched, tmp_path):
    """The order of samples and the draws are the same; losses differ by the order of sums alone."""
    stage = {**fit_stage(100_000, **{"metrics.every": 1}), "resources": {"nodes": "1-2"}}
    out = launched.path / "out"
    launched.launch(write_pipeline(launched.path, [stage]))
    launched.wait(lambda: list((out / "fit/checkpoints").glob("step=*")))
    launched.cluster.stop_node("n2")
    try:
        launched.wait(lambda: len(read_attempts(out / "fit")) == 2, 120)
        begin = read_attempts(out / "fit")[1].committed
        launched.wait(lambda: read_losses(out / "fit")[-1][0] > begin + 50)
    finally:
        launched.rectify("cancel", out)
        launched.cluster.start_node("n2")
    first, second = read_attempts(out / "fit")
    assert (first.world, second.world) == (2, 1)
    assert first.end is None or first.end.code == 4

    # The same on two processes all the time.
    graph = json.loads((out / "graph.json").read_text())
    words = graph["stages"][0]["words"]
    words[words.index("--out") + 1] = str(tmp_path / "whole")
    words[words.index("--trainer.max_steps") + 1] = str(begin + 50)
    launched.rectify("spread", "--processes", 2, "--", *words)
    reference = dict(read_losses(tmp_path / "whole"))
    compared = [
        (loss, reference[step])
        for step, loss in read_losses(out / "fit")
        if begin < step <= begin + 50
    ]
    assert len(compared) == 50
    assert all(loss == pytest.approx(whole, rel=1e-5) for loss, whole in compared)


def read_losses(run: Path) -> list[tuple[int, float]]:
    """Return the steps and losses in the whole lines of a run's log."""
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    values = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(line["step"], line["loss"]) for line in values]
