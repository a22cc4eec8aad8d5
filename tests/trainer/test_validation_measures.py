"""Measures of trajectories, in every validation: what is logged is true, and training does not notice."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data.images import pack
from data.noise import noise
from deploy.cli import main
from models import teacher
from models.denoiser import Denoiser
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity
from tests.conftest import Workspace
from tests.distributed.runs import equal, final
from tests.oracle import single
from trainer.callbacks.measures import Measures, lent
from trainer.evaluate.measures import PARTS, trajectories
from trainer.module import Generator

DIT = {"class_path": "DiT", "init_args": {"size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 1, "heads": 2}}
FORM = {"net": DIT, "interpolant": "Linear", "prediction": "Velocity"}
CURVES = [f"curvature_t{i}" for i in range(PARTS)]


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
def config(images, tmp_path):
    """Return a function that writes a configuration, with callbacks, into a folder of its own; it validates every other batch."""

    def write(name, callbacks, form=FORM, heldout=True, **model):
        arguments = {"denoiser": {"class_path": "Denoiser", "init_args": form}, "objective": "Matching", **model}
        sets = [{"class_path": "Images", "init_args": {"path": str(images / part)}} for part in ("train", "heldout")]
        trainer = {"accelerator": "cpu", "logger": False, "max_steps": 4, "val_check_interval": 2}
        (tmp_path / name).mkdir()
        whole = {
            "out": str(tmp_path / name / "run"),
            "model": {"class_path": "Generator", "init_args": arguments},
            "data": {"source": sets[0], "batch": 8, **({"heldout": sets[1]} if heldout else {})},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.05}},
            "trainer": {**trainer, "callbacks": callbacks},
            "checkpoints": {"every": 2, "keep": 9},
            "metrics": {"every": 2},
        }
        path = tmp_path / name / "run.yaml"
        path.write_text(json.dumps(whole))
        return path

    return write


def measures(**arguments):
    return {"class_path": "Measures", "init_args": {"samples": 6, "steps": 16, **arguments}}


EMA = {"class_path": "EMA", "init_args": {"decay": 0.9}}


def train(path, *words):
    """Train in this process; return the run and the lines of its log, without their seconds."""
    assert not main(["fit", "--config", str(path), *words])
    return path.parent / "run", log(path.parent / "run")


def log(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def validated(lines):
    return {line["step"]: line for line in lines if "heldout_loss" in line}


def flat(found):
    return [found["first_orderness"], found["straightness"], *found["curvature"]]


def logged(line):
    return [line[key] for key in ("first_orderness", "straightness", *CURVES)]


def noises(count=6, seed=2):
    return torch.stack([noise(seed, i, (1, 8, 8)) for i in range(count)])


@pytest.mark.parametrize("callbacks", [[EMA, measures()], [measures(), EMA], [measures()]])
def test_a_line_tells_the_measures_of_its_steps_checkpoint(config, callbacks):
    """With an EMA those of the averages, as all that is made of a checkpoint."""
    run, lines = train(config("told", callbacks, {**FORM, "net": told()}, condition=LABELS))
    assert list(validated(lines)) == [2, 4] and len(lines) == 4
    for step, line in validated(lines).items():
        denoiser = teacher.load(run / f"checkpoints/step={step:09d}.ckpt")[0]
        found = trajectories(denoiser, noises(), torch.arange(6) % 3, steps=16)
        assert logged(line) == pytest.approx(flat(found), rel=1e-4) and found["first_orderness"] > 1e-4
        assert line.keys() == {"step", "heldout_loss", "first_orderness", "straightness", *CURVES}


def told():
    return {**DIT, "init_args": {**DIT["init_args"], "classes": 3}}


LABELS = {"class_path": "ClassLabel", "init_args": {"classes": 3, "dropout": 0.5}}


def test_training_does_not_notice(config):
    """Weights, averages, moments and costs are the same bit for bit; so is all else that the log says."""
    form = {**FORM, "net": told()}
    plain, lines = train(config("plain", [EMA], form, condition=LABELS))
    measured, more = train(config("measured", [EMA, measures()], form, condition=LABELS))
    assert equal(final(plain, 4), final(measured, 4)) and final(plain, 4)["evaluations"] == 4 * 8
    names = {"first_orderness", "straightness", *CURVES}
    assert [{key: value for key, value in line.items() if key not in names} for line in more] == lines


def test_a_gaussians_curve_on_linear(config):
    """UnitNet of a net that says nothing is the exact denoiser of N(0, 1): eps_hat = sigma / S eps, S^2 = alpha^2 + sigma^2."""
    unit = {"class_path": "UnitNet", "init_args": {"net": DIT, "interpolant": "Linear", "prediction": "Velocity"}}
    path = config("gaussian", [measures(steps=64)], {**FORM, "net": unit})
    _, lines = train(path, "--optimizer.lr", "0", "--trainer.max_steps", "2")
    line, eps = validated(lines)[2], noises()
    assert logged(line) == pytest.approx(flat(trajectories(single(Linear(), 0.0, 1.0), eps, steps=64)), rel=1e-4)
    t = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    hat = t / torch.hypot(1 - t, t)
    assert line["first_orderness"] == pytest.approx(2 * hat.var().item() * eps.square().mean().item(), rel=0.05)


def test_a_points_curves_on_an_arc(config):
    """A net that says 0 is the denoiser of the one point 0: x_t = sin(pi t / 2) eps at every step, first-order, not straight."""
    path = config("point", [measures(samples=5)], {**FORM, "interpolant": "Trigonometric", "prediction": "Data"})
    _, lines = train(path, "--optimizer.lr", "0", "--trainer.max_steps", "2")
    line, square = validated(lines)[2], noises(5).square().mean().item()
    rates = [math.pi / 2 * math.cos(math.pi / 2 * k / 16) for k in range(1, 17)]
    assert line["first_orderness"] == pytest.approx(0, abs=1e-9)
    assert line["straightness"] == pytest.approx(square * sum((1 - rate) ** 2 for rate in rates) / 16, rel=1e-4)
    bends = [[] for _ in range(PARTS)]
    for k in range(1, 16):  # between k / 16 and (k + 1) / 16
        bends[int((2 * k + 1) / 32 * PARTS)].append(square * (16 * (rates[k] - rates[k - 1])) ** 2)
    assert [line[key] for key in CURVES] == pytest.approx([sum(part) / len(part) for part in bends], rel=1e-3)


def test_parts_of_a_batch_and_few_steps(config):
    """Validation follows batches, of which two make a step here."""
    _, lines = train(config("parts", [measures(steps=3, samples=2)]), "--trainer.accumulate_grad_batches", "2")
    assert list(validated(lines)) == [1, 2, 3, 4] and {line["evaluations"] for line in lines if "loss" in line} == {16, 32}
    assert [key for key in CURVES if key in validated(lines)[2]] == ["curvature_t4", "curvature_t6"]


def test_a_resumed_run_measures_on(config):
    _, whole = train(config("whole", [EMA, measures()]))
    path = config("part", [EMA, measures()])
    train(path, "--trainer.max_steps", "3")
    _, lines = train(path)
    assert validated(lines) == validated(whole)


def in_two(tmp_path, path, strategy):
    """Train in two processes, validating after every step; return the run."""
    words = ("--trainer.devices", "2", "--trainer.strategy", strategy, "--trainer.val_check_interval", "1")
    Workspace(tmp_path).rectify("fit", "--config", path, *words, processes=2)
    return path.parent / "run"


def agree(run):
    """Check that all noises count alike in what is logged, whoever walked from them."""
    lines = validated(log(run))
    for step in (2, 4):
        found = trajectories(teacher.load(run / f"checkpoints/step={step:09d}.ckpt")[0], noises(5), steps=16)
        assert logged(lines[step]) == pytest.approx(flat(found), rel=1e-4)
    assert list(lines) == [1, 2, 3, 4]


def test_two_processes_share_the_walks(config, tmp_path):
    agree(in_two(tmp_path, config("run", [EMA, measures(samples=5)]), "ddp"))


def test_sharded_averages_are_measured_and_training_does_not_notice(config, tmp_path):
    plain, measured = (config(name, [EMA, *more]) for name, more in (("plain", []), ("measured", [measures(samples=5)])))
    plain, measured = (in_two(tmp_path, path, "fsdp2") for path in (plain, measured))
    agree(measured)
    assert equal(final(plain, 4), final(measured, 4))


def test_lent_weights_go_back_also_after_an_error():
    net = torch.nn.Linear(3, 3)
    own = {name: value.clone() for name, value in net.state_dict().items()}
    other = {name: value + 1 for name, value in own.items()}
    with pytest.raises(ZeroDivisionError), lent(net, other):
        assert equal(dict(net.state_dict()), other)
        raise ZeroDivisionError
    assert equal(dict(net.state_dict()), own)
    with lent(net, {}):
        assert equal(dict(net.state_dict()), own)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"samples": 0}, "samples is 0"), ({"steps": 1}, "steps is 1"), ({"seed": -1}, "seed is -1")],
)
def test_arguments_out_of_range_are_refused(arguments, said):
    with pytest.raises(ValueError, match=f"Measures: {said}, it must"):
        Measures(**arguments)


def test_runs_with_nothing_to_measure_are_refused(config, images, capfd):
    assert main(["fit", "--config", str(config("alone", [measures()], heldout=False))]) == 2
    assert "Measures: measures when the run validates, but there is no data.heldout" in capfd.readouterr().err
    path = config("wrong", [measures()])
    told = json.loads(path.read_text())
    told["model"] = {"class_path": "Autoencoder", "init_args": {"image_channels": 1}}
    path.write_text(json.dumps(told))
    assert main(["fit", "--config", str(path)]) == 2
    assert "Measures: measures generators, not Autoencoder; leave it out" in capfd.readouterr().err
    run, net = SimpleNamespace(world_size=65, datamodule=SimpleNamespace(heldout=images)), DiT(**DIT["init_args"])
    with pytest.raises(ValueError, match=r"samples \(64\) must be at least the number of processes, 65"):
        Measures().setup(run, Generator(Denoiser(net, Linear(), Velocity())), "fit")
