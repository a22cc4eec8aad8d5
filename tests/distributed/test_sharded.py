"""Sharded training (FSDP2 on gloo): equal to unsharded training, and resumed exactly."""

import resource
import shutil

import pytest
import torch

from models.checkpoint import fingerprint, load_checkpoint, newest_checkpoint, read_checkpoint
from tests.distributed.runs import (
    CONFIG,
    assert_a_rank_names,
    assert_fails,
    equal,
    final_state,
    tiny_fit_words,
)
from tests.helpers.refusals import refused
from tests.helpers.training import config_words, losses

SHARDED = ("--trainer.devices", "2", "--trainer.strategy", "fsdp2")
STEPS = 12


@pytest.fixture(scope="module")
def stopped_run(workspace, tmp_path_factory):
    """Return a run of two processes that stopped at an odd step."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    workspace.rectify(*tiny_fit_words(out, 7, *SHARDED), processes=2)
    return out


@pytest.fixture(scope="module")
def sharded_run(workspace, tmp_path_factory):
    """Return an uninterrupted run of two processes."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    workspace.rectify(*tiny_fit_words(out, STEPS, *SHARDED), processes=2)
    return out


def test_saved_steps_are_folders_of_safetensors(sharded_run):
    path = newest_checkpoint(sharded_run)
    suffixes = sorted(file.suffix for file in path.iterdir())
    assert suffixes == [".json", ".pt", ".safetensors", ".safetensors"]


def test_the_newest_two_steps_are_kept_without_temporary_files(sharded_run):
    assert len(list((sharded_run / "checkpoints").iterdir())) == 2


def test_saved_steps_record_config_revision_and_wandb_run(sharded_run):
    origin = read_checkpoint(newest_checkpoint(sharded_run), tensors=False)["origin"]
    assert "max_steps: 12" in origin["config"]
    assert origin["revision"]
    assert origin["wandb"]


def test_it_resumes_exactly(workspace, stopped_run, sharded_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped_run, run)
    workspace.rectify(*tiny_fit_words(run, STEPS, *SHARDED), processes=2)
    assert equal(final_state(run, STEPS), final_state(sharded_run, STEPS))
    assert losses(run) == losses(sharded_run)


@pytest.mark.slow
def test_it_resumes_unsharded_in_one_process_and_sharded_again(
    workspace, stopped_run, sharded_run, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(stopped_run, run)
    workspace.rectify(*tiny_fit_words(run, 9))
    assert newest_checkpoint(run).is_file()
    workspace.rectify(*tiny_fit_words(run, STEPS, *SHARDED), processes=2)
    state = final_state(run, STEPS)
    expected = final_state(sharded_run, STEPS)
    for part in ("state_dict", "ema"):
        torch.testing.assert_close(state[part], expected[part], rtol=1e-4, atol=1e-6)
    assert losses(run) == pytest.approx(losses(sharded_run), rel=1e-5)


def test_consolidate_writes_one_file_with_the_same_weights(workspace, sharded_run):
    workspace.rectify("consolidate", "--run", sharded_run)
    file = sharded_run / "consolidated" / "step=000000012.safetensors"
    consolidated, *_ = load_checkpoint(file)
    sharded, *_ = load_checkpoint(sharded_run)
    assert fingerprint(consolidated) == fingerprint(sharded)
    out = sharded_run / "pairs"
    words = ("collect", "--teacher", file, "--out", out, "--pairs", "64", "--steps", "2")
    workspace.rectify(*words)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def cut_the_end(file):
    file.write_bytes(file.read_bytes()[:-9])


def remove(file):
    file.unlink()


def forge(file):
    torch.save({"rectify": print}, file)


SECOND_SHARD = "*.safetensors", 1
PICKLED_PART = "rest.pt", 0
DAMAGES = {
    "flip": (flip_a_bit, SECOND_SHARD),
    "tear": (cut_the_end, SECOND_SHARD),
    "lose": (remove, SECOND_SHARD),
    "forge": (forge, PICKLED_PART),
}


@pytest.mark.parametrize(("damage", "victim"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(stopped_run, tmp_path, damage, victim):
    shutil.copytree(stopped_run, tmp_path / "run")
    path = newest_checkpoint(tmp_path / "run")
    pattern, index = victim
    file = sorted(path.glob(pattern))[index]
    damage(file)
    with refused(path.name, file.name, kind=ValueError):
        read_checkpoint(path)


def limit_file_size():
    """Leave space for the codec, but not for a rank's part of the whole network's checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))


def test_a_full_disk_ends_all_ranks_cleanly(workspace, tmp_path):
    run = tmp_path / "run"
    process = workspace.start(
        *("fit", *config_words(CONFIG), "--out", run, *SHARDED, "--trainer.logger", "false"),
        *("--trainer.max_steps", "9", "--checkpoints.every", "2"),
        processes=2,
        preexec=limit_file_size,
    )
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    assert "exitcode  : 2" in err, err
    assert_a_rank_names(err, "step=000000002.ckpt", "[Errno 27] File too large")
    assert not list((run / "checkpoints").iterdir())


def test_sharding_is_only_for_generators(workspace, tmp_path):
    words = ("fit", "--config", "configs/digits/autoencoder.yaml", "--out", tmp_path)
    options = ("--trainer.strategy", "fsdp2", "--trainer.devices", "1")
    named = ("trainer.strategy", "fsdp2", "Autoencoder", "ddp")
    assert_fails(workspace, (*words, *options), *named)
