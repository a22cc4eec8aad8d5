"""Online pairs are the stored set's, in its order, on exactly a share of the steps."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.noise import noise
from data.pairs import Pairs
from models.condition import ClassLabel, Unconditional
from models.denoiser import Denoiser
from models.interpolant import VariancePreserving
from tests.teachers import SHAPE, denoiser, saved
from trainer.collect import collect
from trainer.draws import Draws
from trainer.objectives import Matching, Objective, Online
from trainer.objectives.frozen import Averaged, Frozen

COUNT, BATCH = 48, 16
GUIDANCE = 2.0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    saved(folder / "teacher", denoiser())
    collect(folder / "teacher", folder / "pairs", COUNT, steps=3, guidance=GUIDANCE, seed=11, shard=BATCH, batch=BATCH)
    return folder


class Recorded(Objective):
    """Matching that keeps what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, denoiser, x, eps, cond=None, draws=None):
        self.given.append((x, eps, cond))
        loss = (matching := Matching())(denoiser, x, eps, cond, draws)
        self.seen = matching.seen
        return loss


def batch(step, start=0, count=BATCH):
    x = torch.stack([noise(99, BATCH * step + start + i, SHAPE) for i in range(count)])
    return Batch(x, True, torch.zeros(count, dtype=torch.long), seed=3, step=step, start=start, size=BATCH)


def online(place, share=1.0, **words):
    return Online(Frozen(place / "teacher", GUIDANCE), Recorded(), share, steps=3, seed=11, **words)


def work(objective, step, start=0, count=BATCH, student=None, cond=True):
    part = batch(step, start, count)
    told = part.condition if cond is True else cond
    return objective(student or denoiser(seed=1), part.x, torch.zeros_like(part.x), told, Draws(part))


def test_the_same_seeds_give_the_stored_sets_pairs(place):
    objective, stored = online(place), Pairs(str(place / "pairs"), guidance=GUIDANCE, keep=1.0)
    for step in range(COUNT // BATCH):
        loss, expected = work(objective, step), stored.read(np.arange(step * BATCH, (step + 1) * BATCH))
        for found, wanted in zip(objective.inner.given[-1], (expected.x, expected.noise, expected.condition), strict=True):
            assert torch.equal(found, wanted)
        again = Matching()(denoiser(seed=1), expected.x, expected.noise, expected.condition, Draws(batch(step)))
        assert torch.equal(loss, again) and torch.equal(objective.seen[1], objective.inner.seen[1])


def test_the_students_average_is_a_teacher_too(place):
    """It draws what a frozen copy of those weights draws, and the student's own weights stay as they are."""
    student, frozen = denoiser(seed=1), online(place)
    student.averages, before = dict(denoiser().state_dict()), {key: value.clone() for key, value in student.state_dict().items()}
    own = Online(Averaged(GUIDANCE, frozen.teacher.condition), Recorded(), steps=3, seed=11)
    losses = [work(objective, 0, student=student) for objective in (frozen, own)]
    assert torch.equal(*losses) and torch.equal(frozen.inner.given[0][0], own.inner.given[0][0])
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    with pytest.raises(ValueError, match="keeps no average"):
        work(own, 0)


def test_ranks_draw_their_slices_of_them(place):
    """In batches of other sizes the network's sums may round otherwise, and x then once more, to float16."""
    objective, stored = online(place), Pairs(str(place / "pairs"), guidance=GUIDANCE, keep=1.0)
    for start, count in ((0, 8), (8, 8), (0, 4), (4, 12)):
        work(objective, 1, start, count)
        expected = stored.read(np.arange(BATCH + start, BATCH + start + count))
        x, eps, cond = objective.inner.given[-1]
        assert torch.equal(eps, expected.noise) and torch.equal(cond, expected.condition)
        torch.testing.assert_close(x, expected.x, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0, 1 / 3])
def test_exactly_a_share_of_the_steps_draw_and_none_draws_anothers_pairs(place, share):
    objective = online(place, share)
    objective.draw = lambda student, indices, like, cond: (drawn.extend(indices), (like, like, cond))[1]
    drawn, steps = [], 30
    for step in range(steps):
        before = len(drawn)
        work(objective, step)
        assert len(drawn) - before in (0, BATCH)
        if len(drawn) == before:
            assert torch.equal(objective.inner.given[-1][0], batch(step).x)
    assert drawn == list(range(round(share * steps) * BATCH)) and objective.before(0) == 0


def test_what_the_student_is_not_told_stays_so(place):
    objective = online(place)
    dropped = torch.tensor([3, 0] * (BATCH // 2))  # every other label is dropped
    work(objective, 0, cond=dropped)
    x, _, cond = objective.inner.given[-1]
    assert cond.tolist() == [3 if i % 2 == 0 else i % 3 for i in range(BATCH)]
    work(objective, 0, cond=None)
    assert objective.inner.given[-1][2] is None and torch.equal(objective.inner.given[-1][0], x)


def test_held_out_batches_come_as_they_are(place):
    objective = online(place)
    with torch.no_grad():
        work(objective, 0)
    assert torch.equal(objective.inner.given[-1][0], batch(0).x)


def test_a_step_costs_the_teachers_walk_and_the_inner_objective(place):
    objective, student, calls = online(place), denoiser(seed=1), {"teacher": 0, "student": 0}

    def count(name):
        return lambda module, args, out: calls.update({name: calls[name] + len(args[0])})

    objective.teacher.denoiser.net.register_forward_hook(count("teacher"))
    student.net.register_forward_hook(count("student"))
    work(objective, 0, student=student)
    assert calls == {"teacher": 2 * 3 * BATCH, "student": BATCH}, "guided, three steps; the student once"


def test_the_teacher_is_asked_in_full_precision_whatever_the_student_trains_in(place):
    objective = online(place)
    work(objective, 0)
    with torch.autocast("cpu", torch.bfloat16):
        work(objective, 0)
    assert torch.equal(objective.inner.given[0][0], objective.inner.given[1][0])


def test_the_gradient_is_that_of_the_stored_pairs(place):
    student, stored = denoiser(seed=1).requires_grad_(True), Pairs(str(place / "pairs"), guidance=GUIDANCE, keep=1.0)
    expected = stored.read(np.arange(BATCH))
    work(online(place), 0, student=student).backward()
    gradients = [value.grad.clone() for value in student.parameters() if value.grad is not None]
    student.zero_grad()
    Matching()(student, expected.x, expected.noise, expected.condition, Draws(batch(0))).backward()
    assert all(torch.equal(a, value.grad) for a, value in zip(gradients, (v for v in student.parameters() if v.grad is not None)))
    assert not any(value.requires_grad for value in online(place).teacher.denoiser.parameters())


def test_what_cannot_be_is_refused(place, tmp_path):
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"share is {share}, it must lie in \(0, 1\]"):
            online(place, share)
    with pytest.raises(ValueError, match="draws is None"):
        online(place)(denoiser(), *torch.zeros(2, 4, *SHAPE))
    scaled = replace(batch(0), scale=torch.ones(BATCH))
    with pytest.raises(ValueError, match="the data record scales of guidance, its pairs are all at"):
        online(place)(denoiser(), scaled.x, scaled.x, scaled.condition, Draws(scaled))
    other = denoiser()
    with pytest.raises(ValueError, match="teacher is on Linear.*the student on VariancePreserving"):
        work(online(place), 0, student=Denoiser(other.net, VariancePreserving(), other.prediction))
    saved(tmp_path / "none", denoiser(0), Unconditional())
    objective = Online(Frozen(tmp_path / "none"), Recorded(), steps=1)
    with pytest.raises(ValueError, match="knows no classes, the student is told some"):
        work(objective, 0)
    assert isinstance(Frozen(place / "teacher").condition, ClassLabel)


@pytest.mark.timeout(300)
def test_its_config_trains(workspace, tmp_path):
    words = ("--out", tmp_path / "run", "--trainer.max_steps", "3", "--metrics.every", "1", "--data.batch", "32")
    workspace.rectify("fit", "--config", "configs/digits/online.yaml", *words, "--trainer.logger", "false")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["loss"] > 0 for line in lines)
