"""The comparison of interpolants and predictions: all train, and their evaluations make a table."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from data.files import read_json, write_json
from deploy.pipeline import command
from deploy.report.seeds import BEGIN, END, markdown
from deploy.run import run
from models.checkpoint import load_checkpoint
from tests.helpers.commands import REPOSITORY, succeed
from tests.helpers.pipelines import read_stages
from tests.helpers.refusals import assert_refused
from tests.helpers.training import read_config
from trainer.jobs.device import choose_device
from trainer.jobs.options import DEFAULT_SAMPLING
from trainer.jobs.run_sampler import RunSampler

PIPELINE = REPOSITORY / "configs/interpolants/pipeline.yaml"
STAGES = read_stages(PIPELINE)
FITS = [stage for stage in STAGES if stage["name"].startswith("fit-")]


@pytest.fixture
def inside_workspace(workspace, monkeypatch):
    """Run commands in the folder that holds runs/demo, and return it."""
    monkeypatch.chdir(workspace.path)
    return workspace.path


def test_every_model_has_three_seeds_trained_and_measured():
    assert len(FITS) == 15
    assert len([stage for stage in STAGES if stage["name"].startswith("evaluate-")]) == 15


def model_file(stage: dict[str, Any]) -> dict[str, Any]:
    """Return the content of the file that a model adds to the base."""
    base, more = stage["fit"]["config"]
    assert base == "configs/interpolants/base.yaml"
    return read_config((REPOSITORY / more,))


def test_all_models_have_the_same_budget():
    budget = ("trainer.", "optimizer.", "data.batch")
    for stage in FITS:
        assert model_file(stage).keys() == {"out", "model"}
        assert not [key for key in stage["fit"] if key.startswith(budget)]


@pytest.mark.parametrize("stage", FITS[:5], ids=lambda stage: stage["name"])
def test_every_model_trains_and_samples(inside_workspace, tmp_path, stage):
    # Train on the demo's latents.
    demo = {
        f"{tmp_path}/latents": "runs/demo/latents",
        f"{tmp_path}/latents/codec": "runs/demo/latents/codec",
    }
    words = [demo.get(word, word) for word in command(stage, tmp_path, smoke=True)]
    succeed(*words, "--trainer.logger", "false")

    # The run has the interpolant and the prediction of its stage.
    run = tmp_path / stage["name"].removeprefix("fit-").removesuffix("-0") / "0"
    denoiser, _, _ = load_checkpoint(run)
    wanted = model_file(stage)["model"]["init_args"]["denoiser"]["init_args"]
    assert type(denoiser.interpolant).__name__ == wanted["interpolant"]
    assert type(denoiser.prediction).__name__ == wanted["prediction"]

    words = ("--out", tmp_path / "x.png", "--steps", "2", "--sampler", "Heun")
    succeed("sample", "--run", run, *words)


@pytest.mark.slow
def test_the_smoke_run_makes_a_table(inside_workspace, tmp_path, inside):
    (tmp_path / "images").mkdir()
    classifier = inside_workspace / "runs/demo/images/classifier.safetensors"
    (tmp_path / "images/classifier.safetensors").hardlink_to(classifier)
    run(PIPELINE, tmp_path, smoke=True)
    text = (tmp_path / "interpolants.md").read_text()
    assert "**DPMSolver2M**" in text
    assert "| vp-noise | " in text


def test_each_of_several_samplers_is_measured_as_one_alone(inside_workspace, tmp_path):
    """The DDIM figures are those of the demo's smoke run, which measures with DDIM alone."""
    inputs = ("--run", "runs/demo/teacher", "--images", "runs/demo/images")
    words = ("--samples", "200", "--steps", "[1,4]", "--sampler", "[DDIM,Heun]")
    succeed("evaluate", *inputs, *words, "--out", tmp_path)
    ddim, heun = (read_json(tmp_path / name / "evaluation.json") for name in ("DDIM", "Heun"))
    ddim_alone = read_json(inside_workspace / "runs/demo/evaluation/teacher/evaluation.json")
    assert ddim["steps"] == {steps: ddim_alone["steps"][steps] for steps in ("1", "4")}
    assert ddim["floors"] == ddim_alone["floors"]
    assert heun["steps"]["1"]["nfe"] == 2
    assert heun["steps"]["4"]["nfe"] == 8
    assert heun["settings"]["sampler"] == "Heun"
    assert (tmp_path / "Heun" / "samples-4.png").is_file()


@pytest.fixture
def drawing(inside_workspace):
    """Return images of the demo's teacher, sampled with a stochastic sampler."""
    with torch.inference_mode():
        run = Path("runs/demo/teacher")
        yield RunSampler(run, DEFAULT_SAMPLING, 1.0, 2, choose_device(), "Renoising")


def test_an_image_does_not_depend_on_the_rest_of_its_batch(drawing):
    whole, _ = drawing.draw_images(range(8), 3)
    part, _ = drawing.draw_images(range(5, 8), 3)
    torch.testing.assert_close(whole[5:], part)


def test_a_stochastic_sampler_draws_no_noise_in_one_step(drawing):
    one, _ = drawing.draw_images(range(8), 1)
    several, _ = drawing.draw_images(range(8), 3)
    drawing.with_sampler("DDIM")
    deterministic, _ = drawing.draw_images(range(8), 1)
    torch.testing.assert_close(deterministic, one)
    other, _ = drawing.draw_images(range(8), 3)
    assert (other - several).abs().flatten(1).max(1).values.min() > 0.01


@pytest.fixture
def evaluations(workspace, tmp_path):
    """Return two evaluations of the demo, laid out as two seeds of one model."""
    for seed, name in enumerate(("teacher", "student")):
        folder = tmp_path / "evaluation" / "model" / str(seed) / "DDIM"
        folder.mkdir(parents=True)
        shutil.copy(workspace.path / "runs/demo/evaluation" / name / "evaluation.json", folder)
    return tmp_path / "evaluation"


def test_the_table_replaces_only_the_text_between_its_marks(evaluations, tmp_path):
    out = tmp_path / "table.md"
    begin, end = (mark.format("table") for mark in (BEGIN, END))
    out.write_text(f"by hand\n\n{begin}\nold\n{end}\n\nmore by hand\n")
    for _ in range(2):
        succeed("report", "seeds", "--runs", evaluations, "--out", out)
        text = out.read_text()
        assert text.startswith("by hand\n\n")
        assert text.endswith("\n\nmore by hand\n")
        assert "old" not in text


def test_the_table_has_the_median_and_the_ends_over_seeds(evaluations, tmp_path):
    out = tmp_path / "table.md"
    succeed("report", "seeds", "--runs", evaluations, "--out", out)
    found = read_json(out.with_suffix(".json"))
    seeds = [read_json(path) for path in sorted(evaluations.rglob("*.json"))]
    fds = [evaluation["steps"]["4"]["fd"] for evaluation in seeds]

    row = found["models"]["model"]["DDIM"]["4"]
    assert row["nfe"] == 4
    assert row["fd"]["values"] == {"0": fds[0], "1": fds[1]}
    assert row["fd"]["least"] == min(fds)
    assert row["fd"]["median"] == sum(fds) / 2
    assert row["fd"]["largest"] == max(fds)

    text = out.read_text()
    assert markdown(found) in text
    assert "| model | 1 | 2 | 4 | 8 | 32 | accuracy, recall" in text
    assert Image.open(out.with_suffix(".png")).size[1] > 300


def table_words(evaluations: Path) -> tuple[object, ...]:
    """Return the command that writes the table beside the evaluations."""
    out = evaluations.parent / "table.md"
    return ("report", "seeds", "--runs", evaluations, "--out", out)


def test_a_page_without_marks_is_not_replaced(evaluations, capfd):
    page = evaluations.parent / "table.md"
    page.write_text("my own notes")
    begin, end = (mark.format("table") for mark in (BEGIN, END))
    assert_refused(capfd, table_words(evaluations), page, begin, end)
    assert page.read_text() == "my own notes"


def keep_one_step(evaluation: dict[str, Any]) -> None:
    """Leave an evaluation only the figures of one step."""
    evaluation["steps"] = {"1": evaluation["steps"]["1"]}


def change_samples(evaluation: dict[str, Any]) -> None:
    """Change the number of samples that an evaluation was made with."""
    evaluation["settings"]["samples"] = 999


@pytest.mark.parametrize(
    ("change", "named"),
    [(keep_one_step, ("0, 1", "steps")), (change_samples, ("'samples': 999",))],
    ids=["steps", "samples"],
)
def test_evaluations_that_differ_are_refused(evaluations, capfd, change, named):
    path = sorted(evaluations.rglob("*.json"))[1]
    evaluation = read_json(path)
    change(evaluation)
    write_json(path, evaluation)
    assert_refused(capfd, table_words(evaluations), evaluations, *named)
    assert not (evaluations.parent / "table.md").exists()


def test_a_folder_without_evaluations_is_refused(evaluations, capfd):
    shutil.rmtree(evaluations / "model")
    named = (evaluations, "MODEL/SEED/SAMPLER/evaluation.json", "rectify evaluate")
    assert_refused(capfd, table_words(evaluations), *named)


@pytest.fixture(scope="module")
def published():
    """Return the published figures."""
    return read_json(REPOSITORY / "docs/interpolants.json")


def test_the_published_table_is_made_from_the_published_figures(published):
    assert markdown(published) in (REPOSITORY / "docs/interpolants.md").read_text()


def test_the_published_figures_are_complete(published):
    assert published["models"].keys() == {stage["name"][4:-2] for stage in FITS}
    for samplers in published["models"].values():
        assert len(samplers) >= 3
        rows = [row for steps in samplers.values() for row in steps.values()]
        assert all(row["fd"]["values"].keys() == {"0", "1", "2"} for row in rows)
