"""Online pairs are those of the stored set, in its order, on an exact share of the steps."""

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
from tests.helpers.refusals import refused
from tests.helpers.teachers import SHAPE, save_teacher, small_denoiser
from tests.helpers.training import log_lines, study_config, train
from trainer.jobs.collect import collect
from trainer.jobs.options import SamplingOptions
from trainer.objectives import Matching, Objective, Online
from trainer.objectives.teachers import EMATeacher, FrozenTeacher
from trainer.step_random import StepRandom

COUNT = 48
BATCH = 16
STEPS = 3
SEED = 11
GUIDANCE = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a teacher and a set of its pairs."""
    folder = tmp_path_factory.mktemp("online")
    save_teacher(folder / "teacher", small_denoiser())
    collect(
        folder / "teacher",
        folder / "pairs",
        COUNT,
        steps=STEPS,
        sampling=SamplingOptions(guidance=GUIDANCE),
        seed=SEED,
        shard=BATCH,
        batch=BATCH,
    )
    return folder


@pytest.fixture
def stored(folder):
    return Pairs(str(folder / "pairs"), guidance=GUIDANCE, keep_fraction=1.0)


class RecordingMatching(Objective):
    """Matching that records its batches."""

    def __init__(self):
        self.batches = []

    def __call__(self, denoiser, x, eps, cond=None, random=None):
        self.batches.append((x, eps, cond))
        return Matching()(denoiser, x, eps, cond, random)


def make_batch(step, start=0, count=BATCH):
    x = torch.stack([noise(99, BATCH * step + start + i, SHAPE) for i in range(count)])
    labels = torch.zeros(count, dtype=torch.long)
    return Batch(x, True, labels, seed=3, step=step, start=start, size=BATCH)


def make_online(teacher, share=1.0):
    return Online(teacher, RecordingMatching(), share, steps=STEPS, seed=SEED)


@pytest.fixture
def online(folder):
    return make_online(FrozenTeacher(folder / "teacher", GUIDANCE))


def loss_of(objective, batch, student=None):
    """Return the loss of a batch for a student, by default one of random weights."""
    student = student or small_denoiser(seed=1)
    return objective(
        student, batch.x, torch.zeros_like(batch.x), batch.condition, StepRandom(batch)
    )


@pytest.mark.parametrize("step", range(COUNT // BATCH))
def test_the_same_seed_gives_the_pairs_of_the_stored_set(online, stored, step):
    loss = loss_of(online, make_batch(step))
    expected = stored.read(np.arange(step * BATCH, (step + 1) * BATCH))
    x, eps, cond = online.inner.batches[-1]
    assert torch.equal(x, expected.x)
    assert torch.equal(eps, expected.noise)
    assert torch.equal(cond, expected.condition)

    student = small_denoiser(seed=1)
    random = StepRandom(make_batch(step))
    again = Matching()(student, expected.x, expected.noise, expected.condition, random)
    assert torch.equal(loss.total, again.total)
    assert torch.equal(loss.per_sample.distances, again.per_sample.distances)


def test_the_students_average_can_be_the_teacher(online):
    """Its pairs are those of a frozen copy of the averaged weights. The student's weights stay."""
    student = small_denoiser(seed=1)
    student.averages = dict(small_denoiser().state_dict())
    before = {key: value.clone() for key, value in student.state_dict().items()}
    averaged = make_online(EMATeacher(GUIDANCE, online.teacher.condition))

    expected = loss_of(online, make_batch(0), student)
    found = loss_of(averaged, make_batch(0), student)
    assert torch.equal(found.total, expected.total)
    assert torch.equal(averaged.inner.batches[0][0], online.inner.batches[0][0])
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize(("start", "count"), [(0, 8), (8, 8), (0, 4), (4, 12)])
def test_ranks_sample_their_slices_of_the_pairs(online, stored, start, count):
    """x may differ by one rounding to float16: in other batch sizes, sums may round otherwise."""
    loss_of(online, make_batch(1, start, count))
    expected = stored.read(np.arange(BATCH + start, BATCH + start + count))
    x, eps, cond = online.inner.batches[-1]
    assert torch.equal(eps, expected.noise)
    assert torch.equal(cond, expected.condition)
    torch.testing.assert_close(x, expected.x, rtol=2**-10, atol=1e-4)


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0, 1 / 3])
def test_an_exact_share_of_the_steps_samples_pairs_and_no_pair_is_used_twice(folder, share):
    objective = make_online(FrozenTeacher(folder / "teacher", GUIDANCE), share)
    indices = []
    steps = 30

    def record(student, of_pairs, like, cond):
        indices.extend(of_pairs)
        return like, like, cond

    objective.draw_pairs = record
    for step in range(steps):
        before = len(indices)
        loss_of(objective, make_batch(step))
        assert len(indices) - before in (0, BATCH)
        if len(indices) == before:  # the batch as it comes
            assert torch.equal(objective.inner.batches[-1][0], make_batch(step).x)
    assert indices == list(range(round(share * steps) * BATCH))
    assert objective.pair_steps_before(0) == 0


def test_dropped_labels_stay_dropped(online):
    dropped = torch.tensor([3, 0] * (BATCH // 2))  # 3, of three classes, is the dropped label
    loss_of(online, replace(make_batch(0), condition=dropped))
    _, _, cond = online.inner.batches[-1]
    assert cond.tolist() == [3 if i % 2 == 0 else i % 3 for i in range(BATCH)]


def test_a_batch_without_labels_stays_without_labels(online):
    loss_of(online, make_batch(0))
    loss_of(online, replace(make_batch(0), condition=None))
    labelled, unlabelled = online.inner.batches
    assert unlabelled[2] is None
    assert torch.equal(unlabelled[0], labelled[0])


def test_held_out_batches_are_used_as_they_come(online):
    with torch.no_grad():
        loss_of(online, make_batch(0))
    assert torch.equal(online.inner.batches[-1][0], make_batch(0).x)


def test_a_step_costs_the_teachers_trajectory_and_the_inner_objective(online):
    student = small_denoiser(seed=1)
    evaluated = {"teacher": 0, "student": 0}

    def count(name):
        def hook(module, args, out):
            evaluated[name] += len(args[0])

        return hook

    online.teacher.denoiser.net.register_forward_hook(count("teacher"))
    student.net.register_forward_hook(count("student"))
    loss_of(online, make_batch(0), student)
    assert evaluated["teacher"] == 2 * STEPS * BATCH  # with guidance, each step evaluates it twice
    assert evaluated["student"] == BATCH


def test_the_teacher_runs_in_full_precision_whatever_the_student_trains_in(online):
    loss_of(online, make_batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(online, make_batch(0))
    full, mixed = online.inner.batches
    assert torch.equal(full[0], mixed[0])


def test_the_gradient_is_that_of_the_stored_pairs(online, stored):
    def gradients(student):
        return {
            name: parameter.grad
            for name, parameter in student.named_parameters()
            if parameter.grad is not None
        }

    student = small_denoiser(seed=1).requires_grad_(True)
    loss_of(online, make_batch(0), student).total.backward()

    other = small_denoiser(seed=1).requires_grad_(True)
    pairs = stored.read(np.arange(BATCH))
    random = StepRandom(make_batch(0))
    Matching()(other, pairs.x, pairs.noise, pairs.condition, random).total.backward()

    found = gradients(student)
    expected = gradients(other)
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_teacher_is_frozen(online):
    assert not any(parameter.requires_grad for parameter in online.teacher.denoiser.parameters())


def test_a_teacher_from_a_run_has_its_condition(online):
    assert isinstance(online.teacher.condition, ClassLabel)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_outside_0_to_1_is_refused(folder, share):
    teacher = FrozenTeacher(folder / "teacher", GUIDANCE)
    with refused("Online", "share", share, "(0, 1]"):
        make_online(teacher, share)


def test_an_average_as_the_teacher_needs_a_run_that_keeps_one(online):
    averaged = make_online(EMATeacher(GUIDANCE, online.teacher.condition))
    with refused("EMATeacher", "trainer.callbacks", "trainer.num_sanity_val_steps", 0):
        loss_of(averaged, make_batch(0))


def test_a_loss_without_random_numbers_of_the_run_is_refused(online):
    with refused("Online", "random", "None", "StepRandom"):
        online(small_denoiser(), *torch.zeros(2, 4, *SHAPE))


def test_data_that_record_scales_are_refused(online):
    with refused("Online", "scales", f"guidance {GUIDANCE:g}"):
        loss_of(online, replace(make_batch(0), guidance=torch.ones(BATCH)))


def test_a_student_on_another_interpolant_is_refused(folder, online):
    other = small_denoiser()
    student = Denoiser(other.net, VariancePreserving(), other.prediction)
    with refused(folder / "teacher", "Linear", "VariancePreserving"):
        loss_of(online, make_batch(0), student)


def test_labels_for_a_teacher_without_classes_are_refused(tmp_path):
    save_teacher(tmp_path / "teacher", small_denoiser(classes=0), Unconditional())
    objective = Online(FrozenTeacher(tmp_path / "teacher"), RecordingMatching(), steps=1)
    with refused("Online", tmp_path / "teacher", "classes"):
        loss_of(objective, make_batch(0))


@pytest.mark.timeout(300)
def test_its_config_trains(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace.path)
    options = ("--metrics.every", 1, "--data.batch", 32)
    run = train(study_config("digits", "online"), tmp_path / "run", *options, steps=3)
    lines = log_lines(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 for line in lines)
