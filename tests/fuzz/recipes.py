"""The commands that read damaged files: what each command reads, and what it writes."""

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
import yaml
from PIL import Image

from data.digits import digits
from data.packed_shards import image_to_png
from data.shards import ShardReader
from tests.helpers.commands import REPOSITORY
from tests.helpers.results import is_result, result_lines
from tests.helpers.training import read_config, study_config

FIT = (
    *("--trainer.logger", "false", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"),
    *("--data.batch", "4", "--checkpoints.every", "1", "--metrics.every", "1"),
)
GENERATOR = (
    *("--model.denoiser.net.size", "4", "--model.denoiser.net.width", "16"),
    *("--model.denoiser.net.depth", "1", "--model.codec", "latents/codec"),
)
AUTOENCODER = (
    *("fit", "--config", "autoencoder.yaml", "--out", "autoencoder", *FIT),
    *("--data.source.path", "images/train", "--model.block_out_channels", "[8,8,8]"),
)
TEACHER = (
    *("fit", "--config", "teacher.yaml", "--out", "teacher", *FIT, *GENERATOR),
    *("--data.source.path", "latents"),
)
STUDENT = (
    *("fit", "--config", "student.yaml", "--out", "student", *FIT, *GENERATOR),
    *("--data.source.path", "pairs", "--model.initial", "teacher"),
)
PACK = (
    *("pack", "--images", "photos", "--out", "images"),
    *("--size", "16", "--shard", "10", "--grey", "true"),
)
ENCODE = (
    *("encode", "--images", "images/train", "--codec", "autoencoder", "--out", "latents"),
    *("--shard", "10"),
)
COLLECT = (
    *("collect", "--teacher", "teacher", "--out", "pairs"),
    *("--pairs", "16", "--steps", "1", "--shard", "6", "--batch", "6"),
)
EVALUATE = (
    *("evaluate", "--run", "student", "--images", "images", "--out", "evaluation/student"),
    *("--steps", "[1]", "--samples", "100"),
)
EXPORT = ("export", "--run", "student", "--out", "export")
SAMPLE = ("sample", "--run", "teacher", "--out", "sample.png", "--steps", "1", "--count", "10")


def set_files(folder: str) -> tuple[str, ...]:
    """Return the globs of the files of a set."""
    return (f"{folder}/*.tar", f"{folder}/*.npy", f"{folder}/*.json")


IMAGES = set_files("images/train")
HELDOUT = set_files("images/heldout")
LATENTS = set_files("latents")
PAIRS = set_files("pairs")
TEACHER_CHECKPOINT = "teacher/checkpoints/step=000000002.ckpt"
STUDENT_CHECKPOINT = "student/checkpoints/step=000000002.ckpt"


@dataclass(frozen=True)
class Recipe:
    """A command, with the files that it reads and writes.

    Args:
        words: the command.
        reads: globs of the files that it reads, which are damaged.
        makes: paths that it writes.
        absent: globs of what does not exist yet when the command starts.
        free_input: whether other intact input may give other output, so that the output can
            not be compared with the output for undamaged files.
    """

    words: tuple[str, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    absent: tuple[str, ...] = ()
    free_input: bool = False

    @property
    def repaired_set(self) -> str | None:
        """Folder of the set that a repeated command keeps or repairs; None for other commands.

        It must then be correct, or be refused by its reader.
        """
        if self.absent:
            return None
        sets = {"pack": "images/train", "encode": "latents", "collect": "pairs"}
        return sets.get(self.words[0])


BUILT = {  # in the order in which the artefacts are built
    "pack": Recipe(
        PACK,
        reads=("photos/*/*.png", "photos/*/*.jpg"),
        makes=("images/train", "images/heldout"),
        absent=("images/*/*",),
        free_input=True,
    ),
    "autoencoder": Recipe(
        AUTOENCODER,
        reads=(*IMAGES, "autoencoder.yaml"),
        makes=("autoencoder",),
        absent=("autoencoder",),
    ),
    "encode": Recipe(
        ENCODE,
        reads=(*IMAGES, "autoencoder/codec/*"),
        makes=("latents",),
        absent=("latents",),
    ),
    "teacher": Recipe(
        TEACHER,
        reads=(*LATENTS, "latents/codec/*", "teacher.yaml"),
        makes=("teacher",),
        absent=("teacher",),
    ),
    "collect": Recipe(
        COLLECT,
        reads=(TEACHER_CHECKPOINT, "teacher/codec/*"),
        makes=("pairs",),
        absent=("pairs",),
    ),
    "student": Recipe(
        STUDENT,
        reads=(*PAIRS, TEACHER_CHECKPOINT, "latents/codec/*", "student.yaml"),
        makes=("student",),
        absent=("student",),
    ),
    "evaluate": Recipe(
        EVALUATE,
        reads=(
            *(*IMAGES, *HELDOUT, "images/classifier.safetensors"),
            *(STUDENT_CHECKPOINT, "student/codec/*"),
        ),
        makes=("evaluation/student",),
        absent=("evaluation",),
    ),
    "export": Recipe(
        EXPORT,
        reads=(STUDENT_CHECKPOINT, "student/codec/*"),
        makes=("export",),
        absent=("export",),
    ),
    "report": Recipe(
        ("report", "--run", "."),
        reads=(
            *("evaluation/*/*", "export/export.json", "*/metrics.jsonl", "*/config.yaml"),
            "pipeline.yaml",
        ),
        makes=("summary.json", "report.html"),
        absent=("summary.json", "report.html"),
    ),
    "index": Recipe(
        ("index", "--folder", "foreign"),
        reads=("foreign/*.tar",),
        makes=("foreign",),
        absent=("foreign/*.json", "foreign/*.npy"),
        free_input=True,
    ),
}
RECIPES = BUILT | {
    "sample": Recipe(
        SAMPLE,
        reads=(TEACHER_CHECKPOINT, "teacher/codec/*"),
        makes=("sample.png",),
        absent=("sample.png",),
    ),
    "ema": Recipe(
        ("ema", "--run", "teacher", "--width", "0.08"),
        reads=(TEACHER_CHECKPOINT, "teacher/ema/*.safetensors"),
        makes=("teacher/ema/width=0.08.ckpt",),
        absent=("teacher/ema/width=0.08.ckpt",),
    ),
    "resume": Recipe(
        (*TEACHER, "--trainer.max_steps", "3"),
        reads=(
            *(TEACHER_CHECKPOINT, "teacher/metrics.jsonl", "teacher/config.yaml"),
            *("teacher/ema/*", "teacher/codec/*"),
        ),
        makes=("teacher",),
    ),
    "pack again": Recipe(PACK, reads=(*IMAGES, *HELDOUT), makes=("images/train", "images/heldout")),
    "encode again": Recipe(ENCODE, reads=(*LATENTS, "latents/codec/*"), makes=("latents",)),
    "collect again": Recipe(COLLECT, reads=PAIRS, makes=("pairs",)),
    "export again": Recipe(EXPORT, reads=("export/export.json",), makes=("export",)),
    "index again": Recipe(
        ("index", "--folder", "foreign"),
        reads=("foreign/*",),
        makes=("foreign",),
        free_input=True,
    ),
    "run": Recipe(
        ("run", "pipeline.yaml"),
        reads=("pipeline.yaml", "piped/stages/**/*.json", "piped/summary.json"),
        makes=("piped",),
        free_input=True,
    ),
    "read images": Recipe(
        ("read", "--folder", "images/train"), reads=IMAGES, makes=("images/train",)
    ),
    "read latents": Recipe(("read", "--folder", "latents"), reads=LATENTS, makes=("latents",)),
    "read pairs": Recipe(("read", "--folder", "pairs"), reads=PAIRS, makes=("pairs",)),
    "read foreign": Recipe(
        ("read", "--folder", "foreign"), reads=("foreign/*",), makes=("foreign",)
    ),
}


def write_user_files(folder: Path) -> None:
    """Write what a user provides: images, foreign tars, configurations and a pipeline."""
    write_photos(folder / "photos")
    write_foreign_tars(folder / "foreign")
    write_configs(folder)
    write_pipeline(folder / "pipeline.yaml")


def write_photos(folder: Path) -> None:
    """Write 30 digits as PNG and JPEG files in two class folders."""
    for i, digit in enumerate(digits()[:30]):
        class_folder = folder / f"class-{(digit.label or 0) % 2}"
        class_folder.mkdir(parents=True, exist_ok=True)
        suffix = "jpg" if i % 3 else "png"
        digit.open().resize((16, 16)).save(class_folder / f"{i}.{suffix}")


def write_foreign_tars(folder: Path) -> None:
    """Write two tars of five images each, as webdataset writes them."""
    folder.mkdir()
    for number in range(2):
        path = folder / f"part-{number}.tar"
        with webdataset.TarWriter(str(path), mtime=0) as writer:
            for i in range(5):
                image = image_to_png(Image.new("L", (8, 8), 9 * i + 100 * number))
                writer.write({"__key__": f"{number}_{i}", "png": image, "cls": str(i % 3)})


def write_configs(folder: Path) -> None:
    """Write the configurations of the digits; the teacher's has EMA widths."""
    autoencoder = (REPOSITORY / "configs/digits/autoencoder.yaml",)
    configs = {
        "autoencoder": autoencoder,
        "teacher": study_config("digits", "teacher"),
        "student": study_config("digits", "student"),
    }
    for name, files in configs.items():
        config = read_config(files)
        if name == "teacher":
            config["trainer"]["callbacks"][0]["init_args"]["widths"] = [0.05, 0.1]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def write_pipeline(path: Path) -> None:
    """Write a pipeline of two stages, with a target."""
    pack = {"out": "{out}/images", "images": "photos", "size": 16, "holdout": 0.2}
    stages = [
        {"name": "pack", "pack": pack, "smoke": {"size": 8}},
        {"name": "look", "index": {"folder": "foreign"}},
    ]
    targets = {"quality": {"value": "student.1.fd", "at_most": 1000.0}}
    path.write_text(yaml.safe_dump({"out": "piped", "targets": targets, "stages": stages}))


def read_set(folder: Path) -> None:
    """Read every sample of a set, as training does, and write read.pt with what was read.

    The campaign adds this function to the commands as `rectify read`.
    """
    from data.images import Images
    from data.latents import Latents
    from data.pairs import Pairs
    from data.shards import read_manifest

    manifest = read_manifest(folder)
    sources = {"images": Images, "latents": Latents, "pairs": Pairs}
    source = sources[manifest["kind"]](str(folder))
    batch = source.read(np.arange(manifest["samples"]))
    torch.save([batch.x, batch.condition, batch.noise], "read.pt")


def remove_durations(value: Any) -> Any:
    """Return a value without what differs between any two runs: seconds, and seals over them."""
    if isinstance(value, list):
        return [remove_durations(part) for part in value]
    if not isinstance(value, dict):
        return value
    kept = {key: part for key, part in value.items() if key not in ("seconds", "seal")}
    return {key: remove_durations(part) for key, part in kept.items()}


def read_comparable(path: Path) -> Any:
    """Return the content of a file without what differs between equal runs."""
    if path.suffix == ".ckpt":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint.pop("origin", None)  # it has the revision and the time
        return checkpoint
    if path.suffix == ".json":
        return remove_durations(json.loads(path.read_bytes()))
    if path.suffix == ".jsonl":
        return result_lines(path.parent)
    if path.suffix == ".html":
        return len(path.read_bytes()) > 0  # its figures are those of summary.json
    return path.read_bytes()


def is_hidden(path: Path) -> bool:
    """Return whether a part of a path begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def read_results(folder: Path, recipe: Recipe, damaged: Path | None = None) -> dict[str, Any]:
    """Return the content of all files that a recipe made in a folder, except the damaged one."""
    if recipe.words[0] == "read":
        return {"read": torch.load(folder / "read.pt")}
    results = {}
    for name in recipe.makes:
        top = folder / name
        files = [top] if top.is_file() else sorted(top.rglob("*"))
        for path in files:
            relative = path.relative_to(folder)
            is_made = is_result(relative) and not is_hidden(relative)
            if path.is_file() and path != damaged and is_made:
                results[str(relative)] = read_comparable(path)
    return results


def check_free_result(folder: Path, recipe: Recipe, damaged: Path) -> str | None:
    """Return what is wrong with the result of free input, or None.

    Undamaged input must give the same result as before, and the reader must return the bytes
    that the files hold.
    """
    if recipe.words[0] == "index":
        return check_index(folder)
    if recipe.words[0] == "pack":
        return check_other_images(folder, damaged)
    return None


def check_index(folder: Path) -> str | None:
    """Compare what our reader returns for foreign tars with what Python's tarfile reads."""
    # our reader
    reader = ShardReader(folder / "foreign")
    read = {}
    for i in range(len(reader)):
        sample = reader[i]
        key = sample.pop("__key__")
        for field, view in sample.items():
            read[f"{key}.{field}"] = view.tobytes()

    # Python's
    members = {}
    for path in sorted((folder / "foreign").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    members[member.name] = file.read()

    wrong = [name for name, data in read.items() if members.get(name) != data]
    return f"the reader returned other bytes than the tar holds: {wrong}" if wrong else None


def read_images(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every packed image by its key."""
    images = {}
    for split in ("train", "heldout"):
        reader = ShardReader(folder / "images" / split)
        for i in range(len(reader)):
            sample = reader[i]
            images[sample["__key__"]] = sample["png"].tobytes()
    return images


def check_other_images(folder: Path, damaged: Path) -> str | None:
    """Check that every packed image except the damaged one is unchanged."""
    images = read_images(folder)
    originals = read_images(folder.parent / "originals")
    differing = [key for key, data in originals.items() if images.get(key) != data]
    if len(differing) <= 1:
        return None
    return f"images {differing} differ, only {damaged.name} was damaged"
