"""Measures of trajectories in validation: the logged values are true, training is unchanged."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data.datamodule import DataModule
from data.images import Images
from data.noise import noise
from data.pack import pack
from models.checkpoint import load_checkpoint
from models.denoiser import Denoiser
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity
from tests.distributed.runs import equal, final_state
from tests.helpers.commands import Workspace
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.results import result_lines
from tests.helpers.training import SMALL_DIT, fit_words, small_config, spec, train
from tests.oracle import single
from trainer.callbacks.trajectory_metrics import TrajectoryMetrics, averaged_weights
from trainer.metrics.trajectories import CURVATURE_PARTS, measure_trajectories
from trainer.module import Generator

CURVATURES = [f"curvature_t{i}" for i in range(CURVATURE_PARTS)]
MEASURES = ["first_orderness", "straightness", *CURVATURES]

# Entries of a configuration.
EMA = spec("EMA", decay=0.9)
LABELS = spec("ClassLabel", classes=3, dropout=0.5)
CLASS_DIT = spec("DiT", **SMALL_DIT["init_args"], classes=3)


def measures(**arguments):
    return spec("TrajectoryMetrics", **{"samples": 6, "steps": 16, **arguments})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A set of 18 tiny images of three classes, and 2 held out."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(20):
        (folder / f"{i % 3}").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 12 * i).save(folder / f"{i % 3}" / f"{i:02d}.png")
    pack(folder / "set", folder, size=8, grey=True)
    return folder / "set"


@pytest.fixture
def config(images):
    """Return a function that returns a configuration with callbacks.

    The run makes four steps, validates every other batch and saves every other step.
    """

    def make(*callbacks, **arguments):
        content = small_config(spec("Images", path=str(images / "train")), lr=0.05, **arguments)
        content["data"]["heldout"] = spec("Images", path=str(images / "heldout"))
        content["trainer"] |= {
            "max_steps": 4,
            "val_check_interval": 2,
            "callbacks": list(callbacks),
        }
        content["checkpoints"] = {"every": 2, "keep": 9}
        content["metrics"] = {"every": 2}
        return content

    return make


def read_log(run):
    """Return a run's log without the circumstances and the configuration's checksum."""
    lines = result_lines(run)
    for line in lines:
        line.pop("run", None)
    return lines


def validations(run):
    """Return the lines of a run's log that validations wrote, by step."""
    return {line["step"]: line for line in read_log(run) if "heldout_loss" in line}


def flatten(found):
    """Return measures of trajectories as one list of numbers."""
    return [found["first_orderness"], found["straightness"], *found["curvature"]]


def logged(line):
    """Return the measures in a line of the log, in the order of `flatten`."""
    return [line[key] for key in MEASURES]


def noises(count=6, seed=2):
    return torch.stack([noise(seed, i, (1, 8, 8)) for i in range(count)])


def load_saved(run, step):
    """Return the denoiser that a run saved after a step."""
    return load_checkpoint(run / f"checkpoints/step={step:09d}.ckpt")[0]


# Values


@pytest.mark.parametrize(
    "callbacks",
    [[EMA, measures()], [measures(), EMA], [measures()]],
    ids=["averages first", "averages last", "no averages"],
)
def test_a_validation_logs_the_measures_of_the_saved_weights(config, tmp_path, callbacks):
    """With an EMA they are those of the averages."""
    content = config(*callbacks, net=CLASS_DIT, condition=LABELS)
    run = train(content, tmp_path / "run")
    assert list(validations(run)) == [2, 4]
    assert len(read_log(run)) == 4
    for step, line in validations(run).items():
        found = measure_trajectories(load_saved(run, step), noises(), torch.arange(6) % 3, steps=16)
        assert logged(line) == pytest.approx(flatten(found), rel=1e-4)
        assert found["first_orderness"] > 1e-4
        assert line.keys() == {"step", "heldout_loss", *MEASURES}


def untrained_line(content, run):
    """Return the validation's line of a run whose weights stay as they are."""
    train(content, run, "--optimizer.lr", 0, steps=2)
    return validations(run)[2]


def test_the_measures_of_a_gaussian_on_linear(config, tmp_path):
    """UnitVariance with an output of zero is the exact denoiser of N(0, 1).

    eps_hat = sigma / S eps with S^2 = alpha^2 + sigma^2.
    """
    unit = spec("UnitVariance", net=SMALL_DIT, interpolant="Linear", prediction="Velocity")
    line = untrained_line(config(measures(steps=64), net=unit), tmp_path / "run")
    eps = noises()
    found = measure_trajectories(single(Linear(), 0.0, 1.0), eps, steps=64)
    assert logged(line) == pytest.approx(flatten(found), rel=1e-4)
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    hat = t / torch.hypot(1 - t, t)
    wanted = 2 * hat.var().item() * eps.square().mean().item()
    assert line["first_orderness"] == pytest.approx(wanted, rel=0.05)


def test_the_measures_of_a_point_on_an_arc(config, tmp_path):
    """A network with an output of zero that predicts data is the denoiser of the point 0.

    x_t = sin(pi t / 2) eps at every step: of first order, not straight.
    """
    content = config(measures(samples=5), interpolant="Trigonometric", prediction="Data")
    line = untrained_line(content, tmp_path / "run")
    square = noises(5).square().mean().item()
    derivatives = [math.pi / 2 * math.cos(math.pi / 2 * k / 16) for k in range(1, 17)]
    assert line["first_orderness"] == pytest.approx(0, abs=1e-9)
    straightness = square * sum((1 - rate) ** 2 for rate in derivatives) / 16
    assert line["straightness"] == pytest.approx(straightness, rel=1e-4)

    # The bend between k / 16 and (k + 1) / 16 belongs to the part of its midpoint.
    bends = [[] for _ in range(CURVATURE_PARTS)]
    for k in range(1, 16):
        part = int((2 * k + 1) / 32 * CURVATURE_PARTS)
        bends[part].append(square * (16 * (derivatives[k] - derivatives[k - 1])) ** 2)
    curvature = [sum(part) / len(part) for part in bends]
    assert [line[key] for key in CURVATURES] == pytest.approx(curvature, rel=1e-3)


def test_parts_of_the_curvature_without_a_step_are_not_logged(config, tmp_path):
    run = train(config(measures(steps=3, samples=2)), tmp_path / "run")
    found = [key for key in CURVATURES if key in validations(run)[2]]
    assert found == ["curvature_t4", "curvature_t6"]


def test_validation_follows_batches_if_gradients_are_accumulated(config, tmp_path):
    """Two batches make a step, so that a validation follows every step."""
    content = config(measures(steps=3, samples=2))
    run = train(content, tmp_path / "run", "--trainer.accumulate_grad_batches", 2)
    assert list(validations(run)) == [1, 2, 3, 4]
    counts = {line["evaluations"] for line in read_log(run) if "loss" in line}
    assert counts == {16, 32}


# Training is unchanged


def test_measuring_does_not_change_training(config, tmp_path):
    """Weights, averages, moments and costs are the same bit for bit, and so is the log."""
    model = {"net": CLASS_DIT, "condition": LABELS}
    plain = train(config(EMA, **model), tmp_path / "plain")
    measured = train(config(EMA, measures(), **model), tmp_path / "measured")
    assert equal(final_state(plain, 4), final_state(measured, 4))
    assert final_state(plain, 4)["evaluations"] == 4 * 8
    lines = read_log(measured)
    for line in lines:
        for name in MEASURES:
            line.pop(name, None)
    assert lines == read_log(plain)


def test_a_resumed_run_logs_the_same_measures(config, tmp_path):
    content = config(EMA, measures())
    uninterrupted = train(content, tmp_path / "uninterrupted")
    resumed = train(content, tmp_path / "resumed", steps=3)
    train(content, resumed)
    assert validations(resumed) == validations(uninterrupted)


def test_replaced_weights_come_back_also_after_an_error():
    net = torch.nn.Linear(3, 3)
    original = {name: value.clone() for name, value in net.state_dict().items()}
    other = {name: value + 1 for name, value in original.items()}
    with pytest.raises(ZeroDivisionError), averaged_weights(net, other):
        assert equal(dict(net.state_dict()), other)
        raise ZeroDivisionError
    assert equal(dict(net.state_dict()), original)


def test_replacing_no_weights_leaves_the_network_as_it_is():
    net = torch.nn.Linear(3, 3)
    original = {name: value.clone() for name, value in net.state_dict().items()}
    with averaged_weights(net, {}):
        assert equal(dict(net.state_dict()), original)


# Two processes


def train_in_two(content, run, strategy):
    """Train in two processes and validate after every step; return the run."""
    two = ("--trainer.devices", 2, "--trainer.strategy", strategy)
    words = fit_words(content, run, *two, "--trainer.val_check_interval", 1)
    Workspace(run.parent).rectify(*words, processes=2)
    return run


def assert_measures_of_five_noises(run):
    """Check that the logged measures are means over all five noises, three on one process."""
    lines = validations(run)
    assert list(lines) == [1, 2, 3, 4]
    for step in (2, 4):
        found = measure_trajectories(load_saved(run, step), noises(5), steps=16)
        assert logged(lines[step]) == pytest.approx(flatten(found), rel=1e-4)


def test_two_processes_share_the_trajectories(config, tmp_path):
    content = config(EMA, measures(samples=5))
    assert_measures_of_five_noises(train_in_two(content, tmp_path / "run", "ddp"))


def test_sharded_averages_are_measured_and_training_is_unchanged(config, tmp_path):
    plain = train_in_two(config(EMA), tmp_path / "plain", "fsdp2")
    content = config(EMA, measures(samples=5))
    measured = train_in_two(content, tmp_path / "measured", "fsdp2")
    assert_measures_of_five_noises(measured)
    assert equal(final_state(plain, 4), final_state(measured, 4))


# Refusals


@pytest.mark.parametrize(("key", "value"), [("samples", 0), ("steps", 1), ("seed", -1)])
def test_arguments_out_of_range_are_refused(key, value):
    with refused("TrajectoryMetrics", key, value):
        TrajectoryMetrics(**{key: value})


def test_a_run_without_heldout_data_is_refused(config, tmp_path, capfd):
    content = config(measures())
    del content["data"]["heldout"]
    assert_refused(capfd, fit_words(content, tmp_path / "run"), "TrajectoryMetrics", "data.heldout")


def test_a_run_without_a_generator_is_refused(config, tmp_path, capfd):
    content = config(measures())
    content["model"] = spec("Autoencoder", image_channels=1)
    assert_refused(capfd, fit_words(content, tmp_path / "run"), "TrajectoryMetrics", "Autoencoder")


def test_more_processes_than_samples_are_refused(images):
    heldout = Images(str(images / "heldout"))
    run = SimpleNamespace(world_size=65, datamodule=DataModule(heldout, batch=1, heldout=heldout))
    net = DiT(**SMALL_DIT["init_args"])
    with refused("TrajectoryMetrics", "samples", 64, 65):
        TrajectoryMetrics().setup(run, Generator(Denoiser(net, Linear(), Velocity())), "fit")
