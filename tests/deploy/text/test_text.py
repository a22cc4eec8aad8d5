"""Text-to-image teachers, e.g. Stable Diffusion: their pairs, and students for plain diffusers."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

from data.files import read_json
from data.pairs import PairSet
from models.checkpoint import fingerprint, load_checkpoint, newest_checkpoint, read_checkpoint
from models.diffusers.scheduler import flow_scheduler, on_scheduler_grid
from models.diffusers.text import Prompts
from models.interpolant import Linear
from models.sampler import DDIM
from tests.deploy.text.conftest import TEXTS
from tests.helpers.commands import run_command, succeed
from tests.helpers.refusals import assert_refused
from tests.helpers.training import study_config, train

pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")

PLAIN = """
import sys
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert not {"models", "data", "trainer", "deploy"} & set(sys.modules), "code of ours was loaded"
pipe.set_progress_bar_config(disable=True)
settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}
if "PixArt" in type(pipe).__name__:
    settings["use_resolution_binning"] = False  # ours is smaller than any of its bins
images = pipe(["zebra", "a cat"], generator=torch.manual_seed(7), **settings).images
torch.save(torch.from_numpy(images), sys.argv[2])
"""


def sample_at_guidance_five(
    folder: Path, texts: list[str], noise: torch.Tensor, negative: str | None = None
) -> torch.Tensor:
    """Return the latents that the plain pipeline draws in five steps at guidance 5, on our grid."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"guidance_scale": 5.0, "num_inference_steps": 5}
    if negative is not None:
        settings["negative_prompt"] = [negative] * len(texts)
    kind = type(pipe).__name__
    if "StableDiffusion3" in kind:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        settings["sigmas"] = [1.0, 0.8, 0.6, 0.4, 0.2]
    else:
        ends = {
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",
        }
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **ends)
    if "PixArt" in kind:
        settings |= {"use_resolution_binning": False, "clean_caption": False}
    return pipe(texts, latents=noise, output_type="latent", **settings).images


def test_every_pair_is_what_the_pipeline_itself_draws_from_its_text(folder, pairs):
    stored = [PairSet(pairs)[i] for i in range(16)]
    lines = [pair["condition"] for pair in stored]
    assert lines == [i % 5 for i in range(16)]

    # The same noise, text, scale and grid give the same latents.
    noise = draw_noise(folder, pairs)
    ours = torch.stack([pair["sample"] for pair in stored])
    theirs = sample_at_guidance_five(folder, [TEXTS[line] for line in lines], noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)

    # Other texts give others.
    other = sample_at_guidance_five(folder, [TEXTS[(line + 1) % 5] for line in lines], noise)
    gap = (ours - theirs).flatten(1).norm(dim=1)
    assert ((other - theirs).flatten(1).norm(dim=1) > 10 * gap).all()


def draw_noise(folder: Path, pairs: Path) -> torch.Tensor:
    """Return the states at which the pipeline began the pairs of a set."""
    sigma = load_checkpoint(folder)[0].interpolant(torch.ones(()))[1]  # a chain ends just below 1
    stored = PairSet(pairs)
    return sigma * torch.stack([stored[i]["noise"] for i in range(len(stored))])


@pytest.mark.parametrize("negative", ["zebra", ""])
def test_guidance_leads_away_from_a_negative_prompt(folder, prompts, tmp_path, negative):
    words = ("--prompts", prompts, "--pairs", "2", "--steps", "5", "--guidance", "5")
    succeed(
        *("collect", "--teacher", folder, "--out", tmp_path / "set", *words),
        *("--negative_prompt", negative),
    )
    found = PairSet(tmp_path / "set")
    assert found.manifest["negative_prompt"] == negative
    ours = torch.stack([found[i]["sample"] for i in range(2)])
    noise = draw_noise(folder, tmp_path / "set")
    theirs = sample_at_guidance_five(folder, TEXTS[:2], noise, negative)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    if negative:
        other = sample_at_guidance_five(folder, TEXTS[:2], noise)
        assert (other - theirs).norm() > 10 * (ours - theirs).norm()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--guidance", "1", "--negative_prompt", "a cat"), ("negative_prompt", "guidance is 1")),
        (("--guidance", "5", "--negative_prompt", "red dog " * 70), ("negative_prompt", "tokens")),
    ],
    ids=["no guidance", "too long"],
)
def test_a_negative_prompt_without_effect_is_refused(
    folder, prompts, tmp_path, capfd, words, named
):
    base = ("collect", "--teacher", folder, "--out", tmp_path / "set", "--prompts", prompts)
    assert_refused(capfd, (*base, "--pairs", "2", *words), *named)
    assert not (tmp_path / "set").exists()


def test_without_a_text_the_network_reads_the_empty_one(folder, prompts):
    denoiser, _, condition = load_checkpoint(folder)
    encode = condition.with_file(prompts)
    x_t = torch.randn(3, 4, 8, 8)
    t = torch.tensor([0.2, 0.5, 1.0])
    with torch.no_grad():
        nothing = denoiser(x_t, t, None)[1]
        empty = denoiser(x_t, t, encode(torch.tensor([3, 3, 3])))[1]
        cat = denoiser(x_t, t, encode(torch.tensor([1, 1, 1])))[1]
    assert (nothing - cat).abs().max() > 1e-3
    if encode.zero_if_empty:  # SDXL encodes no text as zeros, which are not the empty text
        assert (nothing - empty).abs().max() > 1e-3
    else:
        torch.testing.assert_close(nothing, empty)


def test_dropout_replaces_texts_by_none(folder, prompts):
    chances = torch.tensor([0.4, 0.6, 0.1])
    half = Prompts(str(folder), str(prompts), dropout=0.5)
    encoded = half(torch.tensor([0, 1, 4]), lambda: chances)
    denoiser, _, condition = load_checkpoint(folder)
    expected = condition.with_file(prompts)(torch.tensor([1]))
    torch.testing.assert_close(encoded[1:2], expected)
    torch.testing.assert_close(encoded[::2], denoiser.net.empty_text.expand(2, -1, -1))


class Student:
    """Trains students by the published config, in a folder that holds what the config names."""

    def __init__(self, root: Path, folder: Path, pairs: Path, prompts: Path):
        self.root = root
        self.runs = root / "runs/text"
        self.runs.mkdir(parents=True)
        (self.runs / "teacher").symlink_to(folder)
        (self.runs / "pairs").symlink_to(pairs)
        (self.runs / "prompts.txt").symlink_to(prompts)

    def train(self, name: str, *words: object, steps: int) -> Path:
        """Train a student, and return its run."""
        short = ("--data.batch", "8", "--optimizer.lr", "0.01")
        average = ("--trainer.callbacks.init_args.decay", "0.5")
        config = study_config("text", "student")
        return train(config, self.runs / name, *short, *average, *words, steps=steps)


@pytest.fixture
def student(tmp_path, folder, pairs, prompts, monkeypatch):
    """Return a trainer of students, whose folder is the working directory."""
    monkeypatch.chdir(tmp_path)
    return Student(tmp_path, folder, pairs, prompts)


def sample_with_rectify(run: Path, prompts: Path) -> torch.Tensor:
    """Return two images that our sampler draws in four steps."""
    denoiser, codec, condition = load_checkpoint(run)
    encoded = condition.with_file(prompts)(torch.tensor([4, 1]))
    eps = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(7))
    sampler = DDIM(4)
    if isinstance(denoiser.interpolant, Linear):  # the grid of such a pipeline begins at .999
        sampler, denoiser = on_scheduler_grid(flow_scheduler(), denoiser, 4)
    x = sampler.integrate(denoiser, eps, encoded)[-1]
    return (codec.decode(x) / 2 + 0.5).clamp(0, 1)


def sample_with_diffusers(out: Path, folder: Path) -> torch.Tensor:
    """Return the same images, sampled by plain diffusers in a separate process."""
    words = [sys.executable, "-P", "-c", PLAIN, str(out), str(folder / "theirs.pt")]
    subprocess.run(words, check=True, cwd=folder)
    return torch.load(folder / "theirs.pt", weights_only=True).permute(0, 3, 1, 2)


def assert_delta_restores(run: str, base: Path, folder: Path) -> None:
    """Assert that a student is its base and a delta."""
    again = folder / "moved/consolidated/again.safetensors"
    succeed("delta", "--run", run, "--base", base, "--out", "delta.safetensors")
    succeed("delta", "--base", base, "--apply", "delta.safetensors", "--out", again)
    one, two = (load_checkpoint(path)[0] for path in (folder / run, again))
    assert fingerprint(one) == fingerprint(two)


def assert_encoders_are_copied(folder: Path, out: Path) -> None:
    """Assert that an export has the tokenizers and text encoders of a teacher, byte for byte."""
    expected, found = (
        json.loads((path / "model_index.json").read_text()) for path in (folder, out)
    )
    parts = [name for name in expected if name.startswith(("tokenizer", "text_encoder"))]
    for name in parts:
        assert found[name] == expected[name]
        files = [path for path in (folder / name).iterdir() if expected[name][0]]
        for path in files:
            assert (out / name / path.name).read_bytes() == path.read_bytes(), path


def assert_adapters_alone_restore(out: Path, base: Path, prompts: Path) -> None:
    """Assert that peft puts exported adapters into the base's network."""
    import peft

    denoiser = load_checkpoint(base)[0]
    adapted = peft.PeftModel.from_pretrained(denoiser.net.model, out / "lora")
    denoiser.net.model = adapted.eval()
    x_t = torch.randn(2, 4, 8, 8)
    t = torch.tensor([0.1, 0.9])
    encoded = Prompts(str(base), str(prompts))(torch.tensor([4, 1]))
    with torch.no_grad():
        found = denoiser(x_t, t, encoded)[0]
        expected = load_checkpoint(out)[0](x_t, t, encoded)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    # The pipeline with adapters makes the images of the merged one.
    merged = DiffusionPipeline.from_pretrained(out)
    pipe = DiffusionPipeline.from_pretrained(base, scheduler=merged.scheduler)
    pipe.load_lora_weights(out / "lora")
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}
    images = []
    for each in (merged, pipe):
        each.set_progress_bar_config(disable=True)
        images.append(each(["zebra"], generator=torch.manual_seed(7), **settings).images)
    assert np.abs(images[0] - images[1]).max() < 1e-5


@pytest.mark.parametrize(
    ("folder", "lora"),
    [("sd", 2), ("sdxl", 0), ("sd3", 2), ("pixart", 0)],
    indirect=["folder"],
)
def test_a_student_goes_back_to_plain_diffusers(student, folder, prompts, tmp_path, lora):
    if lora:
        pytest.importorskip("peft", reason="needs peft: pip install 'rectify[lora]'")
    run = student.train("student", "--model.denoiser.lora", lora, steps=3)

    # A run needs neither its folder's name nor its teacher.
    shutil.move(run, tmp_path / "moved")
    (student.runs / "teacher").unlink()
    (student.runs / "prompts.txt").unlink()
    succeed("export", "--run", "moved", "--out", "runs/text/export", "--steps", "4")
    out = student.runs / "export"

    # Plain diffusers draws the same images, and not the teacher's.
    ours = sample_with_rectify(tmp_path / "moved", prompts)
    torch.testing.assert_close(sample_with_diffusers(out, tmp_path), ours, rtol=0, atol=1e-4)
    assert (ours - sample_with_rectify(folder, prompts)).abs().max() > 1e-3

    # The folder has a plain index, the gap to our images, and a card that uses texts.
    assert_encoders_are_copied(folder, out)
    index = json.loads((out / "model_index.json").read_text())
    assert "_name_or_path" not in index
    assert not index.get("requires_safety_checker")
    assert read_json(out / "export.json")["max_abs_diff"] < 1e-4
    card = (out / "README.md").read_text()
    assert '["a prompt"]' in card
    assert "pipeline_tag: text-to-image" in card
    default = inspect.signature(DiffusionPipeline.from_pretrained(out).__call__)
    assert f"guides at {default.parameters['guidance_scale'].default:g}" in card

    # The difference to the teacher is a delta, or the adapters.
    if not lora:
        assert_delta_restores("moved", folder, tmp_path)
        return
    assert run_command("delta", "--run", "moved", "--base", folder, "--out", "delta") == 2
    assert_adapters_alone_restore(out, folder, prompts)


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(student):
    words = ("--trainer.precision", "32-true", "--model.condition.dropout", "0.3")
    whole = student.train("whole", *words, steps=4)
    student.train("resumed", *words, steps=2)
    resumed = student.train("resumed", *words, steps=4)
    expected, found = (read_checkpoint(newest_checkpoint(run)) for run in (whole, resumed))
    for part in ("state_dict", "ema"):
        for key, value in expected[part].items():
            assert torch.equal(value, found[part][key]), key


def test_images_are_sampled_from_prompts(folder, prompts, tmp_path):
    out = tmp_path / "images.png"
    words = ("--steps", "1", "--count", "10", "--out", out)
    succeed("sample", "--run", folder, *words, "--prompts", prompts)
    assert out.stat().st_size


def test_drawing_without_prompts_is_refused(folder, tmp_path, capfd):
    words = ("--steps", "1", "--count", "10", "--out", tmp_path / "images.png")
    assert_refused(capfd, ("sample", "--run", folder, *words), "prompts", folder)


class BlockMeans(torch.nn.Module):
    """Features: the means of four blocks of an image."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.mark.parametrize("folder", ["sd"], indirect=True)
def test_a_text_model_is_measured_on_images_without_labels(folder, prompts, tmp_path):
    # Images, and an extractor of features.
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    succeed("pack", "--images", tmp_path, "--out", tmp_path / "set", "--size", "16")
    torch.jit.script(BlockMeans()).save(tmp_path / "means.pt")

    inputs = ("--run", folder, "--images", tmp_path / "set", "--prompts", prompts)
    settings = ("--samples", "100", "--steps", "[1,2]", "--guidance", "2")
    extractor = ("--extractor", tmp_path / "means.pt")
    out = tmp_path / "evaluation"
    succeed("evaluate", *inputs, *settings, *extractor, "--out", out)

    found = read_json(out / "evaluation.json")["steps"]
    assert found["1"]["nfe"] == 2
    assert found["2"]["nfe"] == 4
    assert all(row["fd"] > 0 and "accuracy" not in row for row in found.values())


def test_a_teacher_in_half_precision_gives_nearly_the_same_pairs(folder, prompts, pairs, tmp_path):
    words = ("--prompts", prompts, "--pairs", "16", "--steps", "5", "--guidance", "5")
    out = tmp_path / "set"
    succeed("collect", "--teacher", folder, "--out", out, *words, "--dtype", "bfloat16")
    found = PairSet(out)
    expected = PairSet(pairs)
    assert found.manifest["network_dtype"] == "bfloat16"
    assert found.manifest["teacher"] == expected.manifest["teacher"]
    one, two = (torch.stack([each[i]["sample"] for i in range(16)]) for each in (found, expected))
    assert 1e-4 < (one - two).norm() / two.norm() < 0.1


def test_text_encoders_in_half_precision_are_others(folder, prompts):
    half = Prompts(str(folder), str(prompts))
    half.encoder_dtype = torch.bfloat16
    whole = Prompts(str(folder), str(prompts))
    found = half(torch.tensor([0, 1]))
    expected = whole(torch.tensor([0, 1]))
    assert found.dtype == torch.float32
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1
