"""Flux as a teacher: it reads a guidance scale, and its states are packed into tokens."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import deploy.export
from data.pairs import PairSet
from models.checkpoint import load_checkpoint
from tests.deploy.text.conftest import assert_diffusers_loads_adapters
from tests.helpers.commands import succeed
from tests.helpers.training import study_config, train

pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")

from tests import published

TEXTS = ["a red dog", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a published Flux."""
    path = tmp_path_factory.mktemp("published")
    published.pipeline("flux", path).save_pretrained(path / "teacher")
    return path / "teacher"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Return a file of TEXTS."""
    path = tmp_path_factory.mktemp("texts") / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(folder, prompts, tmp_path_factory):
    """Return two pairs of Flux, sampled in two steps at guidance 5."""
    path = tmp_path_factory.mktemp("pairs") / "set"
    words = ("--prompts", prompts, "--pairs", "2", "--steps", "2", "--guidance", "5")
    succeed("collect", "--teacher", folder, "--out", path, *words)
    return path


def sample_with_diffusers(folder: Path, noise: torch.Tensor, guidance: float) -> torch.Tensor:
    """Return the latents that the plain pipeline draws of TEXTS from these noises in two steps."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    tokens = pipe._pack_latents(noise, 2, 4, 128, 128)
    settings = {"num_inference_steps": 2, "latents": tokens, "output_type": "latent"}
    tokens = pipe(TEXTS, guidance_scale=guidance, **settings).images
    return pipe._unpack_latents(tokens, 256, 256, pipe.vae_scale_factor)


def test_pairs_equal_the_pipelines_samples_at_the_same_scale(folder, pairs):
    stored = [PairSet(pairs)[i] for i in (0, 1)]
    noise = torch.stack([pair["noise"] for pair in stored])
    ours = torch.stack([pair["sample"] for pair in stored])
    theirs = sample_with_diffusers(folder, noise, guidance=5.0)
    other = sample_with_diffusers(folder, noise, guidance=1.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    assert (other - theirs).norm() > 10 * (ours - theirs).norm()


def test_diffusers_loads_adapters_alone(folder, tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install 'rectify[lora]'")
    assert_diffusers_loads_adapters(folder, tmp_path / "lora")


def test_a_guided_step_costs_one_evaluation(pairs):
    assert PairSet(pairs).manifest["evaluations"] == 4  # two pairs in two steps


def test_a_student_of_flux_is_written_as_a_flux_again(
    folder, prompts, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(deploy.export, "PRETRAINED_STEPS", (1, 2))  # its states are large
    words = (
        *("--model.denoiser.folder", folder, "--model.initial", folder),
        *("--model.codec", folder / "vae"),
        *("--model.condition.encoder", folder, "--model.condition.path", prompts),
        *("--data.source.path", pairs, "--data.source.keep_fraction", "1", "--data.batch", "2"),
    )
    run = train(study_config("text", "student"), tmp_path / "run", *words, steps=1)
    succeed("export", "--run", run, "--out", tmp_path / "out", "--steps", "4")
    assert load_checkpoint(tmp_path / "out")[0].net.kind == "FluxTransformer2DModel"
