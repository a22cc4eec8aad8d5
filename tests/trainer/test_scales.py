"""Guidance embedded: each pair has a scale of its own, and the student that is told it is guided at one evaluation."""

import logging

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.latents import Latents, latent_sample
from data.mixed import Mixed
from data.noise import noise, scales
from data.pairs import Pairs
from data.shards import ShardWriter
from models import guidance as guidances
from models import teacher as teachers
from models.condition import ClassLabel
from models.guidance import Guided, Told, at
from models.sampler import DDIM
from tests.teachers import SHAPE, denoiser, saved
from trainer.collect import collect
from trainer.draws import Draws
from trainer.module import Generator
from trainer.objectives import Matching, Objective

COUNT, RANGE = 24, [1.0, 4.0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scales")
    saved(folder / "teacher", denoiser())
    words = {"pairs": COUNT, "steps": 2, "seed": 5, "shard": 8}
    collect(folder / "teacher", folder / "pairs", **words, guidance=1.0, guidance_max=4.0, batch=3)
    collect(folder / "teacher", folder / "baked", **words, guidance=3.0)
    collect(folder / "teacher", folder / "plain", **words)
    return folder


def test_scales_are_keyed_by_seed_and_index_and_fill_their_range():
    drawn = scales(5, range(2000), 1.0, 4.0)
    assert drawn.min() >= 1 and drawn.max() <= 4 and abs(drawn.mean() - 2.5) < 0.06
    assert torch.equal(drawn[70:75], scales(5, range(70, 75), 1.0, 4.0)) and not torch.equal(drawn, scales(6, range(2000), 1, 4))


def test_each_pair_is_drawn_at_the_scale_that_it_records(place):
    source = Pairs(str(place / "pairs"), guidance=RANGE, keep=1.0)
    batch = source.read(np.arange(COUNT)[::-1].copy())
    assert torch.equal(batch.scale, scales(5, range(COUNT), 1.0, 4.0).flip(0)) and batch.scale.dtype == torch.float32
    assert source.manifest["guidance"] == RANGE
    for i in (0, 7, 23):
        x = DDIM(2)(Guided(denoiser(), batch.scale[i].item()), batch.noise[i : i + 1], batch.condition[i : i + 1])
        torch.testing.assert_close(x[0], batch.x[i], rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"collected with guidance \[1.0, 4.0\], the configuration says 1.0"):
        Pairs(str(place / "pairs"))


def test_scales_survive_mixing_and_data_are_at_one(place):
    writer = ShardWriter(place / "latents", "latents", {"classes": ["a", "b", "c"]}, 6, 6)
    writer.write(0, [latent_sample(f"{i:09d}", noise(9, i, SHAPE), i % 3) for i in range(6)])
    assert writer.finish()
    scaled, latents = Pairs(str(place / "pairs"), guidance=RANGE), Latents(str(place / "latents"))
    batch = Mixed([scaled, latents, Pairs(str(place / "plain"))], [2, 1, 1]).take(0, 3, 16)
    assert (batch.scale == 1).sum() == 8 and batch.to(torch.device("cpu")).scale is batch.scale
    for x, scale, w in zip(batch.noise, batch.scale, batch.paired):
        found = [i for i in range(COUNT) if torch.equal(noise(5, i, SHAPE), x)]
        assert scale == 1 or scale == scales(5, found, 1.0, 4.0)[0] and w
    with pytest.raises(ValueError, match="beside recorded scales, others must be at 1"):
        Mixed([scaled, Pairs(str(place / "baked"), guidance=3.0)], [1, 1])
    assert Mixed([Pairs(str(place / "plain")), latents], [1, 1]).take(0, 0, 4).scale is None


class Recorded(Objective):
    """Matching that keeps what it was given."""

    def __call__(self, denoiser, x, eps, cond=None, draws=None):
        self.given = denoiser, x, eps, cond
        return Matching()(denoiser, x, eps, cond, draws)


def test_the_student_is_told_every_samples_scale(place):
    student, objective = denoiser(scaled=True).requires_grad_(True), Recorded()
    module = Generator(student, objective, ClassLabel(3))
    batch = Pairs(str(place / "pairs"), guidance=RANGE).read(np.arange(8))
    batch.size = 8
    module.training_step(batch, 0).backward()
    told, x, eps, cond = objective.given
    t = torch.linspace(0.1, 0.9, 8)
    expected = student(x, t, cond, w=batch.scale)
    assert torch.equal(told(x, t, cond)[0], expected[0]) and not torch.equal(student(x, t, cond)[0], expected[0])
    assert told.interpolant is student.interpolant and told.prediction is student.prediction and not told.jumps
    assert student.net.scale.out.weight.grad.abs().sum() > 0
    module.loss(Batch(x, True, seed=0, size=8), Draws(batch), cond)
    assert objective.given[0] is student, "without scales nothing stands between"


def test_scales_that_nobody_reads_are_refused(place):
    source = Pairs(str(place / "pairs"), guidance=RANGE)
    module = Generator(denoiser(), condition=ClassLabel(3))
    with pytest.raises(ValueError, match="records scales of guidance, from 1 to 4, which the network does not read; set model"):
        module._agree(source)
    module = Generator(denoiser(scaled=True), condition=ClassLabel(3))
    module._agree(source)
    module._agree(Pairs(str(place / "plain")))
    assert module.spec["guidance"] == RANGE
    module = Generator(denoiser(), condition=ClassLabel(3))
    module._agree(Pairs(str(place / "baked"), guidance=3.0))
    assert module.spec["guidance"] == 3.0


def test_a_told_student_is_guided_at_the_cost_of_one_evaluation():
    plain, scaled = denoiser(), denoiser(scaled=True)
    assert isinstance(at(plain, 3.0), Guided) and DDIM(4).nfe(at(plain, 3.0)) == 8
    assert isinstance(at(scaled, 3.0), Told) and DDIM(4).nfe(at(scaled, 3.0)) == 4
    eps, cond = torch.stack([noise(1, i, SHAPE) for i in range(6)]), torch.arange(6) % 3
    each, w = [DDIM(3)(at(scaled, s), eps, cond) for s in (1.0, 3.0)], torch.tensor([1.0, 3.0, 1.0, 3.0, 3.0, 1.0])
    mixed = DDIM(3)(at(scaled, w), eps, cond)
    torch.testing.assert_close(mixed, torch.stack([each[int(s == 3)][i] for i, s in enumerate(w)]))
    mixed = DDIM(3)(at(plain, w), eps, cond)
    torch.testing.assert_close(mixed, torch.stack([DDIM(3)(at(plain, s.item()), eps, cond)[i] for i, s in enumerate(w)]))


def test_scales_that_a_student_was_not_trained_on_are_told_once(tmp_path, caplog):
    guidances._warn.cache_clear()
    told, _, _ = teachers.load(saved(tmp_path / "told", denoiser(scaled=True), guidance=RANGE))
    baked, _, _ = teachers.load(saved(tmp_path / "baked", denoiser(), guidance=3.0))
    plain, _, _ = teachers.load(saved(tmp_path / "plain", denoiser()))
    assert (told.guidance, baked.guidance, plain.guidance) == (RANGE, 3.0, None)
    with caplog.at_level(logging.WARNING):
        for model, w in ((told, 1.0), (told, 4.0), (baked, 1.0), (plain, 3.0)):
            at(model, w)
        for model, w in ((told, 5.0), (baked, 2.0)) * 2:
            at(model, w)
    assert caplog.messages == [
        "guidance 5: this network was trained on scales from 1 to 4",
        "guidance 2: 3.0 is in the pairs that this network was trained on already; it acts on top",
    ]
    with pytest.raises(ValueError, match="guidance is 'x', wanted a number"):
        teachers.load(saved(tmp_path / "bad", denoiser(), guidance="x"))


def test_an_empty_range_is_refused(tmp_path):
    with pytest.raises(ValueError, match="guidance_max: 1.0, it must be larger than guidance, 1.0"):
        collect(tmp_path, tmp_path, guidance_max=1.0)
