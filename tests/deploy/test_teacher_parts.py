"""Parts of a teacher's folder: complete and of the listed class, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from data.pairs import Pairs
from models.checkpoint import fingerprint, load_checkpoint
from models.codec import Identity, load_codec
from models.condition import ClassLabel
from models.diffusers.parts import part_digest
from tests.helpers.commands import succeed
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.teachers import edit_json
from trainer.compatibility import check_parts

WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_vae(**changes: Any) -> AutoencoderKL:
    """Return an autoencoder of 4 channels with random weights."""
    sizes: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.5,
    }
    torch.manual_seed(1)
    return AutoencoderKL(**{**sizes, **changes})


def small_dit(**changes: Any) -> DiTTransformer2DModel:
    """Return a network of 10 classes for latents of 4 x 8 x 8."""
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    }
    torch.manual_seed(0)
    return DiTTransformer2DModel(**{**sizes, **changes}).eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return the folder of a DiT pipeline."""
    path = tmp_path_factory.mktemp("published") / "dit"
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(small_dit(), small_vae(), scheduler).save_pretrained(path)
    return path


@pytest.fixture
def folder(original, tmp_path):
    """Return a copy of the pipeline, to be changed."""
    return shutil.copytree(original, tmp_path / "teacher")


def edit_weights(part: Path, change: Any) -> None:
    """Write a part's weights with their names changed; a name of None is left out."""
    named = {change(key): value for key, value in load_file(part / WEIGHTS).items()}
    named.pop(None, None)
    save_file(named, part / WEIGHTS, {"format": "pt"})


KEYS = {
    "transformer": "transformer_blocks.0.attn1.to_q.weight",
    "vae": "decoder.conv_in.weight",
}
every_part = pytest.mark.parametrize("part", KEYS)


@every_part
def test_a_part_without_one_of_its_weights_is_refused(folder, part, tmp_path, capfd):
    edit_weights(folder / part, lambda key: None if key == KEYS[part] else key)
    words = ("collect", "--teacher", folder, "--out", tmp_path / "x", "--pairs", "8")
    assert_refused(capfd, words, folder / part, KEYS[part])
    assert not (tmp_path / "x").exists()


@every_part
def test_weights_under_another_prefix_are_refused(folder, part):
    edit_weights(folder / part, lambda key: f"model.{key}")
    with refused(folder / part, min(load_file(folder / part / WEIGHTS)).removeprefix("model.")):
        load_checkpoint(folder)


@every_part
def test_weights_of_another_shape_are_refused(folder, part):
    weights = load_file(folder / part / WEIGHTS)
    weights[KEYS[part]] = weights[KEYS[part]][:1].clone()
    save_file(weights, folder / part / WEIGHTS, {"format": "pt"})
    with refused(folder / part):
        load_checkpoint(folder)


def test_weights_that_are_not_used_are_reported(folder, caplog):
    weights = load_file(folder / "vae" / WEIGHTS)
    save_file({**weights, "loss.logvar": torch.zeros(1)}, folder / "vae" / WEIGHTS)
    load_checkpoint(folder)
    assert [line for line in caplog.messages if "vae" in line and "loss.logvar" in line]


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("vae/config.json", "_class_name", "AutoencoderTiny"),
        ("transformer/config.json", "_class_name", "UNet2DModel"),
        ("scheduler/scheduler_config.json", "_class_name", "EulerDiscreteScheduler"),
    ],
)
def test_a_part_of_another_class_is_refused(folder, file, key, value):
    edit_json(folder / file, **{key: value})
    with refused(folder / file, value, key):
        load_checkpoint(folder)


def test_a_network_of_the_former_class_is_its_successor(original, folder):
    """Published folders of DiT and PixArt list a Transformer2DModel."""
    former = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}
    edit_json(folder / "transformer/config.json", **former, only_cross_attention=False)
    edit_json(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    found = load_checkpoint(folder).denoiser
    assert found.net.kind == "DiTTransformer2DModel"
    assert fingerprint(found) == fingerprint(load_checkpoint(original).denoiser)
    edit_json(folder / "transformer/config.json", norm_type="layer_norm")
    with refused(folder, "transformer", "Transformer2DModel"):
        load_checkpoint(folder)


@every_part
def test_a_key_of_a_newer_diffusers_is_refused(folder, part):
    edit_json(folder / part / "config.json", newer_key=3)
    with refused(folder / part / "config.json", "newer_key", 3):
        load_checkpoint(folder)


def test_a_codec_of_another_class_is_refused(folder):
    edit_json(folder / "vae/config.json", _class_name="VQModel")
    with refused(folder / "vae", "VQModel", "AutoencoderKL"):
        load_codec(folder / "vae")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vae": [None, None]}, ("model_index.json", "vae")),
        ({"scheduler": [None, None]}, ("model_index.json", "scheduler")),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, ("vae", "AutoencoderTiny")),
        ({"refiner": ["diffusers", "UNet2DModel"]}, ("transformer", "refiner")),
    ],
    ids=["no vae", "no scheduler", "another vae", "two networks"],
)
def test_an_index_with_other_parts_is_refused(folder, changes, named):
    edit_json(folder / "model_index.json", **changes)
    with refused(folder, *named) as refusal:
        load_checkpoint(folder)
    assert len(refusal.line) < 400


def test_other_channels_of_the_codec_are_refused(folder):
    small_vae(latent_channels=8).save_pretrained(folder / "vae")
    with refused(folder, "latents", 8, 4):
        load_checkpoint(folder)


@pytest.mark.parametrize("key", ["shift_factor", "latents_mean"])
def test_statistics_of_latents_that_the_pipeline_ignores_are_refused(folder, key):
    """DiTPipeline divides by the scale alone."""
    value = 0.1 if key == "shift_factor" else [0.1] * 4
    edit_json(folder / "vae/config.json", **{key: value})
    with refused(folder / "vae/config.json", key):
        load_checkpoint(folder)


@every_part
def test_a_variant_alone_is_read_in_float32(original, folder, part, caplog):
    weights = load_file(folder / part / WEIGHTS)
    (folder / part / WEIGHTS).unlink()
    halves = {key: value.half() for key, value in weights.items()}
    save_file(halves, folder / part / "diffusion_pytorch_model.fp16.safetensors")
    caplog.set_level("INFO")
    model = load_checkpoint(folder)
    found = model.denoiser.net.model if part == "transformer" else model.codec.vae
    value = found.state_dict()[KEYS[part]]
    assert value.dtype == torch.float32
    assert torch.equal(value, halves[KEYS[part]].float())
    assert [line for line in caplog.messages if part in line and "fp16" in line]


@every_part
def test_weights_in_pickles_alone_are_refused_with_the_way_out(folder, part):
    (folder / part / WEIGHTS).rename(folder / part / "diffusion_pytorch_model.bin")
    with refused(folder / part, "diffusion_pytorch_model.bin", "save_pretrained"):
        load_checkpoint(folder)


def test_a_missing_folder_of_a_part_is_refused(folder):
    shutil.rmtree(folder / "vae")
    with refused(folder / "vae"):
        load_checkpoint(folder)


def cache_folder(path: Path) -> Path:
    """Return a folder as the hub's cache has it."""
    (path / "models--org--name/snapshots/0123abc").mkdir(parents=True)
    return path / "models--org--name"


def single_file(path: Path) -> Path:
    """Return a file with all weights, as ComfyUI has them."""
    file = path / "v1-5.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}, file)
    return file


def old_single_file(path: Path) -> Path:
    """Return such a file as torch.save writes it."""
    file = path / "v1-5.ckpt"
    torch.save({"state_dict": {"model.diffusion_model.weight": torch.ones(2)}}, file)
    return file


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path, folder: "org/name", ("org/name", "hf download")),
        (lambda path, folder: cache_folder(path), ("models--org--name", "snapshots/0123abc")),
        (lambda path, folder: folder / "transformer", ("transformer", "model_index.json")),
        (lambda path, folder: single_file(path), ("v1-5.safetensors", "from_single_file")),
        (lambda path, folder: old_single_file(path), ("v1-5.ckpt", "from_single_file")),
    ],
    ids=["name on the hub", "cache", "one part", "ComfyUI", "old single file"],
)
def test_what_is_no_teacher_is_refused_with_the_way_out(folder, tmp_path, capfd, make, named):
    teacher = make(tmp_path, folder)
    words = ("collect", "--teacher", teacher, "--out", tmp_path / "x", "--pairs", "8")
    line = assert_refused(capfd, words, *named)
    assert "delete" not in line


def test_pairs_record_the_parts_of_a_pipeline(folder, tmp_path):
    words = ("--teacher", folder, "--pairs", "4", "--steps", "1", "--classes", "2")
    succeed("collect", *words, "--out", tmp_path / "pairs")
    parts = json.loads((tmp_path / "pairs/manifest.json").read_text())["parts"]
    assert parts.keys() == {"scheduler", "vae"}
    assert parts["scheduler"] == part_digest(folder / "scheduler")

    # a student that starts from nothing has the teacher's latents
    pairs = Pairs(tmp_path / "pairs")
    check_parts(pairs, load_codec(folder / "vae"), ClassLabel(10), None)
    with refused("model.codec", "vae"):
        check_parts(pairs, Identity(), ClassLabel(10), None)


def test_a_digest_is_of_what_is_read(folder):
    before = part_digest(folder / "vae")
    (folder / "vae/README.md").write_text("a note")
    (folder / "vae/diffusion_pytorch_model.bin").write_bytes(b"not read")
    edit_json(folder / "vae/config.json", _name_or_path="elsewhere")
    assert part_digest(folder / "vae") == before
    edit_weights(folder / "vae", lambda key: key)
    assert part_digest(folder / "vae") == before
    edit_json(folder / "vae/config.json", scaling_factor=0.25)
    assert part_digest(folder / "vae") != before
