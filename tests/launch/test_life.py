"""One training job on a real Slurm, through a controller that is away, scancel, cancel, stop."""

import time
from typing import Any

import pytest

from data.attempts import read_attempts
from data.intent import read_intent
from deploy.launch.jobs import read_job
from tests.helpers.launched import Launched, fit_stage, write_pipeline

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def life(cluster, tmp_path_factory) -> dict[str, Any]:
    """Let a training job live through a controller that is away, scancel, cancel and stop.

    Returns:
        `out`, the job's `id`, and what was found after each.
    """
    launched = Launched(cluster, tmp_path_factory.mktemp("life"))
    config = write_pipeline(launched.path, [fit_stage(100_000)])
    out = launched.path / "out"
    found: dict[str, Any] = {"out": out}
    launched.launch(config)
    found["id"] = read_job(out / "stages/fit/job.json").id
    launched.wait(lambda: list((out / "fit/checkpoints").glob("step=*")))

    # The controller is away.
    cluster.stop_controller()
    try:
        found["away"] = launched.states(out)
        found["launched away"] = launched.launch(config, code=2)
        found["run away"] = launched.rectify("run", config, code=2)
    finally:
        cluster.start_controller()
    found["back"] = launched.states(out)
    found["run beside"] = launched.rectify("run", config, code=2)
    found["listed"] = cluster.run("squeue", "--noheader", "--format=%i")

    # Slurm's own command cancels the job.
    cluster.run("scancel", found["id"])
    launched.wait_for(out, "fit", "cancelled")
    time.sleep(8)  # a requeued job would wait 6 s
    found["scancelled"] = launched.states(out)

    # Launched again it goes on, until somebody writes that it is not wanted.
    launched.launch(config)
    launched.wait(lambda: len(read_attempts(out / "fit")) == 2)
    (out / "stages/fit/intent.json").write_text('{"want": "stop"}')
    launched.wait_for(out, "fit", "stopped")
    found["written"] = read_attempts(out / "stages/fit")[-1].end.code

    # `rectify cancel --stop`, and `rectify cancel`.
    for name, words in (("stopped", ["--stop"]), ("cancelled", [])):
        before = len(read_attempts(out / "fit"))
        launched.launch(config)
        launched.wait(lambda before=before: len(read_attempts(out / "fit")) > before)
        found[f"{name} job"] = read_job(out / "stages/fit/job.json").id
        found[f"{name} printed"] = launched.rectify("cancel", out, *words)
        found[f"{name} intent"] = read_intent(out / "stages/fit").want
        found[f"{name} at once"] = launched.states(out)["fit"]
        launched.wait_for(out, "fit", name)
    found["listed at last"] = cluster.run("squeue", "--noheader", "--format=%i")
    return found


def test_nothing_is_done_while_the_controller_is_away(life):
    assert life["away"] == {"fit": "unknown"}
    for printed in (life["launched away"], life["run away"]):
        assert printed.count("\n") == 1
        assert "unknown" in printed
    assert life["back"] == {"fit": "running"}
    assert life["listed"] == life["id"]


def test_a_stage_of_a_job_is_not_run_beside_it(life):
    assert life["run beside"].count("\n") == 1
    assert "n1" in life["run beside"]


def test_a_job_that_slurm_cancelled_stays_cancelled(life):
    assert life["scancelled"] == {"fit": "cancelled"}
    assert read_attempts(life["out"] / "fit")[0].end.code == 75


@pytest.mark.parametrize(("name", "want"), [("stopped", "stop"), ("cancelled", "cancel")])
def test_cancel_writes_what_is_wanted(life, name, want):
    assert life[f"{name} job"] in life[f"{name} printed"]
    assert life[f"{name} intent"] == want
    assert life[f"{name} at once"] in ("stopping", name)
    assert life["listed at last"] == ""


def test_an_intent_by_hand_lets_a_job_save(life):
    assert life["written"] == 75


def test_a_job_that_is_launched_again_goes_on(life):
    attempts = read_attempts(life["out"] / "fit")
    assert [one.end.code for one in attempts] == [75, 75, 75, 75]
    for before, after in zip(attempts, attempts[1:]):
        assert after.committed == before.end.committed > 0
