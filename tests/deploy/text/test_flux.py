"""Flux as a teacher: it reads a scale of guidance, its states are packed into tokens, its time runs from 0 to 1."""

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

import deploy.pretrained
from data.pairs import PairSet
from deploy.cli import main
from models import teacher
from tests.conftest import REPOSITORY

pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")

from tests import published


def test_flux_reads_a_scale_of_guidance_and_goes_back(tmp_path, monkeypatch):
    """Its pairs at a scale are the pipeline's own, at one evaluation each; a student of them is that pipeline again."""
    published.pipeline("flux", tmp_path).save_pretrained(tmp_path / "teacher")
    (prompts := tmp_path / "prompts.txt").write_text("a red dog\na cat\n")
    words = ["--prompts", str(prompts), "--pairs", "2", "--steps", "2", "--guidance", "5", "--out", str(tmp_path / "pairs")]
    assert main(["collect", "--teacher", str(tmp_path / "teacher"), *words]) == 0
    pairs = PairSet(tmp_path / "pairs")
    assert pairs.manifest["evaluations"] == 4
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    pipe.set_progress_bar_config(disable=True)
    eps = pipe._pack_latents(torch.stack([pairs[i]["noise"] for i in (0, 1)]), 2, 4, 128, 128)
    told = {"num_inference_steps": 2, "latents": eps, "output_type": "latent"}
    drawn, other = (
        pipe._unpack_latents(pipe(["a red dog", "a cat"], guidance_scale=w, **told).images, 256, 256, pipe.vae_scale_factor)
        for w in (5.0, 1.0)
    )
    mine = torch.stack([pairs[i]["sample"] for i in (0, 1)])
    torch.testing.assert_close(mine, drawn, rtol=1e-3, atol=1e-2)
    assert (other - drawn).norm() > 10 * (mine - drawn).norm()
    monkeypatch.setattr(deploy.pretrained, "CHECKED", (1, 2))  # its states are large
    made = {name: str(tmp_path / name) for name in ("teacher", "pairs", "student", "export")}
    words = [
        "--config",
        str(REPOSITORY / "configs/text/student.yaml"),
        "--out",
        made["student"],
        "--data.source.path",
        made["pairs"],
    ]
    words += [
        "--model.denoiser.folder",
        made["teacher"],
        "--model.initial",
        made["teacher"],
        "--model.codec",
        made["teacher"] + "/vae",
    ]
    words += ["--model.condition.encoder", made["teacher"], "--model.condition.path", str(prompts), "--data.source.keep", "1"]
    few = ["--trainer.max_steps", "1", "--data.batch", "2", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    assert main(["fit", *words, *few]) == 0
    assert main(["export", "--run", made["student"], "--out", made["export"], "--steps", "4"]) == 0
    assert teacher.load(tmp_path / "export")[0].net.kind == "FluxTransformer2DModel"
