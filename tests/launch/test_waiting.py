"""Jobs of a real Slurm that wait: what later commands, and others' folders, do to them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launched import Launched, fit_stage, write_pipeline

pytestmark = pytest.mark.service
LATER = {"engines": {"slurm": {"options": ["--begin=now+1hour"]}}}


@pytest.fixture
def waiting(launched) -> Launched:
    """Return a folder from which a job was launched that waits for an hour."""
    launched.launch(pipeline(launched))
    return launched


def pipeline(launched: Launched, steps: int = 10, **resources: Any) -> Path:
    """Write the pipeline of a training that waits."""
    stage = {**fit_stage(steps), "resources": {**LATER, **resources}}
    return write_pipeline(launched.path, [stage])


def jobs(launched: Launched) -> list[str]:
    """Return the ids of all jobs that wait or run."""
    return launched.cluster.run("squeue", "--noheader", "--format=%i").split()


def test_a_waiting_job_is_adopted(waiting):
    (job,) = jobs(waiting)
    assert job in waiting.launch(pipeline(waiting))
    assert jobs(waiting) == [job]


@pytest.mark.parametrize(
    ("steps", "resources", "named"),
    [(20, {}, "T_max"), (10, {"cpus": 2}, "resources.cpus")],
)
def test_a_waiting_job_of_other_settings_is_not_adopted(waiting, steps, resources, named):
    before = jobs(waiting)
    refusal = waiting.launch(pipeline(waiting, steps, **resources), code=2)
    assert named in refusal
    assert "rectify cancel" in refusal
    assert jobs(waiting) == before

    # Cancelled first, it is launched with the new settings.
    waiting.rectify("cancel", waiting.path / "out")
    waiting.launch(pipeline(waiting, steps, **resources))
    assert len(jobs(waiting)) == 1
    assert jobs(waiting) != before


def test_a_copied_folder_has_no_job(waiting):
    shutil.copytree(waiting.path / "out", waiting.path / "copy")
    (job,) = jobs(waiting)
    waiting.rectify("cancel", waiting.path / "copy")
    assert jobs(waiting) == [job]
    assert waiting.states(waiting.path / "copy")["fit"] != "queued"
    waiting.launch(pipeline(waiting), "--out", waiting.path / "copy")
    assert len(jobs(waiting)) == 2


def test_variables_of_the_shell_change_nothing(waiting):
    """Those of another job, in which a user launches, and those of Slurm's commands."""
    (job,) = jobs(waiting)
    variables = ("SQUEUE_PARTITION", "SCANCEL_STATE", "SBATCH_EXPORT", "SBATCH_NO_REQUEUE")
    waiting.environment |= dict.fromkeys(variables, "other")
    waiting.environment |= {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "0"}
    assert waiting.states(waiting.path / "out") == {"fit": "queued"}
    assert job in waiting.launch(pipeline(waiting))
    assert jobs(waiting) == [job]
    waiting.rectify("cancel", waiting.path / "out")
    assert jobs(waiting) == []
    waiting.launch(pipeline(waiting))
    (later,) = jobs(waiting)
    assert waiting.cluster.show(later)["Requeue"] == "1"


def test_a_stopped_job_that_waited_is_stopped(waiting):
    waiting.rectify("cancel", waiting.path / "out", "--stop")
    waiting.wait_for(waiting.path / "out", "fit", "stopped")


def test_nothing_is_started_on_this_host_beside_a_job(waiting):
    before = jobs(waiting)
    for words in (("run",), ("launch", "--on", "local")):
        verb, *options = words
        refusal = waiting.rectify(verb, pipeline(waiting), *options, code=2)
        assert "fit" in refusal
        assert refusal.count("\n") == 1
    assert jobs(waiting) == before
