"""Objectives of the digits' configs, trained on the demo's artefacts as a user would."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.commands import succeed
from tests.helpers.refusals import assert_refused
from tests.helpers.training import fit_words, losses, study_config, train
from trainer.objectives.parts.lpips import alex

OBJECTIVE = "--model.objective.init_args"
DENOISER = "--model.denoiser.init_args"
SHORT = ("--data.batch", "32", "--metrics.every", "1")


@pytest.fixture(autouse=True)
def inside_workspace(workspace, monkeypatch):
    """Run commands in the folder that holds runs/demo."""
    monkeypatch.chdir(workspace.path)


def digits(name: str) -> tuple[Path, ...]:
    """Return the files of a config of the digits."""
    return study_config("digits", name)


@pytest.fixture(scope="module")
def phased_run(workspace, tmp_path_factory):
    """Return the run of a phased student after three steps."""
    run = tmp_path_factory.mktemp("phased") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.path)
        return train(digits("phased"), run, *SHORT, steps=3)


def test_a_phased_student_is_trained(phased_run):
    found = losses(phased_run)
    assert len(found) == 3
    assert all(0 < loss < 10 for loss in found)


def test_a_phased_run_holds_no_weights_of_its_teacher(phased_run):
    path = next((phased_run / "checkpoints").glob("*.ckpt"))
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert not any("teacher" in name for name in weights)


def sample(run: Path, file: Path, *words: str) -> bytes:
    """Return the pixels of ten images of a run, sampled in four steps."""
    succeed("sample", "--run", run, "--count", "10", "--steps", "4", *words, "--out", file)
    return Image.open(file).tobytes()


def test_a_phased_student_is_sampled_on_the_edges_of_its_windows(phased_run, tmp_path):
    default = sample(phased_run, tmp_path / "default.png")
    same = sample(phased_run, tmp_path / "same.png", "--edges", "[1, 0.75, 0.5, 0.25, 0]")
    other = sample(phased_run, tmp_path / "other.png", "--edges", "[1, 0.9, 0.6, 0.3, 0]")
    assert default == same
    assert default != other


@pytest.mark.parametrize(
    ("edges", "named"),
    [
        ("[1, 0.75, 0.5, 0.25, 0]", ("steps", "3", "windows", "4", "[1.0, 0.75, 0.5, 0.25, 0.0]")),
        ("[1, 0.75, 0.5]", ("[0, 1]",)),
    ],
    ids=["fewer steps than windows", "part of the time"],
)
def test_edges_that_do_not_fit_are_refused(phased_run, tmp_path, capfd, edges, named):
    words = ("--count", "10", "--steps", "3", "--edges", edges, "--out", tmp_path / "few.png")
    assert_refused(capfd, ("sample", "--run", phased_run, *words), *named)


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("windows", "[1, 0.5]", ("windows", "[1.0, 0.5]", "[0, 1]")),
        ("windows", "0", ("windows", "0")),
        ("steps", "0", ("Phased", "steps", "0")),
        ("teacher.init_args.run", "nowhere", ("nowhere",)),
    ],
)
def test_a_value_that_phased_cannot_have_is_refused(tmp_path, capfd, option, value, named):
    words = (*SHORT, f"{OBJECTIVE}.{option}", value)
    assert_refused(capfd, fit_words(digits("phased"), tmp_path / "run", *words, steps=3), *named)


def test_a_perflow_student_is_trained(tmp_path):
    windows = "[1, 0.5, 0.2, 0]"
    piecewise = (
        *(f"{DENOISER}.interpolant", "Piecewise"),
        *(f"{DENOISER}.interpolant.init_args.interpolant", "Linear"),
        *(f"{DENOISER}.interpolant.init_args.windows", windows),
    )
    objective = (f"{OBJECTIVE}.windows", windows)
    run = train(digits("phased"), tmp_path / "run", *SHORT, *piecewise, *objective, steps=3)
    assert len(losses(run)) == 3


def test_step_maps_are_trained_on_trajectories(tmp_path):
    run = train(digits("step-maps"), tmp_path / "run", *SHORT, steps=3)
    assert len(losses(run)) == 3


def test_step_maps_are_trained_on_stored_samples(tmp_path):
    words = (*SHORT, "--model.objective", "StepMaps")
    run = train(digits("student"), tmp_path / "run", *words, steps=3)
    assert len(losses(run)) == 3


def perceptual_words(weights: Path) -> tuple[object, ...]:
    """Return the words that add LPIPS with these weights to the regression."""
    perceptual = f"{OBJECTIVE}.perceptual"
    return (*SHORT, perceptual, "Perceptual", f"{perceptual}.init_args.weights", weights)


def test_perceptual_regression_needs_a_file_of_weights(tmp_path, capfd):
    words = perceptual_words(tmp_path / "lpips")
    command = fit_words(digits("regression"), tmp_path / "run", *words, steps=3)
    assert_refused(capfd, command, tmp_path / "lpips")


def write_random_weights(path: Path) -> None:
    """Write a random AlexNet, as torchvision names its tensors."""
    trunk, _ = alex()
    tensors = {f"features.{name}": value for name, value in trunk.state_dict().items()}
    save_file(tensors, path)


def test_perceptual_regression_is_trained_on_decoded_latents(tmp_path):
    plain = losses(train(digits("regression"), tmp_path / "plain", *SHORT, steps=3))
    write_random_weights(tmp_path / "lpips")
    codec = (f"{OBJECTIVE}.perceptual.init_args.codec", "runs/demo/latents/codec")
    words = (*perceptual_words(tmp_path / "lpips"), *codec)
    found = losses(train(digits("regression"), tmp_path / "run", *words, steps=3))
    assert len(plain) == 3
    assert found[0] > plain[0]
