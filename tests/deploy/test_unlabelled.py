"""Images without classes: measured in the features of the user's network, and in nothing else."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from data.files import read_json
from data.pack import pack
from tests.helpers.commands import succeed
from tests.helpers.refusals import assert_refused
from tests.helpers.training import small_config, spec, train
from trainer.metrics.extractor import Extractor

UNCONDITIONAL = spec("Unconditional")
THREE_CLASSES = spec("ClassLabel", classes=3)


def save_photo(file: Path, seed: int) -> None:
    """Write a grey image of random pixels."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("L", (8, 8), random.Random(seed).randbytes(64)).save(file)


def train_on(images: Path, run: Path, classes: int, condition: dict[str, Any]) -> None:
    """Train a small generator for eight steps."""
    net = spec("DiT", size=8, channels=1, patch=4, width=16, depth=1, heads=2, classes=classes)
    source = spec("Images", path=str(images / "train"))
    config = small_config(source, net=net, batch=16, lr=0.05, condition=condition)
    train(config, run, steps=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two image sets, an extractor and a run on each set.

    The set `loose` and its run `unconditional` have no classes; `sorted` and `labelled` have three.
    """
    folder = tmp_path_factory.mktemp("unlabelled")
    for i in range(60):
        save_photo(folder / "photos/loose" / f"{i}.png", seed=i)
        save_photo(folder / "photos/sorted" / str(i % 3) / f"{i}.png", seed=i)
    for name in ("loose", "sorted"):
        pack(folder / name, folder / "photos" / name, size=8, grey=True)
    torch.jit.save(torch.jit.script(nn.AvgPool2d(4)), str(folder / "pooled.pt"))
    train_on(folder / "loose", folder / "unconditional", 0, UNCONDITIONAL)
    train_on(folder / "sorted", folder / "labelled", 3, THREE_CLASSES)
    return folder


def measure_words(folder: Path, run: str, images: str, out: Path) -> tuple[object, ...]:
    """Return the command that measures a run against an image set."""
    inputs = ("--run", folder / run, "--images", folder / images)
    return ("evaluate", *inputs, "--out", out, "--samples", "100", "--steps", "[1,2]")


@pytest.fixture(scope="module")
def pipeline(folder):
    """Return a pipeline's folder in which both runs were measured on images without classes.

    The run `unconditional` is the teacher of `labelled`.
    """
    out = folder / "pipeline"
    extractor = ("--extractor", folder / "pooled.pt")
    teacher = ("--teacher", folder / "unconditional")
    for run, more in (("unconditional", ()), ("labelled", teacher)):
        words = measure_words(folder, run, "loose", out / "evaluation" / run)
        succeed(*words, *extractor, *more)
    return out


@pytest.mark.parametrize("run", ["unconditional", "labelled"])
def test_everything_but_accuracy_is_measured(folder, pipeline, run):
    found = read_json(pipeline / "evaluation" / run / "evaluation.json")
    rows = [*found["steps"].values()]
    if run == "labelled":
        rows.append(found["teacher"])
    for row in rows:
        assert row["fd"] > 0
        assert {"recall", "precision", "nearest"} < row.keys()
        assert "accuracy" not in row
    assert "classifier_accuracy_heldout" not in found
    assert found["floors"]["bootstrap"] > 0
    assert found["features"] == Extractor(folder / "pooled.pt").describe()


def test_no_classifier_is_trained(folder, pipeline):
    assert not (folder / "loose" / "classifier.safetensors").exists()


def test_a_model_with_classes_draws_them_in_turn_as_the_sample_command_does(
    folder, pipeline, tmp_path
):
    grid = ("--steps", "2", "--seed", "2", "--count", "40", "--columns", "10")
    succeed("sample", "--run", folder / "labelled", *grid, "--out", tmp_path / "images.png")
    found = pipeline / "evaluation/labelled/samples-2.png"
    assert Image.open(found).size == (98, 38)
    assert found.read_bytes() == (tmp_path / "images.png").read_bytes()


def test_a_model_without_classes_is_sampled_in_ten_columns(pipeline):
    found = pipeline / "evaluation/unconditional/samples-2.png"
    assert Image.open(found).size == (98, 38)


def test_the_report_reads_measures_without_classes(pipeline):
    succeed("report", "--run", pipeline)
    summary = read_json(pipeline / "summary.json")
    assert summary["labelled"]["1"]["fd"] > 0
    assert "classifier_accuracy_heldout" not in summary
    assert (pipeline / "report.html").exists()


def test_without_an_extractor_images_without_classes_are_refused(folder, tmp_path, capfd):
    words = measure_words(folder, "unconditional", "loose", tmp_path / "out")
    assert_refused(capfd, words, folder / "loose", "--extractor", alone=True)
    assert not (tmp_path / "out").exists()


def test_with_classes_accuracy_is_the_classifiers_beside_an_extractor(folder, tmp_path):
    words = measure_words(folder, "labelled", "sorted", tmp_path)
    succeed(*words, "--extractor", folder / "pooled.pt")
    found = read_json(tmp_path / "evaluation.json")
    assert all(0 <= row["accuracy"] <= 1 for row in found["steps"].values())
    assert 0 <= found["classifier_accuracy_heldout"] <= 1
    assert found["features"]["extractor"] == "pooled.pt"
    assert Image.open(tmp_path / "samples-1.png").size == (28, 38)
