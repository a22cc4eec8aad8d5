"""Inverted pairs: the teacher maps the stored noise back to the real latent."""

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
from tests.helpers.commands import Workspace
from tests.helpers.refusals import refused
from tests.helpers.results import list_results, read_results
from tests.helpers.teachers import SHAPE, save_teacher, small_denoiser
from trainer.jobs.collect import collect
from trainer.jobs.invert import invert
from trainer.jobs.options import SamplingOptions

COUNT = 40
SETTINGS = {"steps": 16, "sampler": "RungeKutta4", "shard": 8, "batch": 5}


def latent(i):
    """Return the i-th real latent, rounded to the precision in which it is stored."""
    return noise(9, i, SHAPE).half().float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher of three classes, latents of these classes, and the inverted pairs."""
    folder = tmp_path_factory.mktemp("invert")
    save_teacher(folder / "teacher", small_denoiser())
    writer = ShardWriter(folder / "latents", "latents", {"classes": ["a", "b", "c"]}, COUNT, 16)
    for number in writer.numbers():
        samples = []
        for i in writer.indices(number):
            samples.append(latent_sample(f"{i:09d}", noise(9, i, SHAPE), i * i % 3))
        writer.write(number, samples)
    assert writer.finish(shape=list(SHAPE))
    invert(folder / "teacher", folder / "latents", folder / "inverted", **SETTINGS)
    return folder


def test_the_same_sampler_maps_the_noises_back_to_the_latents(folder):
    pairs = Pairs(str(folder / "inverted"), keep_fraction=1.0)
    batch = pairs.read(np.arange(COUNT))
    assert torch.equal(batch.x, torch.stack([latent(i) for i in range(COUNT)]))
    assert batch.condition.tolist() == [i * i % 3 for i in range(COUNT)]

    again = RungeKutta4(16)(small_denoiser(), batch.noise, batch.condition)
    torch.testing.assert_close(again, batch.x, rtol=0, atol=0.02)

    # The test has power: the teacher moves its samples, and the class matters.
    assert (batch.noise - batch.x).abs().max() > 0.5, "a teacher that moves nothing tests nothing"
    other = RungeKutta4(16)(small_denoiser(), batch.noise, (batch.condition + 1) % 3)
    assert (other - batch.x).abs().max() > 0.1, "the class must be stored with its latent"


def test_the_manifest_records_the_inversion_and_its_teacher(folder):
    manifest = PairSet(folder / "inverted").manifest
    assert manifest["noise"] == "inverted"
    assert manifest["store_noise"]
    assert manifest["guidance"] == 1.0
    assert manifest["sampler"] == "RungeKutta4"
    assert len(manifest["teacher"]) == 64
    assert len(manifest["latents"]) == 64


def test_another_teacher_is_refused(folder):
    with refused("teacher", "another"):
        Pairs(str(folder / "inverted")).check_provenance("teacher", "another")


def test_they_mix_with_pairs_of_the_teacher(folder):
    collect(folder / "teacher", folder / "pairs", pairs=COUNT, steps=2, shard=8, batch=8)
    sources = [Pairs(str(folder / "pairs")), Pairs(str(folder / "inverted"))]
    batch = Mixed(sources, [3, 1]).take(0, 0, 48)
    assert batch.paired.all()
    real = {latent(i).numpy().tobytes() for i in range(COUNT)}
    assert sum(x.numpy().tobytes() in real for x in batch.x) == 12


def test_two_processes_write_the_same_bytes(folder, tmp_path):
    """Two processes that are not connected share the shards by claims."""
    words = ["invert", "--teacher", folder / "teacher", "--latents", folder / "latents"]
    words += ["--out", tmp_path / "two", "--lease", "30"]
    for key, value in SETTINGS.items():
        words += [f"--{key}", value]
    processes = [Workspace(tmp_path).start(*words) for _ in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    for name, content in read_results(folder / "inverted").items():
        assert (tmp_path / "two" / name).read_bytes() == content, name
    assert len(list_results(tmp_path / "two")) == 3 * 5 + 2


def test_a_second_run_writes_only_the_missing_shards(folder, tmp_path):
    before = read_results(folder / "inverted")
    for name in before.keys() - {"000002.json", "manifest.json"}:
        (tmp_path / name).write_bytes(before[name])
    stamp = (tmp_path / "000001.tar").stat().st_mtime_ns
    invert(folder / "teacher", folder / "latents", tmp_path, **SETTINGS)
    assert read_results(tmp_path) == before
    assert (tmp_path / "000001.tar").stat().st_mtime_ns == stamp


def test_latents_with_more_classes_than_the_teacher_are_refused(folder, tmp_path):
    save_teacher(tmp_path / "two", small_denoiser(2), ClassLabel(2))
    with refused("latents", 3, tmp_path / "two", 2):
        invert(tmp_path / "two", folder / "latents", tmp_path / "out")


def test_other_settings_than_those_of_the_folder_are_refused(folder):
    inputs = (folder / "teacher", folder / "latents", folder / "inverted")
    with refused("guidance", 1.0, 2.0):
        invert(*inputs, **SETTINGS, sampling=SamplingOptions(guidance=2.0))


def test_a_batch_below_one_is_refused(folder, tmp_path):
    with refused("batch", 0, 1):
        invert(folder / "teacher", folder / "latents", tmp_path / "out", batch=0)


def test_an_unconditional_teacher_drops_the_classes(folder, tmp_path):
    save_teacher(tmp_path / "none", small_denoiser(0), Unconditional())
    invert(tmp_path / "none", folder / "latents", tmp_path / "out", steps=1)
    assert Pairs(str(tmp_path / "out")).read(np.arange(3)).condition is None
    assert read_json(tmp_path / "out" / "manifest.json")["noise"] == "inverted"
