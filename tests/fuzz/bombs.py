"""Planted code: wherever a file could carry a program, one that leaves a mark when it runs."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from tests.fuzz.mutations import append_member, reseal_shard, reseal_text
from tests.fuzz.recipes import RECIPES

MARK = "owned"  # the file that planted code writes into the working folder of its case
CHECKPOINT = "teacher/checkpoints/step=000000002.ckpt"


class Bomb:
    """An object that writes the mark when it is unpickled."""

    def __reduce__(self):
        return (open, (MARK, "w"))


def array_bytes() -> bytes:
    """Return the bytes of an .npy file whose object array is a bomb."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def plant_in_torch_file(folder: Path) -> None:
    torch.save({"rectify": Bomb(), "state_dict": {}}, folder / CHECKPOINT)


def plant_pickle(folder: Path) -> None:
    (folder / CHECKPOINT).write_bytes(pickle.dumps(Bomb()))


def replace_condition(folder: Path, condition: dict[str, Any]) -> None:
    """Replace the description of a checkpoint's condition."""
    path = folder / CHECKPOINT
    content = torch.load(path, weights_only=True)
    content["rectify"]["condition"] = condition
    torch.save(content, path)


def plant_method_name(folder: Path) -> None:
    touch = {"class_path": "models.codec.Path.touch", "init_args": {"self": MARK}}
    replace_condition(folder, touch)


def plant_function_name(folder: Path) -> None:
    save = {"class_path": "models.checkpoint.torch.save", "init_args": {"obj": 1, "f": MARK}}
    replace_condition(folder, save)


def plant_in_offsets(folder: Path) -> None:
    (folder / "latents/000000.npy").write_bytes(array_bytes())
    reseal_shard(folder / "latents/000000.tar")


def plant_in_shard(folder: Path) -> None:
    tar = folder / "latents/000000.tar"
    bomb = array_bytes()
    content = bytearray(tar.read_bytes())
    start = np.load(tar.with_suffix(".npy"))[0, 1, 0]
    content[start : start + len(bomb)] = bomb
    tar.write_bytes(content)
    reseal_shard(tar)


def plant_in_foreign_tars(folder: Path) -> None:
    for tar in (folder / "foreign").glob("*.tar"):
        for suffix in ("pyd", "pickle", "pkl", "pth"):
            append_member(tar, f"0_0.{suffix}", pickle.dumps(Bomb()))


def plant_in_codec_weights(folder: Path) -> None:
    codec = folder / "autoencoder/codec"
    torch.save({"x": Bomb()}, codec / "diffusion_pytorch_model.bin")
    (codec / "diffusion_pytorch_model.safetensors").unlink()


def plant_codec_code(folder: Path) -> None:
    path = folder / "autoencoder/codec/config.json"
    config = json.loads(path.read_text())
    config["_class_name"] = ["code", "Bomb"]
    config["auto_map"] = {"x": "code.Bomb"}
    path.write_text(json.dumps(config))
    (path.parent / "code.py").write_text(f"open({MARK!r}, 'w')")


def plant_yaml_tag(folder: Path, name: str) -> None:
    path = folder / name
    tag = f"seed_everything: !!python/object/apply:os.system ['touch {MARK}']"
    path.write_text(f"{path.read_text()}\n{tag}\n")


def rename_first_shard(folder: Path, name: str) -> None:
    """Change the name of the first shard in a manifest."""
    path = folder / "latents/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = name
    path.write_bytes(reseal_text(manifest))


def plant_piped_shard(folder: Path) -> None:
    rename_first_shard(folder, f"pipe:touch {MARK}")


def plant_outside_shard(folder: Path) -> None:
    shutil.copytree(folder / "latents", folder / "elsewhere")
    rename_first_shard(folder, "../elsewhere/000000.tar")


def plant_outside_stage(folder: Path) -> None:
    pipeline = yaml.safe_load((folder / "pipeline.yaml").read_text())
    pipeline["stages"][0]["name"] = "/../../../escaped"
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))


def plant_nothing(folder: Path) -> None:
    """Change no file: the bomb is in the command's words."""


class Case(NamedTuple):
    """A planted bomb: the function that plants it in a folder, and the command that meets it."""

    plant: Callable[[Path], None]
    words: tuple[str, ...]


PIPE = f"pipe:touch {MARK}"
READ_LATENTS = RECIPES["read latents"].words
COLLECT = RECIPES["collect"].words
ENCODE = RECIPES["encode"].words
TEACHER = RECIPES["teacher"].words
RUN = RECIPES["run"].words

BOMBS = {
    "a pickle as checkpoint, collected from": Case(plant_in_torch_file, COLLECT),
    "a pickle as checkpoint, resumed": Case(plant_in_torch_file, RECIPES["resume"].words),
    "a pickle as checkpoint, sampled": Case(plant_in_torch_file, RECIPES["sample"].words),
    "a pickle as checkpoint, averaged": Case(plant_in_torch_file, RECIPES["ema"].words),
    "a bare pickle as checkpoint": Case(plant_pickle, COLLECT),
    "a checkpoint that names a method": Case(plant_method_name, COLLECT),
    "a checkpoint that names a function": Case(plant_function_name, COLLECT),
    "a pickle as offsets": Case(plant_in_offsets, READ_LATENTS),
    "a pickle as array in a shard": Case(plant_in_shard, READ_LATENTS),
    "a codec of pickled weights": Case(plant_in_codec_weights, ENCODE),
    "a pipe: as shard in a manifest": Case(plant_piped_shard, READ_LATENTS),
    "a shard outside its folder": Case(plant_outside_shard, READ_LATENTS),
    "a stage whose name leaves its folder": Case(plant_outside_stage, RUN),
    "a tag in a configuration": Case(partial(plant_yaml_tag, name="teacher.yaml"), TEACHER),
    "a tag in a pipeline": Case(partial(plant_yaml_tag, name="pipeline.yaml"), RUN),
    "a pipe: as images": Case(plant_nothing, ("pack", "--images", PIPE, "--out", "x")),
    "a pipe: to index": Case(plant_nothing, ("index", "--folder", PIPE)),
    "a pipe: as source": Case(plant_nothing, (*TEACHER, "--data.source.path", PIPE)),
    "a pipe: as teacher": Case(plant_nothing, ("collect", "--teacher", PIPE, "--out", "x")),
    "a pipe: as codec": Case(plant_nothing, (*ENCODE, "--codec", PIPE)),
}
HARMLESS = {  # the command does not read the planted code, and succeeds
    "pickles beside the fields of foreign tars": Case(
        plant_in_foreign_tars, RECIPES["index"].words
    ),
    "code beside a codec": Case(plant_codec_code, ENCODE),
}
