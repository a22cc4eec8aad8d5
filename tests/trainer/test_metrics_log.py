"""The parts of a loss in metrics.jsonl, and steps in which the student does not learn."""

import pytest
import torch
from PIL import Image

from data.pack import pack
from models.checkpoint import read_checkpoint
from tests.helpers.training import SMALL_DIT, log_lines, small_config, spec, train

BATCH = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A set of 16 tiny images, and 2 held out."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(18):
        Image.new("L", (8, 8), 14 * i).save(folder / f"{i:02d}.png")
    pack(folder / "set", folder, size=8, grey=True)
    return folder / "set"


@pytest.fixture(scope="module")
def config(images, tmp_path_factory):
    """The configuration of DMD2 with a critic; the student learns in every other step."""
    source = spec("Images", path=str(images / "train"))
    plain = small_config(source, batch=BATCH)
    teacher = train(plain, tmp_path_factory.mktemp("teacher") / "run", steps=1)
    objective = spec(
        "DistributionMatching",
        teacher=spec("FrozenTeacher", run=str(teacher)),
        critic=SMALL_DIT,
        student_every=2,
    )
    config = small_config(source, batch=BATCH, objective=objective)
    return {**config, "metrics": {"every": 1}, "checkpoints": {"every": 1, "keep": 9}}


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run of four steps, which no test changes."""
    return train(config, tmp_path_factory.mktemp("distribution") / "run", steps=4)


def test_the_parts_of_the_loss_are_logged_by_name_and_add_up_to_it(run):
    """Where the student does not learn, it has no part."""
    for line in log_lines(run):
        student_learns = line["step"] % 2 == 1
        assert ("push" in line) is student_learns
        total = line["fake"] + line["critic"] + line.get("push", 0.0)
        assert total == pytest.approx(line["loss"], rel=1e-6)


def test_the_parts_are_means_over_accumulated_batches(config, run, tmp_path):
    accumulate = ("--trainer.accumulate_grad_batches", 2)
    parts = train(config, tmp_path / "run", *accumulate, steps=1)
    (found,) = log_lines(parts)
    expected = log_lines(run)[0]
    for name in ("loss", "fake", "critic", "push"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


def test_every_network_counts_and_teachers_only_where_the_student_learns(run):
    """In each step student, fake, and the critic twice; in every other one teacher and critic."""
    counts = [line["evaluations"] for line in log_lines(run)]
    assert counts == [BATCH * passes for passes in (6, 10, 16, 20)]


def student_weights(run):
    """Return the student's weights after each step, in one tensor each."""
    weights = {}
    for path in sorted((run / "checkpoints").glob("step=*.ckpt")):
        state = read_checkpoint(path)["state_dict"]
        values = [value.flatten() for key, value in state.items() if key.startswith("denoiser.")]
        weights[int(path.stem[5:])] = torch.cat(values)
    return weights


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_student_changes_only_in_its_steps_also_in_a_resumed_run(config, tmp_path, accumulated):
    """Weight decay and momentum would move it without a gradient, too."""
    accumulate = ("--trainer.accumulate_grad_batches", accumulated)
    train(config, tmp_path / "run", *accumulate, steps=1)
    weights = student_weights(train(config, tmp_path / "run", *accumulate, steps=5))
    changed = [not torch.equal(weights[step], weights[step + 1]) for step in range(1, 5)]
    assert changed == [False, True, False, True]
