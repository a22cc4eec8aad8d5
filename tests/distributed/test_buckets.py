"""Training on buckets in real processes: kills and numbers of processes change nothing."""

import os
import signal

import pytest

from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.distributed.processes import find_descendants, wait_until
from tests.distributed.runs import equal
from tests.helpers.bucketed import write_set
from tests.helpers.commands import Workspace
from tests.helpers.training import fit_words, log_lines, losses, small_config, spec

STEPS = 60  # 16 cycles of 15 batches are 4 epochs


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    """A folder with a set of three buckets and a held-out one, in which commands run."""
    folder = tmp_path_factory.mktemp("bucketed")
    write_set(folder / "train")
    write_set(folder / "heldout", sizes=((8, 8, 8), (12, 8, 8)))
    return Workspace(folder)


def bucketed_words(workspace, out, processes=1, *more):
    """Return the words of a tiny run on buckets."""
    train = spec("Images", path=str(workspace.path / "train"))
    content = small_config(train, batch=4)
    content["data"]["heldout"] = spec("Images", path=str(workspace.path / "heldout"))
    content["data"]["heldout_batches"] = 1
    content["trainer"] |= {"max_steps": STEPS, "val_check_interval": 20, "devices": processes}
    content["trainer"]["callbacks"] = [spec("EMA", decay=0.9)]
    if processes > 1:
        content["trainer"]["strategy"] = "ddp"
    content["checkpoints"] = {"every": 5}
    content["metrics"] = {"every": 1}
    return fit_words(content, out, *more)


def read_state(run):
    """Return what training resumes from, from the last checkpoint."""
    checkpoint = read_checkpoint(newest_checkpoint(run), resume=True)
    assert checkpoint["global_step"] == STEPS
    return {key: checkpoint[key] for key in ("state_dict", "ema", "optimizer_states")}


def kill_after_a_checkpoint(workspace, words, out, processes):
    """Start a command, and kill all its processes after its first checkpoint."""
    process = workspace.start(*words, processes=processes)
    wait_until(process, lambda: list((out / "checkpoints").glob("step=*")))
    for pid in [process.pid, *find_descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, "it had ended before the kill"
    assert read_checkpoint(newest_checkpoint(out))["global_step"] < STEPS


@pytest.fixture(scope="module")
def uninterrupted(bucketed, tmp_path_factory):
    """Runs that were not killed, by their number of processes."""
    runs = {}
    for processes in (1, 2):
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        bucketed.rectify(*bucketed_words(bucketed, out, processes), processes=processes)
        runs[processes] = out
    return runs


def heldout_losses(run):
    """Return the losses of all held-out samples, and of each bucket, in the order of the steps."""
    found = []
    for line in log_lines(run):
        found += [value for name, value in line.items() if name.startswith("heldout_loss")]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_to_the_same_weights_and_losses(
    bucketed, uninterrupted, tmp_path, processes
):
    """It reads in a worker, which changes nothing."""
    out = tmp_path / "run"
    words = bucketed_words(bucketed, out, processes, "--data.workers", 1)
    kill_after_a_checkpoint(bucketed, words, out, processes)
    bucketed.rectify(*words, processes=processes)
    assert equal(read_state(out), read_state(uninterrupted[processes]))
    assert losses(out) == losses(uninterrupted[processes])
    assert heldout_losses(out) == heldout_losses(uninterrupted[processes])


@pytest.mark.slow
def test_losses_do_not_depend_on_the_number_of_processes(uninterrupted):
    """Only the order of sums differs."""
    assert len(losses(uninterrupted[1])) == STEPS
    assert len(heldout_losses(uninterrupted[1])) == 3 * 3
    for found in (losses, heldout_losses):
        assert found(uninterrupted[2]) == pytest.approx(found(uninterrupted[1]), rel=1e-5)
