"""Pairs with a guidance scale each, and students that are conditioned on the scale."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.latents import Latents, latent_sample
from data.mixed import Mixed
from data.noise import guidance_scales, noise
from data.pairs import Pairs
from data.shards import ShardWriter
from models import guidance as guidances
from models.checkpoint import load_checkpoint
from models.condition import ClassLabel
from models.guidance import GuidanceConditioned, Guided, with_guidance
from models.sampler import DDIM
from tests.helpers.refusals import refused
from tests.helpers.teachers import SHAPE, save_teacher, small_denoiser
from trainer.jobs.collect import collect
from trainer.jobs.options import SamplingOptions
from trainer.module import Generator
from trainer.objectives import Matching, Objective
from trainer.step_random import StepRandom

COUNT = 24
RANGE = [1.0, 4.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, six real latents, and pairs: a scale each, all at scale 3, without guidance."""
    folder = tmp_path_factory.mktemp("scales")
    run = save_teacher(folder / "teacher", small_denoiser())
    settings = {"pairs": COUNT, "steps": 2, "seed": 5, "shard": 8}
    collect(run, folder / "ranged", **settings, guidance_max=4.0, batch=3)
    collect(run, folder / "fixed", **settings, sampling=SamplingOptions(guidance=3.0))
    collect(run, folder / "plain", **settings)
    writer = ShardWriter(folder / "latents", "latents", {"classes": ["a", "b", "c"]}, 6, 6)
    writer.write(0, [latent_sample(f"{i:09d}", noise(9, i, SHAPE), i % 3) for i in range(6)])
    assert writer.finish()
    return folder


@pytest.fixture
def ranged(folder):
    return Pairs(str(folder / "ranged"), guidance=RANGE, keep_fraction=1.0)


@pytest.fixture
def fixed(folder):
    return Pairs(str(folder / "fixed"), guidance=3.0)


@pytest.fixture
def plain(folder):
    return Pairs(str(folder / "plain"))


@pytest.fixture
def latents(folder):
    return Latents(str(folder / "latents"))


# Data


def test_scales_fill_their_range():
    found = guidance_scales(5, range(2000), 1.0, 4.0)
    assert found.min() >= 1
    assert found.max() <= 4
    assert abs(found.mean() - 2.5) < 0.06


def test_scales_are_keyed_by_seed_and_index():
    found = guidance_scales(5, range(2000), 1.0, 4.0)
    assert torch.equal(found[70:75], guidance_scales(5, range(70, 75), 1.0, 4.0))
    assert not torch.equal(found, guidance_scales(6, range(2000), 1, 4))


def test_each_pair_is_sampled_at_the_scale_that_it_records(ranged):
    batch = ranged.read(np.arange(COUNT)[::-1].copy())
    assert torch.equal(batch.guidance, guidance_scales(5, range(COUNT), 1.0, 4.0).flip(0))
    assert batch.guidance.dtype == torch.float32
    assert ranged.manifest["guidance"] == RANGE
    for i in (0, 7, 23):
        one = slice(i, i + 1)
        denoiser = Guided(small_denoiser(), batch.guidance[i].item())
        x = DDIM(2)(denoiser, batch.noise[one], batch.condition[one])
        torch.testing.assert_close(x[0], batch.x[i], rtol=2e-3, atol=2e-3)


def test_pairs_of_another_range_are_refused(folder):
    with refused("guidance", RANGE, 1.0):
        Pairs(str(folder / "ranged"))


def test_scales_survive_mixing_and_other_data_have_scale_one(ranged, plain, latents):
    batch = Mixed([ranged, latents, plain], [2, 1, 1]).take(0, 3, 16)
    assert (batch.guidance == 1).sum() == 8
    assert batch.to(torch.device("cpu")).guidance is batch.guidance
    for x, scale, paired in zip(batch.noise, batch.guidance, batch.paired):
        if scale != 1:
            index = [i for i in range(COUNT) if torch.equal(noise(5, i, SHAPE), x)]
            assert scale == guidance_scales(5, index, 1.0, 4.0)[0]
            assert paired


def test_recorded_scales_do_not_mix_with_pairs_of_one_other_scale(ranged, fixed):
    with refused("Mixed", RANGE, 3.0):
        Mixed([ranged, fixed], [1, 1])


def test_a_mixture_without_recorded_scales_has_none(plain, latents):
    assert Mixed([plain, latents], [1, 1]).take(0, 0, 4).guidance is None


def test_an_empty_range_is_refused(tmp_path):
    with refused("guidance_max", 1.0, "guidance"):
        collect(tmp_path, tmp_path, guidance_max=1.0)


# Training


class RecordingObjective(Objective):
    """Matching that keeps the arguments of its last call."""

    def __call__(self, denoiser, x, eps, cond=None, random=None):
        self.given = denoiser, x, eps, cond
        return Matching()(denoiser, x, eps, cond, random)


def test_the_student_is_conditioned_on_the_scale_of_every_sample(ranged):
    student = small_denoiser(guidance_embedded=True).requires_grad_(True)
    objective = RecordingObjective()
    module = Generator(student, objective, ClassLabel(3))
    batch = replace(ranged.read(np.arange(8)), size=8)
    module.training_step(batch, 0)["loss"].backward()
    conditioned, x, eps, cond = objective.given

    # The objective's denoiser is the student with the batch's scales.
    t = torch.linspace(0.1, 0.9, 8)
    found = conditioned(x, t, cond)[0]
    assert torch.equal(found, student(x, t, cond, w=batch.guidance)[0])
    assert not torch.equal(found, student(x, t, cond)[0])
    assert conditioned.interpolant is student.interpolant
    assert conditioned.prediction is student.prediction
    assert not conditioned.two_time
    assert student.net.guidance_embedder.fc2.weight.grad.abs().sum() > 0

    # Without scales it is the student itself.
    module.loss(Batch(x, True, seed=0, size=8), StepRandom(batch), cond)
    assert objective.given[0] is student


def test_scales_that_the_network_does_not_read_are_refused(ranged):
    module = Generator(small_denoiser(), condition=ClassLabel(3))
    with refused("data.source", ranged.path, 1, 4, "model.denoiser.net.guidance_embedded"):
        module.check_data(ranged)


def test_a_conditioned_student_records_the_range_of_its_pairs(ranged, plain):
    module = Generator(small_denoiser(guidance_embedded=True), condition=ClassLabel(3))
    module.check_data(ranged)
    module.check_data(plain)
    assert module.spec["guidance"] == RANGE


def test_another_student_records_the_scale_of_its_pairs(fixed):
    module = Generator(small_denoiser(), condition=ClassLabel(3))
    module.check_data(fixed)
    assert module.spec["guidance"] == 3.0


# Sampling


def test_a_conditioned_student_needs_one_evaluation_instead_of_two():
    plain = with_guidance(small_denoiser(), 3.0)
    conditioned = with_guidance(small_denoiser(guidance_embedded=True), 3.0)
    assert isinstance(plain, Guided)
    assert DDIM(4).nfe(plain) == 8
    assert isinstance(conditioned, GuidanceConditioned)
    assert DDIM(4).nfe(conditioned) == 4


@pytest.mark.parametrize("guidance_embedded", [True, False], ids=["conditioned", "two evaluations"])
def test_each_sample_can_have_another_scale(guidance_embedded):
    denoiser = small_denoiser(guidance_embedded=guidance_embedded)
    eps = torch.stack([noise(1, i, SHAPE) for i in range(6)])
    cond = torch.arange(6) % 3
    w = torch.tensor([1.0, 3.0, 1.0, 3.0, 3.0, 1.0])
    by_scale = {s: DDIM(3)(with_guidance(denoiser, s), eps, cond) for s in (1.0, 3.0)}
    expected = torch.stack([by_scale[s][i] for i, s in enumerate(w.tolist())])
    torch.testing.assert_close(DDIM(3)(with_guidance(denoiser, w), eps, cond), expected)


@pytest.fixture
def students(tmp_path):
    """Students trained on a range of scales, on pairs of scale 3, and without guidance."""
    ranged = save_teacher(
        tmp_path / "ranged", small_denoiser(guidance_embedded=True), guidance=RANGE
    )
    fixed = save_teacher(tmp_path / "fixed", small_denoiser(), guidance=3.0)
    plain = save_teacher(tmp_path / "plain", small_denoiser())
    return [load_checkpoint(run)[0] for run in (ranged, fixed, plain)]


def test_a_loaded_student_has_the_scales_that_it_was_trained_on(students):
    assert [student.guidance for student in students] == [RANGE, 3.0, None]


def test_scales_that_a_student_was_trained_on_give_no_warning(students, caplog):
    guidances._warn_once.cache_clear()
    ranged, fixed, plain = students
    with caplog.at_level(logging.WARNING):
        with_guidance(ranged, 1.0)
        with_guidance(ranged, 4.0)
        with_guidance(fixed, 1.0)
        with_guidance(plain, 3.0)
    assert caplog.messages == []


def test_other_scales_give_one_warning_each(students, caplog):
    guidances._warn_once.cache_clear()
    ranged, fixed, _ = students
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with_guidance(ranged, 5.0)
            with_guidance(fixed, 2.0)
    of_range, of_fixed = caplog.messages
    for named in ("guidance", "5", "1", "4"):
        assert named in of_range
    for named in ("guidance", "2", "3.0"):
        assert named in of_fixed


def test_a_stored_scale_that_is_no_number_is_refused(tmp_path):
    run = save_teacher(tmp_path / "bad", small_denoiser(), guidance="x")
    with refused("guidance", "'x'"):
        load_checkpoint(run)
