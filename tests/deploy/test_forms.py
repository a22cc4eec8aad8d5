"""The comparison of forms: all of them train, and their evaluations make a table."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import deploy.run
from data.files import read_json, write_json
from deploy.cli import main
from deploy.run import command, load
from models import teacher
from tests.conftest import REPOSITORY
from trainer import job
from trainer.evaluate import Drawing
from trainer.report.spread import BEGIN, END, markdown

PIPELINE = REPOSITORY / "configs/forms/pipeline.yaml"
FITS = [stage for stage in load(PIPELINE)["stages"] if stage["name"].startswith("fit-")]


def test_the_stages_are_every_form_and_seed_at_the_same_budget():
    stages = [stage["name"] for stage in load(PIPELINE)["stages"]]
    assert len(FITS) == 15 and len([name for name in stages if name.startswith("evaluate-")]) == 15
    budgets = {key for stage in FITS for key in stage["fit"] if key.startswith(("trainer.", "optimizer.", "data.batch"))}
    assert not budgets, "forms differ in nothing but what they are"


@pytest.mark.parametrize("stage", FITS[:5], ids=lambda stage: stage["name"])
def test_every_form_trains_and_samples(workspace, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(workspace.path)
    words = command(stage, tmp_path, quick=True)
    swap = {f"{tmp_path}/latents": "runs/demo/latents", f"{tmp_path}/latents/codec": "runs/demo/latents/codec"}
    assert not main([*(swap.get(word, word) for word in words), "--trainer.logger", "false"])
    run = tmp_path / stage["name"].removeprefix("fit-").removesuffix("-0") / "0"
    denoiser, _, _ = teacher.load(run)
    wanted = {key.rpartition(".")[2]: value for key, value in stage["fit"].items()}
    assert type(denoiser.interpolant).__name__ == wanted["interpolant"]
    assert type(denoiser.prediction).__name__ == wanted["prediction"]
    assert not main(["sample", "--run", str(run), "--out", str(tmp_path / "x.png"), "--steps", "2", "--sampler", "Heun"])


def test_the_quick_form_makes_a_table(workspace, tmp_path, monkeypatch, inside):
    monkeypatch.chdir(workspace.path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/classifier.safetensors").hardlink_to(workspace.path / "runs/demo/images/classifier.safetensors")
    deploy.run.run(PIPELINE, tmp_path, quick=True)
    text = (tmp_path / "forms.md").read_text()
    assert "**DPMSolver2M**, FD at NFE" in text and "| vp-noise | " in text


def test_a_list_of_samplers_is_evaluated_as_one_alone(workspace, tmp_path, monkeypatch):
    """Each in a folder of its own; DDIM's figures are those that the quick pipeline's evaluation with DDIM alone gave."""
    monkeypatch.chdir(workspace.path)
    words = ["--run", "runs/demo/teacher", "--images", "runs/demo/images", "--samples", "200", "--steps", "[1,4]"]
    assert not main(["evaluate", *words, "--sampler", "[DDIM,Heun]", "--out", str(tmp_path)])
    ddim, heun = (read_json(tmp_path / name / "evaluation.json") for name in ("DDIM", "Heun"))
    alone = read_json(workspace.path / "runs/demo/evaluation/teacher/evaluation.json")
    assert ddim["steps"] == {steps: alone["steps"][steps] for steps in ("1", "4")} and ddim["floors"] == alone["floors"]
    assert heun["steps"]["1"] == ddim["steps"]["1"] and heun["steps"]["4"]["nfe"] == 7 and heun["settings"]["sampler"] == "Heun"
    assert (tmp_path / "Heun" / "samples-4.png").is_file()


def test_samplers_that_draw_noise_draw_that_of_each_image(workspace, monkeypatch):
    """An image does not depend on which others are drawn beside it; one step draws nothing."""
    monkeypatch.chdir(workspace.path)
    with torch.inference_mode():
        drawing = Drawing(Path("runs/demo/teacher"), 1.0, 2, job.start(), "Renoising")
        whole, part, one = drawing.images(range(8), 3)[0], drawing.images(range(5, 8), 3)[0], drawing.images(range(8), 1)[0]
        torch.testing.assert_close(whole[5:], part)
        drawing.walking("DDIM")
        torch.testing.assert_close(drawing.images(range(8), 1)[0], one)
        assert (drawing.images(range(8), 3)[0] - whole).abs().flatten(1).max(1).values.min() > 0.01


@pytest.fixture
def evaluations(workspace, tmp_path):
    """Two evaluations that the quick pipeline made, laid out as if they were two seeds of one model."""
    for seed, run in enumerate(("teacher", "student")):
        place = tmp_path / "evaluation" / "model" / str(seed) / "DDIM"
        place.mkdir(parents=True)
        shutil.copy(workspace.path / "runs/demo/evaluation" / run / "evaluation.json", place)
    return tmp_path / "evaluation"


def test_the_table_tells_the_median_and_the_ends(evaluations, tmp_path):
    out = tmp_path / "table.md"
    out.write_text(f"by hand\n\n{BEGIN.format('table')}\nold\n{END.format('table')}\n\nmore by hand\n")
    for _ in range(2):
        assert not main(["table", "--runs", str(evaluations), "--out", str(out)])
        text = out.read_text()
        assert text.startswith("by hand\n\n") and text.endswith("\n\nmore by hand\n") and "old" not in text
    found, one, two = (read_json(path) for path in (out.with_suffix(".json"), *sorted(evaluations.rglob("*.json"))))
    row = found["models"]["model"]["DDIM"]["4"]
    fds = [evaluation["steps"]["4"]["fd"] for evaluation in (one, two)]
    assert row["nfe"] == 4 and row["fd"]["values"] == dict(zip("01", fds))
    assert [row["fd"][key] for key in ("least", "median", "largest")] == [min(fds), sum(fds) / 2, max(fds)]
    assert markdown(found) in text and "| model | 1 | 2 | 4 | 8 | 32 | accuracy, recall at the most |" in text
    assert Image.open(out.with_suffix(".png")).size[1] > 300


def test_what_cannot_be_compared_is_refused(evaluations, tmp_path, capfd):
    words = ["table", "--runs", str(evaluations), "--out", str(tmp_path / "table.md")]
    (tmp_path / "table.md").write_text("my own notes")
    assert main(words) == 2 and "nothing of it is replaced" in capfd.readouterr().err
    path = sorted(evaluations.rglob("*.json"))[1]
    whole = read_json(path)
    write_json(path, {**whole, "steps": {"1": whole["steps"]["1"]}})
    assert main(words) == 2 and "evaluated at different steps" in capfd.readouterr().err
    write_json(path, {**whole, "settings": {**whole["settings"], "samples": 999}})
    assert main(words) == 2 and "cannot be compared" in capfd.readouterr().err
    shutil.rmtree(evaluations / "model")
    assert main(words) == 2 and "no MODEL/SEED/SAMPLER/evaluation.json below it" in capfd.readouterr().err
    assert (tmp_path / "table.md").read_text() == "my own notes"


def test_the_published_table_is_that_of_its_figures():
    text = (REPOSITORY / "docs/forms.md").read_text()
    found = read_json(REPOSITORY / "docs/forms.json")
    assert markdown(found) in text and found["models"].keys() == {stage["name"][4:-2] for stage in FITS}
    rows = [row for samplers in found["models"].values() for steps in samplers.values() for row in steps.values()]
    assert all(row["fd"]["values"].keys() == set("012") for row in rows)
    assert all(len(samplers) >= 3 for samplers in found["models"].values())
