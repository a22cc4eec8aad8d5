"""Sharded training (FSDP2 on gloo): the same run as unsharded, resumed exactly, on any number of processes."""

import json
import resource
import shutil

import pytest
import torch

from models import teacher
from tests.distributed.runs import equal, final, fit

SHARDED = ("--trainer.devices", "2", "--trainer.strategy", "fsdp2")
STEPS = 12


def losses(run):
    """Return the losses of a run's steps."""
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def half(workspace, tmp_path_factory):
    """Return a run of two processes that stopped at an odd step."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    workspace.rectify(*fit(out, 7, *SHARDED), processes=2)
    return out


@pytest.fixture(scope="module")
def sharded_run(workspace, tmp_path_factory):
    """Return an undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("sharded") / "run"
    workspace.rectify(*fit(out, STEPS, *SHARDED), processes=2)
    return out


def test_its_checkpoint_is_a_folder_of_safetensors_and_nothing_is_pickled(sharded_run):
    path = teacher.newest(sharded_run)
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".pt", ".safetensors", ".safetensors"]
    assert len(list(path.parent.iterdir())) == 2  # the newest two are kept, and nothing temporary
    origin = teacher.read(path, tensors=False)["origin"]
    assert "max_steps: 12" in origin["config"] and origin["revision"] and origin["wandb"]


def test_it_resumes_exactly(workspace, half, sharded_run, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    workspace.rectify(*fit(tmp_path / "run", STEPS, *SHARDED), processes=2)
    assert equal(final(tmp_path / "run", STEPS), final(sharded_run, STEPS))
    assert losses(tmp_path / "run") == losses(sharded_run)


def test_it_goes_on_unsharded_in_one_process_and_back(workspace, half, sharded_run, tmp_path):
    shutil.copytree(half, tmp_path / "run")
    workspace.rectify(*fit(tmp_path / "run", 9))
    assert teacher.newest(tmp_path / "run").is_file()
    workspace.rectify(*fit(tmp_path / "run", STEPS, *SHARDED), processes=2)
    one, two = final(tmp_path / "run", STEPS), final(sharded_run, STEPS)
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one["ema"], two["ema"], rtol=1e-4, atol=1e-6)
    assert losses(tmp_path / "run") == pytest.approx(losses(sharded_run), rel=1e-5)


def test_one_command_makes_one_file_of_it(workspace, sharded_run):
    workspace.rectify("consolidate", "--run", sharded_run)
    one = sharded_run / "consolidated" / "step=000000012.safetensors"
    assert teacher.fingerprint(teacher.load(one)[0]) == teacher.fingerprint(teacher.load(sharded_run)[0])
    workspace.rectify("collect", "--teacher", one, "--out", sharded_run / "pairs", "--pairs", "64", "--steps", "2")


@pytest.mark.parametrize("damage", ["flip", "tear", "lose", "forge"])
def test_damage_is_named(workspace, half, tmp_path, damage):
    shutil.copytree(half, tmp_path / "run")
    path = teacher.newest(tmp_path / "run")
    victim = sorted(path.glob("*.safetensors"))[1]
    data = bytearray(victim.read_bytes())
    if damage == "lose":
        victim.unlink()
    elif damage == "forge":
        torch.save({"rectify": print}, path / "rest.pt")
    else:
        data[-9] ^= 1
        victim.write_bytes(data if damage == "flip" else data[:-9])
    with pytest.raises(
        ValueError, match=f"{path.name}: not a readable checkpoint .*{'rest.pt' if damage == 'forge' else victim.name}"
    ):
        teacher.read(path)


def test_a_full_disk_ends_all_ranks_cleanly(workspace, tmp_path):
    """The limit leaves room for the codec, not for a rank's part of a checkpoint of the whole network."""
    limit = (1_500_000, 1_500_000)
    words = ("fit", "--config", "configs/digits/teacher.yaml", "--out", tmp_path / "run", *SHARDED, "--trainer.logger", "false")
    often = ("--trainer.max_steps", "9", "--checkpoints.every", "2")
    process = workspace.start(*words, *often, processes=2, preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and err.count("exitcode  : 2") >= 1, err
    assert "step=000000002.ckpt: [Errno 27] File too large; make room and run the same command again" in err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_an_autoencoder_is_not_sharded(workspace, tmp_path):
    words = ("fit", "--config", "configs/digits/autoencoder.yaml", "--out", tmp_path, "--trainer.strategy", "fsdp2")
    failed = workspace.rectify(*words, "--trainer.devices", "1", code=2)
    assert "fsdp2 shards generators, not Autoencoder; use ddp" in failed.stderr
