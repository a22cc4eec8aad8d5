"""Checkpoints: denoisers read from our runs and checkpoints, or from diffusers pipelines.

No code from a checkpoint is run.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data.files import files_by_step
from models.codec import Codec, load_codec
from models.condition import Condition
from models.denoiser import Denoiser
from models.description import build, identity
from models.diffusers.text import Prompts
from models.tensors import read_metadata, read_safetensors, tensor_digest

CODEC = "codec"  # folder of the frozen codec in a run
TEXTS = "texts"  # folder of the text encoders in a run
OPTIMIZER_STATE = "optimizer_states"  # Lightning's entry for it in a checkpoint
CHECKPOINT_SUFFIX = ".ckpt"  # of a checkpoint step=N.ckpt in a run
# How users name models of the hub, the configs of a pipeline's parts, and what makes a folder of
# a pipeline's single file.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PART_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")
SINGLE_FILE = (
    "if it is a single file of ComfyUI, kohya or another program, make a folder of it: "
    "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
)
FORMAT = 2  # of what `Generator` adds to a checkpoint under "rectify"


class LoadedModel(NamedTuple):
    """A model that was loaded from a checkpoint or a pipeline."""

    denoiser: Denoiser
    codec: Codec
    condition: Condition


def load_checkpoint(path: str | Path) -> LoadedModel:
    """Load a model from a run folder or a checkpoint, with the EMA weights if there are any.

    The folder of a diffusers pipeline is loaded too (see `models.diffusers.pipeline`).

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: the file is damaged, of another format, or not the checkpoint of a generator.
    """
    if is_pipeline(path):
        from models.diffusers.pipeline import load_pipeline  # diffusers is slow to import

        return load_pipeline(Path(path))
    file = newest_checkpoint(path)
    checkpoint = read_checkpoint(file)
    spec = checkpoint["rectify"]
    if "denoiser" not in spec:
        raise ValueError(
            f"{file}: it has no denoiser (is it the run of an autoencoder or a normalizing flow?)"
        )
    # Build the denoiser and its condition, and load the weights.
    try:
        denoiser = build(spec["denoiser"])
        condition = build(spec["condition"])
        denoiser.load_state_dict(checkpoint.get("ema") or denoiser_weights(checkpoint))
        if not isinstance(denoiser, Denoiser) or not isinstance(condition, Condition):
            raise ValueError(f"it describes a {type(denoiser)} and a {type(condition)}")
        if spec["codec"] not in (None, CODEC):
            raise ValueError(f"its codec is {spec['codec']!r}")
    except Exception as error:  # constructors and torch raise many kinds of errors
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"no entry {error}"
        raise ValueError(
            f"{file}: its description and weights do not make a denoiser ({reason})"
        ) from error
    denoiser.guidance = _check_guidance(spec.get("guidance"), file)
    denoiser.jumps = spec.get("jumps", True)  # older runs do not record it
    if not isinstance(denoiser.jumps, bool):
        raise ValueError(f"{file}: jumps is {denoiser.jumps!r}; it must be true or false")
    # Text encoders and codec are found in the run, wherever it was moved.
    run = file.resolve().parent.parent
    if isinstance(condition, Prompts) and (run / TEXTS).is_dir():
        condition.encoder = str(run / TEXTS)
    codec = load_codec(run / CODEC if spec["codec"] else None)
    return LoadedModel(denoiser.eval().requires_grad_(False), codec, condition)


def is_pipeline(path: str | Path) -> bool:
    """Whether a path is the folder of a diffusers pipeline."""
    return (Path(path) / "model_index.json").is_file()


def _check_guidance(value: Any, file: Path) -> float | list[float] | None:
    """Return the guidance of a checkpoint's pairs: a number, [low, high], or None."""
    if value is None:
        return None
    numbers = value if isinstance(value, list) and len(value) == 2 else [value]
    for number in numbers:
        if type(number) not in (int, float):
            raise ValueError(f"{file}: guidance is {value!r}; it must be a number or [low, high]")
    return value


def newest_checkpoint(path: str | Path) -> Path:
    """Return the newest checkpoint of a run folder; of a checkpoint, itself.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
    """
    run = Path(path)
    if run.is_file() or (run / "rest.pt").is_file():
        return run
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder; {_missing_hint(str(path))}")
    found = files_by_step(run / "checkpoints", CHECKPOINT_SUFFIX)
    if not found:
        hint = _foreign_folder_hint(run)
        if hint:
            raise FileNotFoundError(f"{run}: {hint}")
        raise FileNotFoundError(
            f"{run}: no checkpoint under {run / 'checkpoints'}; run its `rectify fit` first"
        )
    return found[-1]


def _missing_hint(path: str) -> str:
    """Return what to do about a model that is not there: it may be the name of one on the hub."""
    if HUB_NAME.fullmatch(path):
        return (
            "a model of the hub is downloaded first (`hf download NAME --local-dir FOLDER`), and "
            "FOLDER is given here"
        )
    return "train one with `rectify fit`"


def _foreign_folder_hint(folder: Path) -> str:
    """Return what is wrong with a folder of diffusers that is no pipeline's, or ""."""
    snapshots = folder / "snapshots"
    if snapshots.is_dir():
        revision = max(snapshots.iterdir(), default=snapshots / "REVISION")
        return f"a cache folder of the hub; give the snapshot in it, {revision}"
    for file in PART_CONFIGS:
        if (folder / file).is_file():
            return (
                f"one part of a pipeline (it has a {file}); give the pipeline's folder, the one "
                f"with model_index.json, here {folder.resolve().parent}"
            )
    if list(folder.glob("**/manifest.json")):
        return "it is a set of samples, which has no checkpoint; give a run folder"
    if list(folder.glob("*.safetensors")):
        return f"it has weights, but no model_index.json; {SINGLE_FILE}"
    return ""


def read_checkpoint(path: str | Path, tensors: bool = True, resume: bool = False) -> dict[str, Any]:
    """Read one of our checkpoints without running code from it.

    Args:
        path: a file, or the folder of a sharded checkpoint.
        tensors: False skips the tensors of a sharded checkpoint.
        resume: read all of it into memory. Otherwise the state of the optimizer is left out, and
            the tensors of a file are mapped: only those that are used take memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or of another format; the message names it.
    """
    path = Path(path)
    try:
        checkpoint = _read_any(path, tensors, resume)
    except Exception as error:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such checkpoint") from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: not a readable checkpoint ({reason}); {_way_out(path)}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("rectify"), dict):
        raise ValueError(
            f"{path}: not a checkpoint of rectify (it has no `rectify` entry); use a run folder "
            f"made by `rectify fit`; {SINGLE_FILE}"
        )
    if not resume:
        checkpoint.pop(OPTIMIZER_STATE, None)
    found = checkpoint["rectify"].get("format")
    if found != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {found}; this version reads format {FORMAT}; "
            "train the run again with `rectify fit`"
        )
    # A checkpoint that was renamed would be resumed at the wrong step.
    name = re.fullmatch(r"step=(\d+)", path.stem)
    if name:
        step = checkpoint.get("global_step", int(name[1]))
        if step != int(name[1]):
            raise ValueError(f"{path}: contains step {step}; rename it to that step")
    return checkpoint


def _way_out(path: Path) -> str:
    """Return what to do about a damaged checkpoint: use an older one if there is any."""
    checkpoints = files_by_step(path.parent, path.suffix)
    older = checkpoints[: checkpoints.index(path)] if path in checkpoints else []
    if older:
        return f"{older[-1]} is older: go on from it with `rectify fit ... --resume {older[-1]}`"
    if path.is_file() and not path.name.startswith("step="):
        return SINGLE_FILE
    return "restore it, or move it away and make it again"


def _read_any(path: Path, tensors: bool, resume: bool) -> Any:
    """Read a sharded checkpoint, a safetensors file, or a file of torch.save."""
    if path.is_dir():
        from models import sharded  # torch.distributed is slow to import

        if not tensors:
            return sharded.read_rest(path)
        return sharded.read(path, skipped=() if resume else (OPTIMIZER_STATE,))
    if path.suffix == ".safetensors":
        if "rectify" not in read_metadata(path):
            return None
        average, metadata = read_safetensors(path)
        return {"rectify": json.loads(metadata["rectify"]), "state_dict": {}, "ema": average}
    with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of its entry {damaged} does not match")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=not resume)


def denoiser_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the denoiser's training weights in a generator's checkpoint."""
    prefix = "denoiser."
    weights = {}
    for key, value in checkpoint["state_dict"].items():
        if key.startswith(prefix):
            weights[key.removeprefix(prefix)] = value
    return weights


def fingerprint(denoiser: nn.Module) -> str:
    """Return a sha256 that identifies a denoiser: its description and the bits of its weights."""
    weights = {}
    for name, value in denoiser.state_dict().items():
        if not name.endswith(".empty_text"):  # text encoders make it, differently on every CPU
            weights[name] = value
    return tensor_digest(weights, identity(denoiser))
