"""Teachers: denoisers read back from our runs and checkpoints, and the plain descriptions that rebuild them."""

import hashlib
import importlib
import inspect
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
from torch import Tensor, nn

from models import codec as codecs
from models.codec import Codec
from models.condition import Condition
from models.denoiser import Denoiser
from models.tensors import unpacked
from models.text import Prompts

CODEC = "codec"  # folder of the frozen codec in a run
TEXTS = "texts"  # folder of what encodes texts, in a run
FORMAT = 1  # of what `Generator` adds to a checkpoint under "rectify"


def describe(thing: Any, whole: bool = True) -> Any:
    """Return the plain description (class_path, init_args) of an object of `models`, the inverse of `build`.

    It relies on one habit of this package: a constructor keeps every argument under its own name. Not whole: without the
    arguments that have their default, so that an argument which a later version adds changes nothing.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, list | tuple):
        return [describe(part, whole) for part in thing]
    if not type(thing).__module__.startswith("models."):
        raise ValueError(f"{type(thing).__qualname__}: only classes of `models` can be saved; put a network into models/nets/")
    parameters = inspect.signature(type(thing).__init__).parameters
    values = {name: getattr(thing, name) for name in sorted(parameters.keys() - {"self", "args", "kwargs"})}
    told = {name: describe(value, whole) for name, value in values.items() if whole or value != parameters[name].default}
    return {"class_path": f"{type(thing).__module__}.{type(thing).__qualname__}", "init_args": told}


def build(spec: Any) -> Any:
    """Build what `describe` described. Only classes of `models` are built: a checkpoint cannot name other code."""
    if isinstance(spec, list):
        return [build(part) for part in spec]
    if not isinstance(spec, dict):
        return spec
    module, _, name = spec["class_path"].rpartition(".")
    if not module.startswith("models."):
        raise ValueError(f"class_path {spec['class_path']}: a checkpoint may only name classes of `models`")
    cls = getattr(importlib.import_module(module), name)
    if not isinstance(cls, type) or cls.__module__ != module:
        raise ValueError(f"class_path {spec['class_path']}: no class of {module}")
    arguments = {key: build(value) for key, value in spec["init_args"].items()}
    for key, parameter in inspect.signature(cls, eval_str=True).parameters.items():
        if key in arguments and not _suits(arguments[key], parameter.annotation):
            raise TypeError(f"{name}: {key} is {arguments[key]!r}, wanted {parameter.annotation}")
    return cls(**arguments)


def _suits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of an annotated type, as far as classes, unions and sequences say it."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_suits(value, part) for part in parts)
    if kind in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_suits(part, parts[0]) for part in value if parts)
    if kind in (bool, int, str):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    return isinstance(value, kind) if isinstance(kind, type) else True


def read(path: str | Path, tensors: bool = True) -> dict:
    """Read one of our checkpoints without running code from it; a file that is not one is an error that names it.

    Args:
        path: a file, or the folder of a sharded one.
        tensors: False: a sharded one's tensors are not needed.
    """
    try:
        if Path(path).is_dir():
            from models import sharded  # torch.distributed is slow to import

            checkpoint = sharded.read(Path(path)) if tensors else sharded.read_rest(Path(path))
        elif Path(path).suffix == ".safetensors":
            average, about = unpacked(path)
            checkpoint = {"rectify": json.loads(about["rectify"]), "state_dict": {}, "ema": average}
        else:
            with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums of what it reads
                if torn := archive.testzip():
                    raise ValueError(f"the checksum of {torn} in it does not fit")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not a readable checkpoint ({why})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("rectify"), dict):
        raise ValueError(f"{path}: not a checkpoint of ours (it has no `rectify` entry); give a run folder made by `rectify fit`")
    if (found := checkpoint["rectify"].get("format")) != FORMAT:
        raise ValueError(f"{path}: checkpoint format {found}, this version reads {FORMAT}")
    named = re.fullmatch(r"step=(\d+)", Path(path).stem)
    if named and (step := checkpoint.get("global_step", int(named[1]))) != int(named[1]):
        raise ValueError(f"{path}: holds step {step}; give it its own name back")
    return checkpoint


def newest(run: str | Path) -> Path:
    """Return the newest finished checkpoint of a run folder (a checkpoint is returned as it is)."""
    run = Path(run)
    if run.is_file() or (run / "rest.pt").is_file():
        return run
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run folder; train one with `rectify fit`")
    found = sorted((run / "checkpoints").glob("step=*.ckpt"))
    if not found:
        raise FileNotFoundError(f"{run}: no checkpoint under {run / 'checkpoints'}; run its `rectify fit` first")
    return found[-1]


def load(path: str | Path) -> tuple[Denoiser, Codec, Condition]:
    """Load (denoiser, codec, condition) from a run folder or a checkpoint, with the EMA weights where there are any.

    A folder of a diffusers pipeline is a teacher too (see `models.pipeline`).

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        ValueError: the file is torn, or no checkpoint of a generator.
    """
    if (Path(path) / "model_index.json").is_file():
        from models import pipeline  # diffusers is slow to import

        return pipeline.load(Path(path))
    file = newest(path)
    checkpoint = read(file)
    spec = checkpoint["rectify"]
    if "denoiser" not in spec:
        raise ValueError(f"{file}: holds no denoiser (is it an autoencoder's or a flow's run?)")
    try:
        denoiser, condition = build(spec["denoiser"]), build(spec["condition"])
        denoiser.load_state_dict(checkpoint.get("ema") or weights(checkpoint))
        if not isinstance(denoiser, Denoiser) or not isinstance(condition, Condition) or spec["codec"] not in (None, CODEC):
            raise ValueError(f"it describes {type(denoiser)}, {type(condition)} and codec {spec['codec']!r}")
    except Exception as error:  # constructors and torch raise many kinds on descriptions and weights that do not fit
        why = f"no entry {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"{file}: its description and weights do not make a denoiser here ({why})") from error
    denoiser.guidance = _scales(spec.get("guidance"), file)
    if isinstance(condition, Prompts) and (texts := file.resolve().parent.parent / TEXTS).is_dir():
        condition.encoder = str(texts)  # wherever the run is now
    codec = codecs.load(file.resolve().parent.parent / CODEC if spec["codec"] else None)
    return denoiser.eval().requires_grad_(False), codec, condition


def _scales(told: Any, file: Path) -> float | list[float] | None:
    """Return what a checkpoint says of its pairs' guidance."""
    values = told if isinstance(told, list) and len(told) == 2 else [told]
    if told is not None and not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{file}: guidance is {told!r}, wanted a number, or [low, high]")
    return told


def weights(checkpoint: dict) -> dict[str, Tensor]:
    """Return the denoiser's own training weights in a generator's checkpoint."""
    prefix = "denoiser."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


def fingerprint(denoiser: nn.Module) -> str:
    """Return a sha256 of what a denoiser is: its description and its weights, bit by bit."""
    digest = hashlib.sha256(repr(describe(denoiser, whole=False)).encode())
    for name, value in sorted(denoiser.state_dict().items()):
        if name.endswith(".nothing"):  # what text encoders make, whose last bits depend on the processor
            continue
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
