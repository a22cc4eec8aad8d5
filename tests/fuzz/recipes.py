"""The commands that read damaged files: a garden of tiny artefacts, what each command reads, and what it makes."""

import json
import tarfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
import yaml
from PIL import Image

from data.digits import digits
from data.images import png
from data.shards import ShardReader

FIT = (
    *("--trainer.logger", "false", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--data.batch", "4"),
    *("--checkpoints.every", "1", "--metrics.every", "1"),
)
GENERATOR = (
    *("--model.denoiser.net.size", "4", "--model.denoiser.net.width", "16", "--model.denoiser.net.depth", "1"),
    *("--model.codec", "latents/codec"),
)
TEACHER = ("fit", "--config", "teacher.yaml", "--out", "teacher", *FIT, *GENERATOR, "--data.source.path", "latents")
STUDENT = ("fit", "--config", "student.yaml", "--out", "student", *FIT, *GENERATOR, "--data.source.path", "pairs")


@dataclass(frozen=True)
class Recipe:
    """A command, the files it reads (globs), what it makes (paths), and what is not there yet when it starts (globs)."""

    words: tuple[str, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    absent: tuple[str, ...] = ()
    free: bool = False  # another input that is whole may give another output: there is nothing to compare with

    @property
    def set(self) -> str | None:
        """The folder of the set that a repeated command leaves or repairs, which must be right or refused by its reader."""
        return None if self.absent else {"pack": "images/train", "encode": "latents", "collect": "pairs"}.get(self.words[0])


SET = ("*.tar", "*.npy", "*.json")
IMAGES, LATENTS, PAIRS, HELDOUT = (
    tuple(f"{folder}/{suffix}" for suffix in SET) for folder in ("images/train", "latents", "pairs", "images/heldout")
)
CHECKPOINT = ("teacher/checkpoints/step=000000002.ckpt",)
PACK = ("pack", "--images", "photos", "--out", "images", "--size", "16", "--shard", "10", "--grey", "true")
ENCODE = ("encode", "--images", "images/train", "--codec", "autoencoder", "--out", "latents", "--shard", "10")
COLLECT = ("collect", "--teacher", "teacher", "--out", "pairs", "--pairs", "16", "--steps", "1", "--shard", "6", "--batch", "6")
EXPORT = ("export", "--run", "student", "--out", "export")
EVALUATE = ("evaluate", "--run", "student", "--images", "images", "--out", "evaluation/student")
AUTOENCODER = (
    *("fit", "--config", "autoencoder.yaml", "--out", "autoencoder", *FIT, "--data.source.path", "images/train"),
    *("--model.block_out_channels", "[8,8,8]"),
)

BUILT = {  # in the order in which the garden grows
    "pack": Recipe(PACK, ("photos/*/*.png", "photos/*/*.jpg"), ("images/train", "images/heldout"), ("images/*/*",), free=True),
    "autoencoder": Recipe(AUTOENCODER, (*IMAGES, "autoencoder.yaml"), ("autoencoder",), ("autoencoder",)),
    "encode": Recipe(ENCODE, (*IMAGES, "autoencoder/codec/*"), ("latents",), ("latents",)),
    "teacher": Recipe(TEACHER, (*LATENTS, "latents/codec/*", "teacher.yaml"), ("teacher",), ("teacher",)),
    "collect": Recipe(COLLECT, (*CHECKPOINT, "teacher/codec/*"), ("pairs",), ("pairs",)),
    "student": Recipe(
        (*STUDENT, "--model.initial", "teacher"),
        (*PAIRS, *CHECKPOINT, "latents/codec/*", "student.yaml"),
        ("student",),
        ("student",),
    ),
    "evaluate": Recipe(
        (*EVALUATE, "--steps", "[1]", "--samples", "100"),
        (*IMAGES, *HELDOUT, "images/classifier.safetensors", "student/checkpoints/step=000000002.ckpt", "student/codec/*"),
        ("evaluation/student",),
        ("evaluation",),
    ),
    "export": Recipe(EXPORT, ("student/checkpoints/step=000000002.ckpt", "student/codec/*"), ("export",), ("export",)),
    "report": Recipe(
        ("report", "--run", "."),
        ("evaluation/*/*", "export/export.json", "*/metrics.jsonl", "*/config.yaml"),
        ("summary.json", "report.html"),
        ("summary.json", "report.html"),
    ),
    "index": Recipe(
        ("index", "--folder", "foreign"), ("foreign/*.tar",), ("foreign",), ("foreign/*.json", "foreign/*.npy"), free=True
    ),
}  # fmt: skip
RECIPES = BUILT | {
    "sample": Recipe(
        ("sample", "--run", "teacher", "--out", "sample.png", "--steps", "1", "--count", "10"),
        (*CHECKPOINT, "teacher/codec/*"),
        ("sample.png",),
        ("sample.png",),
    ),
    "ema": Recipe(
        ("ema", "--run", "teacher", "--width", "0.08"),
        (*CHECKPOINT, "teacher/ema/*.safetensors"),
        ("teacher/ema/width=0.08.ckpt",),
        ("teacher/ema/width=0.08.ckpt",),
    ),
    "resume": Recipe(
        (*TEACHER, "--trainer.max_steps", "3"),
        (*CHECKPOINT, "teacher/metrics.jsonl", "teacher/config.yaml", "teacher/ema/*", "teacher/codec/*"),
        ("teacher",),
    ),
    "pack again": Recipe(PACK, (*IMAGES, *HELDOUT), ("images/train", "images/heldout")),
    "encode again": Recipe(ENCODE, (*LATENTS, "latents/codec/*"), ("latents",)),
    "collect again": Recipe(COLLECT, PAIRS, ("pairs",)),
    "export again": Recipe(EXPORT, ("export/export.json",), ("export",)),
    "index again": Recipe(("index", "--folder", "foreign"), ("foreign/*",), ("foreign",), free=True),
    "run": Recipe(
        ("run", "pipeline.yaml"), ("pipeline.yaml", "piped/stages/*.json", "piped/summary.json"), ("piped",), free=True
    ),
    "read images": Recipe(("read", "--folder", "images/train"), IMAGES, ("images/train",)),
    "read latents": Recipe(("read", "--folder", "latents"), LATENTS, ("latents",)),
    "read pairs": Recipe(("read", "--folder", "pairs"), PAIRS, ("pairs",)),
    "read foreign": Recipe(("read", "--folder", "foreign"), ("foreign/*",), ("foreign",)),
}  # fmt: skip


def plant(garden: Path) -> None:
    """Lay out what a user brings: images in class folders, foreign tars, configurations, a pipeline."""
    for i, (_, opened, klass) in enumerate(digits()[:30]):
        folder = garden / "photos" / f"class-{(klass or 0) % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        opened().resize((16, 16)).save(folder / f"{i}.{'jpg' if i % 3 else 'png'}")
    (garden / "foreign").mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(garden / "foreign" / f"part-{number}.tar"), mtime=0) as writer:
            for i in range(5):
                writer.write(
                    {"__key__": f"{number}_{i}", "png": png(Image.new("L", (8, 8), 9 * i + 100 * number)), "cls": str(i % 3)}
                )
    configs = Path(__file__).parent.parent.parent / "configs" / "digits"
    for name in ("autoencoder", "teacher", "student"):
        config = yaml.safe_load((configs / f"{name}.yaml").read_text())
        if name == "teacher":
            config["trainer"]["callbacks"][0]["init_args"]["widths"] = [0.05, 0.1]
        (garden / f"{name}.yaml").write_text(yaml.safe_dump(config))
    pack = {"out": "{out}/images", "images": "photos", "size": 16, "holdout": 0.2}
    stages = [{"name": "pack", "pack": pack, "quick": {"size": 8}}, {"name": "look", "index": {"folder": "foreign"}}]
    (garden / "pipeline.yaml").write_text(yaml.safe_dump({"out": "piped", "stages": stages}))


def read(folder: Path) -> None:
    """Read every sample of a set in a child process, as training would, and write down what was read."""
    from data.images import Images
    from data.latents import Latents
    from data.pairs import Pairs
    from data.shards import read_manifest

    source = {"images": Images, "latents": Latents, "pairs": Pairs}[read_manifest(folder)["kind"]](str(folder))
    batch = source.read(np.arange(read_manifest(folder)["samples"]))
    torch.save([batch.x, batch.condition, batch.noise], "read.pt")


def plain(value: Any) -> Any:
    """Return a value without what differs between any two runs: seconds, and the checksum over them."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in ("seconds", "seal")}
    return [plain(part) for part in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """Return what a file says, to be compared with what the undisturbed run's says."""
    if path.suffix == ".ckpt":
        return {key: value for key, value in torch.load(path, weights_only=True).items() if key != "origin"}  # revision, time
    if path.suffix == ".json":
        return plain(json.loads(path.read_bytes()))
    if path.suffix == ".jsonl":
        return [plain(json.loads(line)) for line in path.open()]
    if path.suffix == ".html":
        return len(path.read_bytes()) > 0  # its figures are summary.json's
    return path.read_bytes()


def made(folder: Path, recipe: Recipe, but: Path | None = None) -> dict[str, Any]:
    """Return the content of all that a recipe made in a folder, but for the file that was damaged there."""
    if recipe.words[0] == "read":
        return {"read": torch.load(folder / "read.pt")}
    found = {}
    for top in map(folder.joinpath, recipe.makes):
        for path in sorted([top] if top.is_file() else top.rglob("*")):
            if path.is_file() and path != but and not any(part.startswith(".") for part in path.relative_to(folder).parts):
                found[str(path.relative_to(folder))] = content(path)
    return found


def agrees(folder: Path, recipe: Recipe, changed: Path) -> str | None:
    """Return why a result of free input is wrong, or None: the rest is untouched, and what is read is what is there."""
    return {"index": served_as_they_are, "pack": partial(others_untouched, changed=changed)}.get(recipe.words[0], lambda _: None)(
        folder
    )


def served_as_they_are(folder: Path) -> str | None:
    """Compare what our reader serves of foreign tars with what Python's tarfile reads there."""
    reader = ShardReader(folder / "foreign")
    served = {}
    for i in range(len(reader)):
        sample = reader[i]
        key = sample.pop("__key__")
        served |= {f"{key}.{field}": view.tobytes() for field, view in sample.items()}
    there = {}
    for path in sorted((folder / "foreign").glob("*.tar")):
        with tarfile.open(path) as tar:
            there |= {m.name: file.read() for m in tar.getmembers() if m.isfile() and (file := tar.extractfile(m))}
    wrong = [name for name, data in served.items() if there.get(name) != data]
    return f"served other bytes than the tar holds: {wrong}" if wrong else None


def others_untouched(folder: Path, changed: Path) -> str | None:
    """Check that every packed image but the damaged one is what it was."""
    fields = []
    for place in (folder, folder.parent / "garden"):
        samples = {}
        for reader in (ShardReader(place / "images" / split) for split in ("train", "heldout")):
            samples |= {(row := reader[i])["__key__"]: row["png"].tobytes() for i in range(len(reader))}
        fields.append(samples)
    differing = [key for key in fields[1] if fields[0].get(key) != fields[1][key]]
    return f"images {differing} differ, only {changed.name} was damaged" if len(differing) > 1 else None
