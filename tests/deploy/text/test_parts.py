"""Text encoders of a teacher: complete, recorded in pairs, and compared with a student's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file

from data.pairs import Pairs, PairSet
from models.checkpoint import load_checkpoint
from models.codec import Identity, load_codec
from models.diffusers.text import Prompts
from models.guidance import _warn_once, with_guidance
from tests.deploy.text.conftest import TEXTS, words_to_pair
from tests.helpers.commands import succeed
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.teachers import edit_json
from tests.helpers.training import fit_words, study_config
from trainer.compatibility import check_parts

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'rectify[text]'"
)

from tests import published  # noqa: E402  (it needs transformers)


def find_encoders(folder: Path) -> list[Path]:
    """Return the folders of a pipeline's text encoders."""
    return sorted(folder.glob("text_encoder*"))


def remove_layer(part: Path) -> str:
    """Remove a weight of the last layer; return its name."""
    weights = load_file(part / "model.safetensors")
    key = max(key for key in weights if ".layers.1." in key or ".block.0." in key)
    weights.pop(key)
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    return key


def test_a_text_encoder_without_a_layer_is_refused(folder, prompts, tmp_path, capfd):
    """Its weights would be random, and other ones in each process."""
    for number, original in enumerate(find_encoders(folder)):
        bad = shutil.copytree(folder, tmp_path / f"bad{number}")
        part = bad / original.name
        key = remove_layer(part)
        words = words_to_pair(bad, tmp_path / "x", "--prompts", prompts)
        assert_refused(capfd, words, part, key.rsplit(".", 2)[-2])
    assert not (tmp_path / "x").exists()


def test_a_text_encoder_of_other_code_is_refused(folder, tmp_path):
    bad = shutil.copytree(folder, tmp_path / "bad")
    edit_json(bad / "model_index.json", text_encoder=["mine", "CLIPTextModel"])
    edit_json(bad / "text_encoder/config.json", architectures=["CLIPTextModel"])
    with refused(bad, "text_encoder", "mine"):
        load_checkpoint(bad)


def test_a_variant_alone_is_read_in_float32(folder, tmp_path):
    halved = shutil.copytree(folder, tmp_path / "halved")
    for part in find_encoders(halved):
        weights = load_file(part / "model.safetensors")
        (part / "model.safetensors").unlink()
        halves = {key: value.half() for key, value in weights.items()}
        save_file(halves, part / "model.fp16.safetensors", {"format": "pt"})
    prompts = Prompts(str(halved))
    expected = Prompts(str(folder)).encode(TEXTS, torch.device("cpu"))
    found = prompts.encode(TEXTS, torch.device("cpu"))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    prompts.save(tmp_path / "copy")
    assert Prompts(str(tmp_path / "copy")).parts == prompts.parts


def test_pairs_record_every_part(folder, pairs):
    parts = PairSet(pairs).manifest["parts"]
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert parts.keys() == names - {"unet", "transformer"}


@pytest.fixture
def student_words(folder, pairs, prompts, tmp_path):
    """Return the command that trains a student on the pairs, but for its encoder and codec."""
    return fit_words(
        study_config("text", "student"),
        tmp_path / "run",
        *("--model.denoiser.folder", folder, "--model.initial", folder),
        *("--model.condition.path", prompts),
        *("--data.source.path", pairs, "--data.batch", "8", "--trainer.max_steps", "1"),
    )


def skip_last_layer(other: Path) -> str:
    """Let the text encoder end one layer earlier; return its name."""
    config = json.loads((other / "text_encoder/config.json").read_text())
    key = "num_hidden_layers" if "num_hidden_layers" in config else "num_layers"
    if config[key] < 2:
        pytest.skip("the encoder has one layer")
    edit_json(other / "text_encoder/config.json", **{key: config[key] - 1})
    return "text_encoder"


def change_tokenizer(other: Path) -> str:
    """Change a byte of the tokenizer's vocabulary; return its name."""
    for name in ("tokenizer.json", "vocab.json"):
        for file in (other / "tokenizer").glob(name):
            file.write_text(file.read_text() + " ")
    return "tokenizer"


@pytest.mark.parametrize("change", [skip_last_layer, change_tokenizer])
def test_pairs_of_other_text_encoders_are_refused(
    student_words, folder, tmp_path, capfd, change, monkeypatch
):
    other = shutil.copytree(folder, tmp_path / "other")
    name = change(other)
    # SDXL's encoders all give zeros for the empty text; the others are told apart by it
    monkeypatch.setattr("trainer.module.check_condition", lambda *_: None)
    words = ("--model.condition.encoder", other, "--model.codec", folder / "vae")
    assert_refused(capfd, (*student_words, *words), "model.condition.encoder", name)


def test_pairs_are_compared_with_a_student_that_starts_from_no_teacher(folder, pairs, tmp_path):
    source = Pairs(str(pairs), guidance=5.0)
    codec = load_codec(folder / "vae")
    check_parts(source, codec, Prompts(str(folder)), str(folder))
    other = shutil.copytree(folder, tmp_path / "other")
    name = change_tokenizer(other)
    with refused("model.condition.encoder", name, pairs):
        check_parts(source, codec, Prompts(str(other)), None)
    edit_json(other / "scheduler/scheduler_config.json", num_train_timesteps=500)
    with refused("model.initial", "scheduler", pairs):
        check_parts(source, codec, Prompts(str(folder)), str(other))
    edit_json(other / "vae/config.json", scaling_factor=0.13)
    with refused("model.codec", "vae", pairs):
        check_parts(source, load_codec(other / "vae"), Prompts(str(folder)), None)
    with refused("model.codec", pairs):
        check_parts(source, Identity(), Prompts(str(folder)), None)


def test_pairs_of_another_scale_of_latents_are_refused(student_words, folder, tmp_path, capfd):
    other = shutil.copytree(folder / "vae", tmp_path / "vae")
    edit_json(other / "config.json", scaling_factor=0.13)
    words = ("--model.condition.encoder", folder, "--model.codec", other)
    assert_refused(capfd, (*student_words, *words), "model.codec", other)


def test_another_text_encoder_is_another_set_of_pairs(folder, pairs, prompts, tmp_path, capfd):
    """A collection is not continued with other parts."""
    other = shutil.copytree(folder, tmp_path / "other")
    change_tokenizer(other)
    copied = shutil.copytree(pairs, tmp_path / "set")
    words = ("--prompts", prompts, "--pairs", "16", "--steps", "5", "--guidance", "5")
    assert_refused(capfd, ("collect", "--teacher", other, "--out", copied, *words), copied, "parts")


@pytest.mark.parametrize("folder", ["sd", "sdxl", "sd3", "pixart"], indirect=True)
def test_a_text_pipeline_without_a_vae_is_refused(folder, prompts, tmp_path, capfd):
    bad = shutil.copytree(folder, tmp_path / "bad")
    edit_json(bad / "model_index.json", vae=[None, None])
    words = ("sample", "--run", bad, "--prompts", prompts, "--steps", "1", "--count", "10")
    out = tmp_path / "x.png"
    assert_refused(capfd, (*words, "--out", out), bad / "model_index.json", "vae")
    assert not out.exists()


def test_a_prompt_that_a_tokenizer_cuts_is_reported(folder, tmp_path, caplog):
    file = tmp_path / "prompts.txt"
    file.write_text(f"a cat\n{'red dog ' * 60}\n{'a bird ' * 70}\n")
    prompts = Prompts(str(folder), str(file))
    prompts(torch.tensor([0]))
    lines = [line for line in caplog.messages if str(file) in line]
    assert lines
    assert all("2 of 3" in line and "line 2" in line for line in lines)
    prompts(torch.tensor([1]))
    assert len([line for line in caplog.messages if str(file) in line]) == len(lines)


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("sd", DDIMScheduler(**published.BETAS, set_alpha_to_one=False, steps_offset=1)),
        ("sdxl", EulerDiscreteScheduler(**published.BETAS, timestep_spacing="leading")),
        ("sdxl", EDMEulerScheduler()),
        ("sd3", FlowMatchEulerDiscreteScheduler(shift=3.0)),
        ("pixart", DPMSolverMultistepScheduler(solver_order=1)),
    ],
    ids=["sd", "sdxl", "sdxl EDM", "sd3", "pixart"],
)
def test_pairs_on_the_schedulers_grid_are_what_the_pipeline_draws(
    kind, scheduler, prompts, tmp_path
):
    pipe = published.pipeline(kind, tmp_path)
    pipe.register_modules(scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "teacher")
    words = ("--prompts", prompts, "--pairs", "3", "--steps", "4", "--guidance", "5")
    out = tmp_path / "set"
    succeed(
        "collect", "--teacher", tmp_path / "teacher", "--out", out, *words, "--grid", "scheduler"
    )
    stored = [PairSet(out)[i] for i in range(3)]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.stack([pair["noise"] for pair in stored])
    settings = {"guidance_scale": 5.0, "num_inference_steps": 4, "output_type": "latent"}
    if kind == "pixart":
        settings |= {"use_resolution_binning": False, "clean_caption": False}
    theirs = pipe(TEXTS[:3], latents=noise, **settings).images
    ours = torch.stack([pair["sample"] for pair in stored])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)  # stored in float16
    assert PairSet(out).manifest["grid"] == "scheduler"


def test_flux_with_a_dynamic_shift_is_sampled_on_its_schedulers_grid(tmp_path):
    """The published Flux shifts by its number of tokens."""
    from models.diffusers.scheduler_grid import build_scheduler_grid
    from models.diffusers.scheduler_keys import load_scheduler

    published.pipeline("flux", tmp_path).save_pretrained(tmp_path / "flux")
    denoiser = load_checkpoint(tmp_path / "flux").denoiser
    grid = build_scheduler_grid(load_scheduler(tmp_path / "flux/scheduler"), denoiser, 4)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "flux/scheduler")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)  # 4096 tokens
    torch.testing.assert_close(torch.tensor(grid.times), scheduler.sigmas)


def test_a_student_of_flux_warns_of_an_untrained_scale(tmp_path, caplog):
    published.pipeline("flux", tmp_path).save_pretrained(tmp_path / "flux")
    denoiser = load_checkpoint(tmp_path / "flux").denoiser
    with_guidance(denoiser, 3.0)
    assert not caplog.messages  # a teacher takes any scale
    denoiser.guidance = 5.0  # that of a student's pairs
    _warn_once.cache_clear()
    with_guidance(denoiser, 1.0)
    assert not caplog.messages
    with_guidance(denoiser, 3.0)
    assert [line for line in caplog.messages if "guidance 3" in line and "5" in line]


def test_a_run_keeps_the_digests_of_its_text_encoders(folder, tmp_path):
    Prompts(str(folder)).save(tmp_path / "texts")
    assert Prompts(str(tmp_path / "texts")).parts == Prompts(str(folder)).parts
