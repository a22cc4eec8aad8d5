"""Teachers that are told texts, as Stable Diffusion and SDXL are: their pairs, their students, and back to plain diffusers."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from data.files import read_json
from data.pairs import PairSet
from deploy.cli import main
from deploy.pretrained import flow_scheduler, on_grid_of
from models import teacher
from models.interpolant import Linear
from models.sampler import DDIM
from models.text import Prompts
from tests.conftest import REPOSITORY
from tests.deploy.text.conftest import TEXTS

pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")

PLAIN = """
import sys
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert not {"models", "data", "trainer", "deploy"} & set(sys.modules), "code of ours was loaded"
pipe.set_progress_bar_config(disable=True)
asked = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np", "generator": torch.manual_seed(7)}
asked |= {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}  # ours is smaller than any of its bins
torch.save(torch.from_numpy(pipe(["zebra", "a cat"], **asked).images), sys.argv[2])
"""


def test_pairs_are_what_the_pipeline_itself_draws(folder, pairs):
    """The plain pipeline, guided at the same scale, from the same noises, told the same texts, each its own, on the same grid."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    told = {"guidance_scale": 5.0, "num_inference_steps": 5, "output_type": "latent"}
    if "StableDiffusion3" in type(pipe).__name__:
        pipe.scheduler, told["sigmas"] = FlowMatchEulerDiscreteScheduler(shift=1.0), [1.0, 0.8, 0.6, 0.4, 0.2]
    else:
        ends = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **ends)
    if "PixArt" in type(pipe).__name__:
        told |= {"use_resolution_binning": False, "clean_caption": False}
    pipe.set_progress_bar_config(disable=True)
    rows = [PairSet(pairs)[i] for i in range(16)]
    assert [row["condition"] for row in rows] == [i % 5 for i in range(16)]
    sigma = teacher.load(folder)[0].interpolant(torch.ones(()))[1]  # where a chain ends: not quite 1
    eps, asked = sigma * torch.stack([row["noise"] for row in rows]), [TEXTS[row["condition"]] for row in rows]
    ours = torch.stack([row["sample"] for row in rows])
    theirs = pipe(asked, latents=eps, **told).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    asked = [TEXTS[(row["condition"] + 1) % 5] for row in rows]
    other = pipe(asked, latents=eps, **told).images
    assert ((other - theirs).flatten(1).norm(dim=1) > 10 * (ours - theirs).flatten(1).norm(dim=1)).all()


def test_no_text_is_the_empty_one(folder, prompts):
    denoiser, _, condition = teacher.load(folder)
    x_t, t = torch.randn(3, 4, 8, 8), torch.tensor([0.2, 0.5, 1.0])
    told = condition.of(prompts)
    with torch.no_grad():
        nothing, empty, cat = (
            denoiser(x_t, t, cond)[1] for cond in (None, told(torch.tensor([3] * 3)), told(torch.ones(3).long()))
        )
    if not told.zeros:  # SDXL tells zeros of no text, which is not the empty one
        torch.testing.assert_close(nothing, empty)
    assert (nothing - empty).abs().max() > 1e-3 or not told.zeros
    assert (nothing - cat).abs().max() > 1e-3
    hidden = Prompts(str(folder), str(prompts), dropout=0.5)(torch.tensor([0, 1, 4]), lambda: torch.tensor([0.4, 0.6, 0.1]))
    torch.testing.assert_close(hidden[1:2], told(torch.tensor([1])))
    torch.testing.assert_close(hidden[::2], denoiser.net.nothing.expand(2, -1, -1))


def train(monkeypatch, tmp_path, folder, pairs, prompts, *words):
    """Train by the published configuration, in a folder in which it finds what it names; return its run."""
    (runs := tmp_path / "runs/text").mkdir(parents=True, exist_ok=True)
    for name, place in (("teacher", folder), ("pairs", pairs), ("prompts.txt", prompts)):
        if not (runs / name).exists():
            (runs / name).symlink_to(place)
    monkeypatch.chdir(tmp_path)
    short = ["--data.batch", "8", "--optimizer.lr", "0.01", "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    config = ["--config", str(REPOSITORY / "configs/text/student.yaml")]
    assert main(["fit", *config, *short, "--trainer.callbacks.init_args.decay", "0.5", *words]) == 0
    return runs / "student"


def ours(run, prompts):
    denoiser, codec, condition = teacher.load(run)
    told = condition.of(prompts)(torch.tensor([4, 1]))
    eps, walk = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(7)), DDIM(4)
    if isinstance(denoiser.interpolant, Linear):  # there a pipeline's grid begins at .999
        walk, denoiser = on_grid_of(flow_scheduler(), denoiser, 4)
    x = walk.walk(denoiser, eps, told)[-1]
    return (codec.decode(x) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("folder", "lora"), [("sd", 2), ("sdxl", 0), ("sd3", 2), ("pixart", 0)], indirect=["folder"])
def test_a_student_goes_back_to_plain_stable_diffusion(folder, prompts, pairs, tmp_path, monkeypatch, lora):
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'rectify[lora]'") if lora else None
    run = train(monkeypatch, tmp_path, folder, pairs, prompts, "--trainer.max_steps", "3", "--model.denoiser.lora", str(lora))
    shutil.move(run, tmp_path / "moved")  # a run is whole by itself
    for name in ("teacher", "prompts.txt"):
        (tmp_path / "runs/text" / name).unlink()
    assert main(["export", "--run", "moved", "--out", "runs/text/export", "--steps", "4"]) == 0
    out = tmp_path / "runs/text/export"
    assert "_name_or_path" not in (index := json.loads((out / "model_index.json").read_text())) and not index.get(
        "requires_safety_checker"
    )
    subprocess.run([sys.executable, "-P", "-c", PLAIN, str(out), str(tmp_path / "theirs.pt")], check=True, cwd=tmp_path)
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True).permute(0, 3, 1, 2)
    drawn = ours(tmp_path / "moved", prompts)
    torch.testing.assert_close(theirs, drawn, rtol=0, atol=1e-4)
    assert (drawn - ours(folder, prompts)).abs().max() > 1e-3
    assert read_json(out / "export.json")["max_abs_diff"] < 1e-4 and '["a prompt"]' in (out / "README.md").read_text()
    delta = ["delta", "--run", "moved", "--base", str(folder), "--out", "delta.safetensors"]
    if not peft:
        again = ["--base", str(folder), "--apply", "delta.safetensors", "--out", "moved/consolidated/again.safetensors"]
        assert main(delta) == 0 and main(["delta", *again]) == 0
        one, two = (teacher.load(tmp_path / place)[0] for place in ("moved", again[-1]))
        assert teacher.fingerprint(one) == teacher.fingerprint(two)
    else:
        assert main(delta) == 2
        denoiser = teacher.load(folder)[0]  # of the base's network, in which peft puts the adapters
        denoiser.net.model = peft.PeftModel.from_pretrained(denoiser.net.model, out / "lora").eval()
        asked = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), Prompts(str(folder), str(prompts))(torch.tensor([4, 1]))
        with torch.no_grad():
            (one, _), (two, _) = (net(*asked) for net in (denoiser, teacher.load(out)[0]))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_where_it_was(folder, prompts, pairs, tmp_path, monkeypatch):
    more = ("--trainer.precision", "32-true", "--model.condition.dropout", "0.3")
    (tmp_path / "whole").mkdir()
    undisturbed = train(monkeypatch, tmp_path / "whole", folder, pairs, prompts, "--trainer.max_steps", "4", *more)
    train(monkeypatch, tmp_path, folder, pairs, prompts, "--trainer.max_steps", "2", *more)
    parts = train(monkeypatch, tmp_path, folder, pairs, prompts, "--trainer.max_steps", "4", *more)
    one, two = (teacher.read(teacher.newest(run)) for run in (undisturbed, parts))
    for part in ("state_dict", "ema"):
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items())


def test_images_are_drawn_of_prompts(folder, prompts, tmp_path, capfd):
    words = ["sample", "--run", str(folder), "--steps", "1", "--count", "10", "--out", str(tmp_path / "drawn.png")]
    assert main([*words, "--prompts", str(prompts)]) == 0 and (tmp_path / "drawn.png").stat().st_size
    assert main(words) == 2 and "is told texts; give them" in capfd.readouterr().err


class Means(torch.nn.Module):
    """Features: the means of parts of an image."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.mark.parametrize("folder", ["sd"], indirect=True)
def test_a_text_model_is_evaluated_on_images_without_labels(folder, prompts, tmp_path):
    for i in range(24):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    assert main(["pack", "--images", str(tmp_path), "--out", str(tmp_path / "set"), "--size", "16"]) == 0
    torch.jit.script(Means()).save(tmp_path / "means.pt")
    words = ["--run", str(folder), "--images", str(tmp_path / "set"), "--out", str(tmp_path / "evaluation"), "--samples", "100"]
    more = ["--steps", "[1,2]", "--extractor", str(tmp_path / "means.pt"), "--prompts", str(prompts), "--guidance", "2"]
    assert main(["evaluate", *words, *more]) == 0
    found = read_json(tmp_path / "evaluation/evaluation.json")["steps"]
    assert [found[steps]["nfe"] for steps in ("1", "2")] == [2, 4]
    assert all(row["fd"] > 0 and "accuracy" not in row for row in found.values())
