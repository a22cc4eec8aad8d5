"""Teachers that are told texts, as Stable Diffusion and SDXL are: their pairs, their students, and back to plain diffusers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from data.files import read_json
from data.pairs import PairSet
from deploy.cli import main
from models import teacher
from models.nets.pretrained import Pretrained
from models.sampler import DDIM
from models.text import Prompts
from trainer.module import Generator

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")

REPOSITORY = Path(__file__).parent.parent.parent
TEXTS = ["a red dog", "a cat", "3 birds on a wire", "", "zebra"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PLAIN = """
import sys
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
assert not {"models", "data", "trainer", "deploy"} & set(sys.modules), "code of ours was loaded"
pipe.set_progress_bar_config(disable=True)
asked = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np", "generator": torch.manual_seed(7)}
torch.save(torch.from_numpy(pipe(["zebra", "a cat"], **asked).images), sys.argv[2])
"""


def unet(**changes):
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
    }
    sizes = {"sample_size": 8, "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 4}
    torch.manual_seed(0)
    net = UNet2DConditionModel(**{**blocks, **sizes, **changes})
    for name, value in net.named_parameters():
        if "attn2.to_out.0.weight" in name:
            torch.nn.init.normal_(value)  # texts matter
    return net


def words(path, seed, kind):
    """Return a tokenizer of letters, of twelve tokens, and a text encoder of random weights."""
    known = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(known)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt"), model_max_length=12)
    ends = {"bos_token_id": len(known) - 2, "eos_token_id": len(known) - 1, "pad_token_id": len(known) - 1}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 8}
    torch.manual_seed(seed)
    encoder = kind(transformers.CLIPTextConfig(vocab_size=len(known), max_position_embeddings=12, **small, **ends))
    for value in encoder.parameters():
        torch.nn.init.normal_(value, std=0.3)  # texts differ much
    return tokenizer, encoder


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def folder(request, tmp_path_factory):
    """A pipeline as others publish it, with random weights and latents of 4 x 8 x 8."""
    path = tmp_path_factory.mktemp("published")
    tokenizer, encoder = words(path, 0, transformers.CLIPTextModel)
    pair = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, scaling_factor=0.5, **pair)
    schedule = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
    if request.param == "sd":
        pipe = StableDiffusionPipeline(vae, encoder, tokenizer, unet(), schedule, None, None, requires_safety_checker=False)
    else:
        two, other = words(path, 1, transformers.CLIPTextModelWithProjection)
        told = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32}
        net = unet(cross_attention_dim=32, **told)
        pipe = StableDiffusionXLPipeline(vae, encoder, other, tokenizer, two, net, schedule, add_watermarker=False)
    pipe.save_pretrained(path / "teacher")
    return path / "teacher"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(folder, prompts, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "set"
    words = ["--prompts", str(prompts), "--pairs", "16", "--steps", "5", "--guidance", "5"]
    assert main(["collect", "--teacher", str(folder), "--out", str(path), *words]) == 0
    return path


def test_pairs_are_what_the_pipeline_itself_draws(folder, pairs):
    """Plain Stable Diffusion, guided at the same scale, from the same noises, told the same texts, each its own."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", steps_offset=1, **BETAS)
    pipe.set_progress_bar_config(disable=True)
    rows = [PairSet(pairs)[i] for i in range(16)]
    assert [row["condition"] for row in rows] == [i % 5 for i in range(16)]
    sigma = teacher.load(folder)[0].interpolant(torch.ones(()))[1]  # where a chain ends: not quite 1
    eps, asked = sigma * torch.stack([row["noise"] for row in rows]), [TEXTS[row["condition"]] for row in rows]
    ours, told = torch.stack([row["sample"] for row in rows]), {"guidance_scale": 5.0, "num_inference_steps": 5}
    theirs = pipe(asked, latents=eps, output_type="latent", **told).images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    asked = [TEXTS[(row["condition"] + 1) % 5] for row in rows]
    other = pipe(asked, latents=eps, output_type="latent", **told).images
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
    x = DDIM(4).walk(denoiser, torch.randn(2, 4, 8, 8, generator=torch.manual_seed(7)), told)[-1]
    return (codec.decode(x) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_student_goes_back_to_plain_stable_diffusion(folder, prompts, pairs, tmp_path, monkeypatch, lora):
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'rectify[lora]'") if lora else None
    run = train(monkeypatch, tmp_path, folder, pairs, prompts, "--trainer.max_steps", "3", "--model.denoiser.lora", str(lora))
    assert main(["export", "--run", str(run), "--out", "runs/text/export", "--steps", "4"]) == 0
    out = tmp_path / "runs/text/export"
    subprocess.run([sys.executable, "-P", "-c", PLAIN, str(out), str(tmp_path / "theirs.pt")], check=True, cwd=tmp_path)
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True).permute(0, 3, 1, 2)
    shutil.move(run, tmp_path / "moved")  # a run is whole by itself
    (tmp_path / "runs/text/teacher").unlink()
    drawn = ours(tmp_path / "moved", prompts)
    torch.testing.assert_close(theirs, drawn, rtol=0, atol=1e-4)
    assert (drawn - ours(folder, prompts)).abs().max() > 1e-3
    assert read_json(out / "export.json")["max_abs_diff"] < 1e-4 and '["a prompt"]' in (out / "README.md").read_text()
    if peft:
        base = UNet2DConditionModel.from_pretrained(folder / "unet")
        adapted = peft.PeftModel.from_pretrained(base, out / "lora").eval()
        merged = UNet2DConditionModel.from_pretrained(out / "unet").eval()
        asked = (torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 12, merged.config.cross_attention_dim))
        more = {"text_embeds": torch.randn(2, 8), "time_ids": torch.randn(2, 6)}
        with torch.no_grad():
            one, two = (net(*asked, added_cond_kwargs=more).sample for net in (adapted, merged))
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


def test_what_does_not_fit_is_one_line(folder, prompts, pairs, workspace, tmp_path, capfd):
    def refused(said, *words):
        assert main(list(map(str, words))) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("rectify: error: ") and said in lines[-1] and "Traceback" not in "".join(lines)

    collect = ("collect", "--out", tmp_path / "x", "--pairs", "8", "--steps", "1", "--teacher")
    refused("is told texts; give them", *collect, folder)
    refused("is told no texts; leave them out", *collect, workspace.path / "runs/demo/teacher", "--prompts", prompts)
    for name, text, said in (("none.txt", b"", "holds no prompt"), ("latin.txt", b"\xe9\n", "not UTF-8")):
        (tmp_path / name).write_bytes(text)
        refused(said, *collect, folder, "--prompts", tmp_path / name)
    refused("No such file", *collect, folder, "--prompts", tmp_path / "missing.txt")
    shutil.copytree(folder, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/tokenizer")
    refused("no tokenizer in it", *collect, tmp_path / "bare", "--prompts", prompts)
    for place, said, change in (
        ("text_encoder", "masks what pads a text", {"use_attention_mask": True}),
        ("tokenizer", "a tokenizer makes texts of 13 tokens", {"model_max_length": 13}),
        ("unet", "not a readable UNet2DConditionModel", {"cross_attention_dim": 8}),
    ):
        shutil.copytree(folder, tmp_path / said)
        file = tmp_path / said / place / ("tokenizer_config.json" if place == "tokenizer" else "config.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        refused(
            said if place != "unet" else "not a readable UNet2DConditionModel", *collect, tmp_path / said, "--prompts", prompts
        )
    (tmp_path / "other.txt").write_text("a dog\n")
    fit = ("fit", "--config", REPOSITORY / "configs/text/student.yaml", "--out", tmp_path / "run", "--trainer.logger", "false")
    fit += ("--model.denoiser.folder", folder, "--model.initial", folder, "--model.codec", folder / "vae", "--data.batch", "8")
    fit += ("--model.condition.encoder", folder, "--data.source.path", pairs, "--trainer.accelerator", "cpu")
    refused("collected with prompts", *fit, "--model.condition.path", tmp_path / "other.txt")
    refused(f"the network reads {teacher.load(folder)[0].net.tokens}", *fit, "--model.condition", "Unconditional")


def test_networks_that_are_told_more_are_refused(folder, tmp_path):
    net = unet(addition_embed_type="text", addition_embed_type_num_heads=2)
    net.save_pretrained(tmp_path / "more")
    with pytest.raises(ValueError, match="addition_embed_type text and pixels 0 do not fit"):
        Pretrained(str(tmp_path / "more"), tokens=12)
    unet(num_class_embeds=3).save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match="told more than a text"):
        Pretrained(str(tmp_path / "classes"), tokens=12)
    with pytest.raises(ValueError, match="tokens is 0"):
        Pretrained(str(folder / "unet"))
    denoiser = teacher.load(folder)[0]
    shutil.copytree(folder, tmp_path / "other")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    torch.nn.init.normal_(encoder.get_input_embeddings().weight)
    encoder.save_pretrained(tmp_path / "other/text_encoder")
    Generator(denoiser, condition=Prompts(str(folder)))
    if not Prompts(str(folder)).zeros:  # else no text is encoded alike by all
        with pytest.raises(ValueError, match="has not the text encoder"):
            Generator(denoiser, condition=Prompts(str(tmp_path / "other")))


def test_files_that_other_programs_wrote_mean_what_they_mean_there(folder, tmp_path):
    """A byte order mark is no part of a prompt; an index that does not state the negative has diffusers' default."""
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa dog\r\na\xe2\x80\xa8cat")
    assert Prompts(str(folder), str(tmp_path / "prompts.txt")).lines == ["a dog", "a\u2028cat"]
    shutil.copytree(folder, tmp_path / "older")
    told = json.loads((folder / "model_index.json").read_text())
    index = {key: value for key, value in told.items() if key != "force_zeros_for_empty_prompt"}
    (tmp_path / "older/model_index.json").write_text(json.dumps(index))
    found = [Prompts(str(place)).nothing(torch.device("cpu")) for place in (folder, tmp_path / "older")]
    assert torch.equal(*found)
