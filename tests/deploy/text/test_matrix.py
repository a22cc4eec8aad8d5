"""Each part of a teacher's folder in turn, changed in each way: refused by name, or read right."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint import load_checkpoint
from models.diffusers.parts import part_digest
from models.diffusers.scheduler import read_scheduler
from tests.deploy.test_pretrained import small_unet
from tests.deploy.test_teacher_parts import small_dit, small_vae
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.teachers import edit_json

pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")

from tests import published

KINDS = ["sd", "sdxl", "sd3", "pixart", "flux", "dit", "unet"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """Return the folder of a pipeline of each kind, which every test leaves as it was."""
    path = tmp_path_factory.mktemp("matrix")
    if request.param == "dit":
        pipe = DiTPipeline(small_dit(), small_vae(), DDIMScheduler(clip_sample=False))
    elif request.param == "unet":
        pipe = DDPMPipeline(small_unet(), DDPMScheduler())
    else:
        pipe = published.pipeline(request.param, path)
    pipe.save_pretrained(path / "teacher")
    return path / "teacher"


def list_parts(folder: Path, *kinds: str) -> list[Path]:
    """Return the folders of parts whose names begin with one of `kinds`, all by default."""
    parts = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    return [path for path in parts if path.name.startswith(kinds or "")]


def list_networks(folder: Path) -> list[Path]:
    """Return the folders of parts with weights."""
    return list_parts(folder, "unet", "transformer", "vae", "text_encoder")


def weights_file(part: Path) -> Path:
    """Return the file of a part's weights."""
    return next(part.glob("*.safetensors"))


@contextmanager
def restored(part: Path, copy: Path) -> Iterator[None]:
    """Let a part be changed inside the block, and put it back."""
    shutil.copytree(part, copy)
    try:
        yield
    finally:
        shutil.rmtree(part)
        shutil.move(copy, part)


def read_part(folder: Path, part: Path) -> dict[str, Tensor]:
    """Return the weights of a part as a teacher has them, by their names in its file."""
    model = load_checkpoint(folder)
    if part.name == "vae":
        return model.codec.vae.state_dict()
    if part.name.startswith("text_encoder"):
        return model.condition.pipe.components[part.name].state_dict()
    return model.denoiser.net.model.state_dict()


def drop_first(part: Path) -> tuple[object, ...]:
    """Remove the first of a part's weights; return what the refusal names."""
    return drop(part, min)


def drop_last(part: Path) -> tuple[object, ...]:
    """Remove the last of a part's weights; return what the refusal names."""
    return drop(part, max)


def drop(part: Path, choose: Callable) -> tuple[object, ...]:
    """Remove one of a part's weights; return what the refusal names."""
    file = weights_file(part)
    weights = load_file(file)
    key = choose(weights)
    weights.pop(key)
    save_file(weights, file, {"format": "pt"})
    if key == "shared.weight":  # of T5, which has the same weights under two names
        return (part, "embed_tokens")
    return (part, key.rsplit(".", 2)[-2])


def prefix(part: Path) -> tuple[object, ...]:
    """Put a part's weights under a prefix; return what the refusal names."""
    file = weights_file(part)
    named = {f"other.{key}": value for key, value in load_file(file).items()}
    save_file(named, file, {"format": "pt"})
    return (part, "weight")


def reshape(part: Path) -> tuple[object, ...]:
    """Give a part's first weights another shape; return what the refusal names."""
    file = weights_file(part)
    weights = load_file(file)
    key = min(weights)
    weights[key] = torch.cat([weights[key], weights[key]])
    save_file(weights, file, {"format": "pt"})
    return (part,)


def truncate(part: Path) -> tuple[object, ...]:
    """Cut off the end of a part's weights; return what the refusal names."""
    file = weights_file(part)
    file.write_bytes(file.read_bytes()[:-100])
    return (part,)


def pickle(part: Path) -> tuple[object, ...]:
    """Store a part's weights as torch.save does; return what the refusal names."""
    file = weights_file(part)
    name = "pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"
    torch.save(load_file(file), part / name)
    file.unlink()
    return (part, name, "save_pretrained")


def rename_class(part: Path) -> tuple[object, ...]:
    """Let a part's config name another class; return what the refusal names."""
    if part.name.startswith("text_encoder"):
        edit_json(part / "config.json", architectures=["BertModel"])
        return (part, "BertModel")
    edit_json(part / "config.json", _class_name="AutoencoderTiny")
    return (part, "AutoencoderTiny")


def empty_folder(part: Path) -> tuple[object, ...]:
    """Remove a part's weights; return what the refusal names."""
    weights_file(part).unlink()
    return (part, "safetensors")


CHANGES = [drop_first, drop_last, prefix, reshape, truncate, pickle, rename_class, empty_folder]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_part_is_refused(folder, tmp_path, change):
    for part in list_networks(folder):
        with restored(part, tmp_path / part.name):
            named = change(part)
            with refused(*named):
                load_checkpoint(folder)


def test_a_variant_alone_is_read(folder, tmp_path):
    for part in list_networks(folder):
        with restored(part, tmp_path / part.name):
            file = weights_file(part)
            halves = {key: value.half() for key, value in load_file(file).items()}
            file.unlink()
            save_file(halves, part / f"{file.stem}.fp16.safetensors", {"format": "pt"})
            found = read_part(folder, part)
            for key, value in halves.items():
                assert found[key].dtype == torch.float32
                assert torch.equal(found[key], value.float()), key


def test_another_scale_of_the_vae_is_read_and_another_part(folder, tmp_path):
    for part in list_parts(folder, "vae"):
        before = part_digest(part)
        with restored(part, tmp_path / part.name):
            edit_json(part / "config.json", scaling_factor=0.25)
            assert load_checkpoint(folder).codec.scale == 0.25
            assert part_digest(part) != before


def test_a_key_that_is_not_known_is_refused(folder, tmp_path):
    for part in list_parts(folder, "unet", "transformer", "vae"):
        with restored(part, tmp_path / part.name):
            edit_json(part / "config.json", newer_key=None)
            load_checkpoint(folder)
            edit_json(part / "config.json", newer_key=3)
            with refused(part / "config.json", "newer_key", 3):
                load_checkpoint(folder)


@pytest.mark.parametrize("folder", ["sd"], indirect=True)
def test_a_size_that_the_pipeline_changes_is_refused(folder, tmp_path):
    """StableDiffusionPipeline reads sizes below 64 of old configs as 64."""
    file = folder / "unet/config.json"
    with restored(folder / "unet", tmp_path / "unet"):
        edit_json(file, _diffusers_version="0.7.0.dev0")
        with refused(file, "sample_size", 8):
            load_checkpoint(folder)


def test_another_tokenizer_is_refused(folder, tmp_path):
    for part in list_parts(folder, "tokenizer"):
        with restored(part, tmp_path / part.name):
            edit_json(part / "tokenizer_config.json", tokenizer_class="BertTokenizer")
            with refused(part, "BertTokenizer"):
                load_checkpoint(folder)
        with restored(part, tmp_path / part.name):
            for file in part.iterdir():
                file.write_bytes(file.read_bytes()[:10])
            with refused(folder, part.name):
                load_checkpoint(folder)


def test_another_scheduler_is_refused_or_read(folder, tmp_path):
    part = folder / "scheduler"
    file = part / "scheduler_config.json"
    with restored(part, tmp_path / "copy"):
        before = part_digest(part)
        edit_json(file, _class_name="CogVideoXDDIMScheduler")
        with refused(file, "CogVideoXDDIMScheduler"):
            load_checkpoint(folder)
    with restored(part, tmp_path / "copy"):
        edit_json(file, newer_key=3)
        with refused(file, "newer_key", 3):
            load_checkpoint(folder)
    with restored(part, tmp_path / "copy"):
        edit_json(file, num_train_timesteps=500)
        last = read_scheduler(part).time_input(torch.ones(1)).item()
        assert last in (499, 500)
        assert part_digest(part) != before


def test_a_missing_part_is_refused(folder, tmp_path, capfd):
    for part in list_parts(folder):
        shutil.move(part, tmp_path / part.name)
        words = ("collect", "--teacher", folder, "--out", tmp_path / "x", "--pairs", "8")
        assert_refused(capfd, words, folder, part.name)
        shutil.move(tmp_path / part.name, part)
    assert not (tmp_path / "x").exists()


def test_an_index_without_a_part_is_refused(folder):
    file = folder / "model_index.json"
    before = file.read_text()
    for part in list_parts(folder):
        edit_json(file, **{part.name: [None, None]})
        try:
            with refused(folder):
                load_checkpoint(folder)
        finally:
            file.write_text(before)
    assert json.loads(before)
