"""Planted code: wherever a file could carry a program, one that would leave a mark if it were run."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml

from tests.fuzz.mutations import member, reseal, resealed
from tests.fuzz.recipes import RECIPES

MARK = "owned"  # in the working folder of the case


class Bomb:
    """Unpickled, it leaves the mark."""

    def __reduce__(self):
        return (open, (MARK, "w"))


def array_bomb() -> bytes:
    """Return .npy bytes whose object array is a bomb."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def checkpoint(folder: Path) -> None:
    torch.save({"rectify": Bomb(), "state_dict": {}}, folder / "teacher/checkpoints/step=000000002.ckpt")


def old_checkpoint(folder: Path) -> None:
    (folder / "teacher/checkpoints/step=000000002.ckpt").write_bytes(pickle.dumps(Bomb()))


def class_path(folder: Path) -> None:
    path = folder / "teacher/checkpoints/step=000000002.ckpt"
    whole = torch.load(path, weights_only=True)
    whole["rectify"]["condition"] = {"class_path": "models.codec.Path.touch", "init_args": {"self": MARK}}
    torch.save(whole, path)


def function_path(folder: Path) -> None:
    path = folder / "teacher/checkpoints/step=000000002.ckpt"
    whole = torch.load(path, weights_only=True)
    whole["rectify"]["condition"] = {"class_path": "models.teacher.torch.save", "init_args": {"obj": 1, "f": MARK}}
    torch.save(whole, path)


def offsets(folder: Path) -> None:
    (folder / "latents/000000.npy").write_bytes(array_bomb())
    reseal(folder / "latents/000000.tar")


def array_in_shard(folder: Path) -> None:
    tar, data = folder / "latents/000000.tar", array_bomb()
    whole = bytearray(tar.read_bytes())
    start = np.load(tar.with_suffix(".npy"))[0, 1, 0]
    whole[start : start + len(data)] = data
    tar.write_bytes(whole)
    reseal(tar)


def foreign_members(folder: Path) -> None:
    for tar in (folder / "foreign").glob("*.tar"):
        for suffix in ("pyd", "pickle", "pkl", "pth"):
            member(tar, f"0_0.{suffix}", pickle.dumps(Bomb()))


def weights(folder: Path) -> None:
    codec = folder / "autoencoder/codec"
    torch.save({"x": Bomb()}, codec / "diffusion_pytorch_model.bin")
    (codec / "diffusion_pytorch_model.safetensors").unlink()


def codec_code(folder: Path) -> None:
    path = folder / "autoencoder/codec/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": ["code", "Bomb"], "auto_map": {"x": "code.Bomb"}}))
    (path.parent / "code.py").write_text(f"open({MARK!r}, 'w')")


def tagged(folder: Path, name: str) -> None:
    path = folder / name
    path.write_text(path.read_text() + f"\nseed_everything: !!python/object/apply:os.system ['touch {MARK}']\n")


def piped_shard(folder: Path) -> None:
    path = folder / "latents/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = f"pipe:touch {MARK}"
    path.write_bytes(resealed(manifest))


def escaping_shard(folder: Path) -> None:
    path = folder / "latents/manifest.json"
    shutil.copytree(folder / "latents", folder / "elsewhere")
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["name"] = "../elsewhere/000000.tar"
    path.write_bytes(resealed(manifest))


def escaping_stage(folder: Path) -> None:
    pipeline = yaml.safe_load((folder / "pipeline.yaml").read_text())
    pipeline["stages"][0]["name"] = "/../../../escaped"
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))


def nothing(folder: Path) -> None:
    """The bomb is in the words."""


PIPE = f"pipe:touch {MARK}"
BOMBS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a pickle as checkpoint, collected from": (checkpoint, RECIPES["collect"].words),
    "a pickle as checkpoint, resumed": (checkpoint, RECIPES["resume"].words),
    "a pickle as checkpoint, sampled": (checkpoint, RECIPES["sample"].words),
    "a pickle as checkpoint, averaged": (checkpoint, RECIPES["ema"].words),
    "a bare pickle as checkpoint": (old_checkpoint, RECIPES["collect"].words),
    "a checkpoint that names a method": (class_path, RECIPES["collect"].words),
    "a checkpoint that names a function": (function_path, RECIPES["collect"].words),
    "a pickle as offsets": (offsets, RECIPES["read latents"].words),
    "a pickle as array in a shard": (array_in_shard, RECIPES["read latents"].words),
    "a codec of pickled weights": (weights, RECIPES["encode"].words),
    "a pipe: as shard in a manifest": (piped_shard, RECIPES["read latents"].words),
    "a shard outside its folder": (escaping_shard, RECIPES["read latents"].words),
    "a stage whose name leaves its folder": (escaping_stage, RECIPES["run"].words),
    "a tag in a configuration": (lambda folder: tagged(folder, "teacher.yaml"), RECIPES["teacher"].words),
    "a tag in a pipeline": (lambda folder: tagged(folder, "pipeline.yaml"), RECIPES["run"].words),
    "a pipe: as images": (nothing, ("pack", "--images", PIPE, "--out", "x")),
    "a pipe: to index": (nothing, ("index", "--folder", PIPE)),
    "a pipe: as source": (nothing, (*RECIPES["teacher"].words, "--data.source.path", PIPE)),
    "a pipe: as teacher": (nothing, ("collect", "--teacher", PIPE, "--out", "x")),
    "a pipe: as codec": (nothing, (*RECIPES["encode"].words, "--codec", PIPE)),
}
HARMLESS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "pickles beside the fields of foreign tars": (foreign_members, RECIPES["index"].words),
    "code beside a codec": (codec_code, RECIPES["encode"].words),
}
