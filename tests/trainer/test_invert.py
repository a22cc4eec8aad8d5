"""Inverted pairs: the teacher draws the real latent again from the noise that is stored with it."""

import numpy as np
import pytest
import torch

from data.files import read_json
from data.latents import latent_sample
from data.mixed import Mixed
from data.noise import noise
from data.pairs import Pairs, PairSet
from data.shards import ShardWriter
from models.condition import ClassLabel, Unconditional
from models.sampler import RungeKutta4
from tests.conftest import Workspace
from tests.teachers import SHAPE, denoiser, saved
from trainer.collect import collect
from trainer.invert import invert

COUNT = 40
SETTINGS = {"steps": 16, "sampler": "RungeKutta4", "shard": 8, "batch": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher of three classes, and latents of theirs."""
    folder = tmp_path_factory.mktemp("invert")
    saved(folder / "teacher", denoiser())
    writer = ShardWriter(folder / "latents", "latents", {"classes": ["a", "b", "c"]}, COUNT, 16)
    for number in writer.numbers():
        rows = writer.indices(number)
        writer.write(number, [latent_sample(f"{i:09d}", noise(9, i, SHAPE), i * i % 3) for i in rows])
    assert writer.finish(shape=list(SHAPE))
    invert(folder / "teacher", folder / "latents", folder / "inverted", **SETTINGS)
    return folder


def test_the_same_sampler_draws_the_latents_again(place):
    pairs = Pairs(str(place / "inverted"), keep=1.0)
    batch = pairs.read(np.arange(COUNT))
    assert torch.equal(batch.x, torch.stack([noise(9, i, SHAPE).half().float() for i in range(COUNT)]))
    assert batch.condition.tolist() == [i * i % 3 for i in range(COUNT)]
    again = RungeKutta4(16)(denoiser(), batch.noise, batch.condition)  # its last step, which is DDIM's, is the least exact
    torch.testing.assert_close(again, batch.x, rtol=0, atol=0.02)
    assert (batch.noise - batch.x).abs().max() > 0.5, "a teacher that moves nothing tests nothing"
    other = RungeKutta4(16)(denoiser(), batch.noise, (batch.condition + 1) % 3)
    assert (other - batch.x).abs().max() > 0.1, "the class travels with its latent"


def test_the_manifest_says_that_they_are_inverted_and_by_whom(place):
    manifest = PairSet(place / "inverted").manifest
    assert manifest["noise"] == "inverted" and manifest["store_noise"] and manifest["guidance"] == 1.0
    assert manifest["sampler"] == "RungeKutta4" and len(manifest["teacher"]) == len(manifest["latents"]) == 64
    with pytest.raises(ValueError, match="collected with teacher"):
        Pairs(str(place / "inverted")).agree("teacher", "another")


def test_they_mix_with_collected_pairs(place):
    collect(place / "teacher", place / "pairs", pairs=COUNT, steps=2, shard=8, batch=8)
    batch = Mixed([Pairs(str(place / "pairs")), Pairs(str(place / "inverted"))], [3, 1]).take(0, 0, 48)
    assert batch.paired.all()
    real = {noise(9, i, SHAPE).half().float().numpy().tobytes() for i in range(COUNT)}
    assert sum(x.numpy().tobytes() in real for x in batch.x) == 12


def test_two_processes_give_the_same_bytes(place, tmp_path):
    """Two that know nothing of each other and share the shards by claims."""
    words = [word for key, value in SETTINGS.items() for word in (f"--{key}", str(value))]
    words = ["invert", "--teacher", place / "teacher", "--latents", place / "latents", "--out", tmp_path / "two", *words]
    processes = [Workspace(tmp_path).start(*words, "--lease", "30") for _ in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for path in (place / "inverted").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((tmp_path / "two").iterdir())) == 3 * 5 + 2


def test_inverting_again_goes_on_where_it_was(place, tmp_path):
    before = {path.name: path.read_bytes() for path in (place / "inverted").iterdir()}
    for name in before.keys() - {"000002.json", "manifest.json"}:
        (tmp_path / name).write_bytes(before[name])
    stamp = (tmp_path / "000001.tar").stat().st_mtime_ns
    invert(place / "teacher", place / "latents", tmp_path, **SETTINGS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert (tmp_path / "000001.tar").stat().st_mtime_ns == stamp


def test_what_does_not_belong_together_is_refused(place, tmp_path):
    saved(tmp_path / "two", denoiser(2), ClassLabel(2))
    with pytest.raises(ValueError, match=r"latents has 3 classes, .*two knows 2"):
        invert(tmp_path / "two", place / "latents", tmp_path / "out")
    with pytest.raises(ValueError, match="guidance is 1.0 there and 2.0 here"):
        invert(place / "teacher", place / "latents", place / "inverted", **SETTINGS, guidance=2.0)
    with pytest.raises(ValueError, match="batch: 0, it must be at least 1"):
        invert(place / "teacher", place / "latents", tmp_path / "out", batch=0)
    saved(tmp_path / "none", denoiser(0), Unconditional())
    invert(tmp_path / "none", place / "latents", tmp_path / "out", steps=1)
    assert Pairs(str(tmp_path / "out")).read(np.arange(3)).condition is None
    assert read_json(tmp_path / "out" / "manifest.json")["noise"] == "inverted"
