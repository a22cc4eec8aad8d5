"""Images without classes: measured in the features of a network of one's own, and in nothing else."""

import json
import random

import pytest
import torch
from PIL import Image
from torch import nn

from data.files import read_json
from data.images import pack
from deploy.cli import main
from trainer.evaluate.extractor import Extractor

NET = {"size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photos in `loose` and, in three classes, in `sorted`; an extractor; a run of either."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for name, below in (("loose", "."), ("sorted", "{}")):
        for i in range(60):
            image = Image.frombytes("L", (8, 8), random.Random(i).randbytes(64))
            (path := folder / "photos" / name / below.format(i % 3)).mkdir(parents=True, exist_ok=True)
            image.save(path / f"{i}.png")
        pack(folder / name, folder / "photos" / name, size=8, grey=True)
    torch.jit.save(torch.jit.script(nn.AvgPool2d(4)), str(folder / "pooled.pt"))
    train(folder / "free", folder / "loose", 0, "Unconditional")
    train(folder / "told", folder / "sorted", 3, {"class_path": "ClassLabel", "init_args": {"classes": 3}})
    return folder


def train(out, images, classes, condition):
    form = {"net": {"class_path": "DiT", "init_args": {**NET, "classes": classes}}, "interpolant": "Linear"}
    denoiser = {"class_path": "Denoiser", "init_args": {**form, "prediction": "Velocity"}}
    arguments = {"denoiser": denoiser, "objective": "Matching", "condition": condition}
    config = {
        "out": str(out),
        "model": {"class_path": "Generator", "init_args": arguments},
        "data": {"source": {"class_path": "Images", "init_args": {"path": str(images / "train")}}, "batch": 16},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.05}},
        "trainer": {"max_steps": 8, "accelerator": "cpu", "logger": False},
    }
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(config))
    assert not main(["fit", "--config", str(path)])


def evaluate(place, run, images, out, *words):
    words = ("--run", str(place / run), "--images", str(place / images), "--out", str(out), *words)
    return main(["evaluate", *words, "--samples", "100", "--steps", "[1,2]"])


def pooled(place):
    return ("--extractor", str(place / "pooled.pt"))


@pytest.fixture(scope="module")
def evaluated(place):
    """A pipeline's folder with the evaluation of both runs on photos without classes, one as the other's teacher."""
    out = place / "pipeline"
    assert not evaluate(place, "free", "loose", out / "evaluation" / "free", *pooled(place))
    assert not evaluate(place, "told", "loose", out / "evaluation" / "told", *pooled(place), "--teacher", str(place / "free"))
    return out


def test_all_but_accuracy_is_measured(place, evaluated):
    for name in ("free", "told"):
        found = read_json(evaluated / "evaluation" / name / "evaluation.json")
        rows = [*found["steps"].values(), *([found["teacher"]] if name == "told" else [])]
        assert all(row["fd"] > 0 and {"recall", "precision", "nearest"} < row.keys() and "accuracy" not in row for row in rows)
        assert found["features"] == Extractor(place / "pooled.pt").about()
        assert "classifier_accuracy_heldout" not in found and found["floors"]["bootstrap"] > 0
    assert not (place / "loose" / "classifier.safetensors").exists()


def test_a_network_that_is_told_classes_draws_all_in_turn(place, evaluated, tmp_path):
    """In a grid of ten columns, as `rectify sample` does from the same noises."""
    words = ("--steps", "2", "--seed", "2", "--count", "40", "--columns", "10", "--out", str(tmp_path / "drawn.png"))
    assert not main(["sample", "--run", str(place / "told"), *words])
    ours = evaluated / "evaluation" / "told" / "samples-2.png"
    assert Image.open(ours).size == (80, 32) and ours.read_bytes() == (tmp_path / "drawn.png").read_bytes()
    free = evaluated / "evaluation" / "free" / "samples-2.png"
    assert Image.open(free).size == (80, 32)


def test_the_report_reads_it(evaluated):
    assert not main(["report", "--run", str(evaluated)])
    summary = read_json(evaluated / "summary.json")
    assert summary["told"]["1"]["fd"] > 0 and "classifier_accuracy_heldout" not in summary
    assert (evaluated / "report.html").exists()


def test_without_a_network_of_ones_own_it_is_refused(place, tmp_path, capfd):
    assert evaluate(place, "free", "loose", tmp_path / "out") == 2
    said = "has no class labels to train a classifier on; give --extractor, a network to measure with"
    assert capfd.readouterr().err == f"rectify: error: {place / 'loose'}: {said}\n"
    assert not (tmp_path / "out").exists()


def test_with_classes_accuracy_stays_the_classifiers(place, tmp_path):
    assert not evaluate(place, "told", "sorted", tmp_path, *pooled(place))
    found = read_json(tmp_path / "evaluation.json")
    assert all(0 <= row["accuracy"] <= 1 for row in found["steps"].values()) and 0 <= found["classifier_accuracy_heldout"] <= 1
    assert found["features"]["extractor"] == "pooled.pt" and Image.open(tmp_path / "samples-1.png").size == (24, 32)
