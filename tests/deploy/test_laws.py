"""`rectify fit` takes every law, weight and error by its short name, and logs the loss by time."""

import json

import pytest
from PIL import Image

from data.images import pack
from deploy.cli import main
from trainer.errors import Error
from trainer.times import Times
from trainer.weights import Weight


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A set of 16 tiny images."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(18):
        Image.new("L", (8, 8), 14 * i).save(folder / f"{i:02d}.png")
    pack(folder / "set", folder, size=8, grey=True)
    return folder / "set" / "train"


@pytest.fixture
def train(images, tmp_path):
    """Train two steps in this process; return the exit code."""

    def run(*words):
        net = {"class_path": "DiT", "init_args": {"size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 1, "heads": 2}}
        config = {
            "out": str(tmp_path / "run"),
            "model": {
                "class_path": "Generator",
                "init_args": {
                    "denoiser": {
                        "class_path": "Denoiser",
                        "init_args": {"net": net, "interpolant": "VariancePreserving", "prediction": "Noise"},
                    },
                    "objective": "Matching",
                },
            },
            "data": {"source": {"class_path": "Images", "init_args": {"path": str(images)}}, "batch": 8},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
            "trainer": {"max_steps": 2, "accelerator": "cpu", "logger": False},
            "metrics": {"every": 1},
        }
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(config))
        return main(["fit", "--config", str(path), *words])

    return run


def named(base):
    return [cls.__name__ for cls in base.__subclasses__() if cls.__module__.startswith("trainer.")]


OBJECTIVE = "--model.objective.init_args"


@pytest.mark.parametrize(
    ("option", "name"), [(o, n) for o, base in (("times", Times), ("weight", Weight), ("error", Error)) for n in named(base)]
)
def test_short_names_train(train, tmp_path, option, name):
    assert not train(f"{OBJECTIVE}.{option}", name)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] > 0 for line in lines)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_log_tells_the_loss_by_time(train, tmp_path, parts):
    """Stratified times fall evenly into the bins: the mean of their losses is the loss, in one batch or accumulated."""
    assert not train("--trainer.accumulate_grad_batches", str(parts))
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()):
        told = [line[f"loss_t{i}"] for i in range(4)]
        assert sum(told) / 4 == pytest.approx(line["loss"], rel=1e-5) and max(told) > min(told)


def test_bins_may_be_empty_or_none(train, tmp_path):
    narrow = (f"{OBJECTIVE}.times", "LogitNormal", f"{OBJECTIVE}.times.init_args.std", "0.01")
    assert not train(*narrow, "--metrics.bins", "5")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all("loss_t2" in line and not {"loss_t1", "loss_t3"} & line.keys() for line in lines)
    assert all(line["loss_t2"] == pytest.approx(line["loss"], rel=1e-5) for line in lines)
    assert train("--metrics.bins", "-1", "--out", str(tmp_path / "other")) == 2


def test_arguments_of_a_law_are_checked(train, capfd):
    assert train(f"{OBJECTIVE}.times", "Mode", f"{OBJECTIVE}.times.init_args.s", "3") == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rectify: error: ") and "Mode: s is 3.0, it must lie in [-1, 1.752]" in said
