"""Objectives of the digits' configurations, as a user runs them on the demo's artefacts."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deploy.cli import main
from trainer.lpips import alex


@pytest.fixture
def fit(workspace, tmp_path, monkeypatch):
    """Train three steps of a configuration in this process; return the exit code, the run at tmp_path/run."""
    monkeypatch.chdir(workspace.path)

    def run(name, *words):
        short = ("--trainer.max_steps", "3", "--trainer.logger", "false", "--metrics.every", "1", "--data.batch", "32")
        return main(["fit", "--config", f"configs/digits/{name}.yaml", "--out", str(tmp_path / "run"), *short, *words])

    return run


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]


def test_a_phased_student_is_trained_and_drawn_on_its_windows_edges(fit, tmp_path, capfd):
    assert not fit("phased")
    found, run = losses(tmp_path / "run"), tmp_path / "run"
    assert len(found) == 3 and all(0 < loss < 10 for loss in found)
    checkpoint = torch.load(next((run / "checkpoints").glob("*.ckpt")), weights_only=True)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    words = ["sample", "--run", str(run), "--count", "10", "--steps"]
    assert not main([*words, "4", "--out", str(tmp_path / "equal.png")])
    assert not main([*words, "4", "--edges", "[1, 0.75, 0.5, 0.25, 0]", "--out", str(tmp_path / "stated.png")])
    assert not main([*words, "4", "--edges", "[1, 0.9, 0.6, 0.3, 0]", "--out", str(tmp_path / "other.png")])
    pictures = [Image.open(tmp_path / f"{name}.png").tobytes() for name in ("equal", "stated", "other")]
    assert pictures[0] == pictures[1] != pictures[2]
    capfd.readouterr()
    assert main([*words, "3", "--edges", "[1, 0.75, 0.5, 0.25, 0]", "--out", str(tmp_path / "few.png")]) == 2
    assert "steps is 3, fewer than the 4 windows" in capfd.readouterr().err
    assert main([*words, "3", "--edges", "[1, 0.75, 0.5]", "--out", str(tmp_path / "few.png")]) == 2
    assert "must cover [0, 1]" in capfd.readouterr().err


OBJECTIVE = "--model.objective.init_args"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("windows", "[1, 0.5]"), "windows are [1.0, 0.5]; they must cover [0, 1]"),
        (("windows", "0"), "windows is 0"),
        (("steps", "0"), "Phased: steps is 0"),
        (("teacher.init_args.run", "nowhere"), "nowhere: no such run folder"),
    ],
)
def test_what_a_phased_student_cannot_be_is_one_line(fit, capfd, words, said):
    assert fit("phased", f"{OBJECTIVE}.{words[0]}", words[1]) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("rectify: error: ") and said in line


def test_a_student_of_perflow_is_trained(fit, tmp_path):
    denoiser, windows = "--model.denoiser.init_args", "[1, 0.5, 0.2, 0]"
    straight = ("--model.denoiser.init_args.interpolant", "Piecewise", f"{denoiser}.interpolant.init_args.interpolant", "Linear")
    same = (f"{denoiser}.interpolant.init_args.windows", windows, f"{OBJECTIVE}.windows", windows)
    assert not fit("phased", *straight, *same)
    assert len(losses(tmp_path / "run")) == 3


def test_step_maps_are_trained_on_trajectories_and_on_pairs(fit, tmp_path):
    assert not fit("stations")
    assert len(losses(tmp_path / "run")) == 3
    assert not fit("student", "--model.objective", "Stations", "--out", str(tmp_path / "paired"))
    assert len(losses(tmp_path / "paired")) == 3


def test_one_step_regression_is_trained_with_lpips_on_decoded_latents(fit, tmp_path, capfd):
    assert not fit("regression")
    plain = losses(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "plain")
    perceptual = (f"{OBJECTIVE}.perceptual", "Perceptual", f"{OBJECTIVE}.perceptual.init_args.weights", str(tmp_path / "lpips"))
    assert fit("regression", *perceptual) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rectify: error: ") and "lpips: no such file; LPIPS needs its weights" in said
    trunk, taps = alex()
    tensors = {f"features.{name}": value for name, value in trunk.state_dict().items()}
    linear = {f"lin{i}.model.1.weight": torch.rand(1, trunk[place - 1].out_channels, 1, 1) for i, place in enumerate(taps)}
    save_file(tensors | linear, tmp_path / "lpips")
    assert not fit("regression", *perceptual, f"{OBJECTIVE}.perceptual.init_args.codec", "runs/demo/latents/codec")
    assert len(plain) == 3 and losses(tmp_path / "run")[0] > plain[0]
