"""`rectify delta`: a student as the difference of its weights from its base's.

Added to a fine-tune of the base, the difference rectifies that fine-tune, too (PeRFlow, Yan et al.
2024, arXiv 2405.07510).
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import atomic_file
from models.checkpoint import (
    CODEC,
    FORMAT,
    LoadedModel,
    fingerprint,
    load_checkpoint,
    newest_checkpoint,
)
from models.codec import LatentCodec, describe_codec, find_codec_difference
from models.denoiser import Denoiser
from models.description import build, describe
from models.diffusers.networks import Pretrained
from models.diffusers.pipeline import INDEX
from models.diffusers.text import find_text_difference
from models.tensors import read_safetensors, to_safetensors

log = logging.getLogger(__name__)

# Prefixes of the tensors' names in a delta. `difference` returns the three.
STEP_PREFIX = "delta/"
INDEX_PREFIX = "at/"
EXACT_PREFIX = "exact/"
METADATA_KEYS = {"base", "student", "architecture", "rectify"}
INT32_INDICES = 2**31  # weights with at least so many values need 64-bit indices
RIGHT_BASE = "give the --base that the student was initialised from"
MAKE_A_DELTA = "make one with `rectify delta --run STUDENT --base TEACHER --out FILE`"


def delta(base: Path, out: Path, run: Path | None = None, apply: Path | None = None) -> None:
    """Write a student as the difference of its weights from its base's, or apply such a delta.

    With --run, write a delta. With --apply, add a delta to the base, which gives the student bit
    for bit, or to a fine-tune of the base, which must have the same architecture.

    Args:
        base: the run, checkpoint or pipeline folder that the student was initialised from. With
            --apply it may also be a fine-tune of that.
        out: the delta to write; with --apply, the checkpoint (safetensors) to write. The codec is
            looked up one folder above a checkpoint.
        run: the student's run or checkpoint, to write its delta.
        apply: the delta to apply.
    """
    # check the paths
    if (run is None) == (apply is None):
        raise ValueError("delta: give either --run, to write a delta, or --apply, to apply one")
    if apply and not apply.is_file():
        raise FileNotFoundError(f"{apply}: there is no such delta; {MAKE_A_DELTA}")
    inputs = [apply] if apply else []
    for path in (base, run or base):
        inputs.append(path if (path / INDEX).is_file() else newest_checkpoint(path))
    if out.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"{out}: it is one of the inputs; choose another --out")

    # compute and write the result
    loaded = load_checkpoint(base)
    if run:
        tensors, metadata = make_delta(run, loaded)
    else:
        tensors, metadata = apply_delta(apply, loaded, base)  # type: ignore[arg-type]
    with atomic_file(out) as file:
        file.write(to_safetensors(tensors, metadata))


def difference(value: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the float32 difference of two weights, and what adding it to `start` rounds wrongly.

    Where value and start are within a factor of two of each other, as in most of a student, the
    difference is exact (Sterbenz' lemma).

    Returns:
        value - start; the flat indices at which start + difference is not value, bit for bit; the
        exact values at these.
    """
    step = value.float() - start.float()
    again = (start.float() + step).to(value.dtype)
    is_wrong = (again != value) | (again.signbit() != value.signbit())
    indices = is_wrong.flatten().nonzero().flatten()
    return step, indices, value.flatten()[indices]


def make_delta(run: Path, base: LoadedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a student's delta."""
    # compare what training leaves
    base_model = base.denoiser
    student, codec, condition = load_checkpoint(run)
    mismatch = find_codec_difference(describe_codec(base.codec), describe_codec(codec))
    if mismatch:
        raise ValueError(f"{run}: it has another codec than the base ({mismatch}); {RIGHT_BASE}")
    part = find_text_difference(base.condition, condition)
    if part:
        raise ValueError(f"{run}: it has another {part} than the base; {RIGHT_BASE}")
    if isinstance(student.net, Pretrained) and student.net.lora:
        raise ValueError(
            f"{run}: it was trained with LoRA adapters, which are a difference already; "
            "`rectify export` writes them alone"
        )

    # compute the difference of every weight
    tensors: dict[str, Tensor] = {}
    base_weights = base_model.state_dict()
    missing = sorted(base_weights.keys() - student.state_dict().keys())
    if missing:
        raise ValueError(f"{run}: it lacks the weight {missing[0]} of the base; {RIGHT_BASE}")
    for name, value in student.state_dict().items():
        # A weight that only the student has is its own difference.
        start = base_weights.get(name, torch.zeros_like(value))
        if start.shape != value.shape:
            raise ValueError(
                f"{run}: the shape of {name} is {tuple(value.shape)}, in the base "
                f"{tuple(start.shape)}; {RIGHT_BASE}"
            )
        tensors[STEP_PREFIX + name], indices, exact = difference(value, start)
        if len(indices):
            if value.numel() < INT32_INDICES:
                indices = indices.int()
            tensors[INDEX_PREFIX + name] = indices
            tensors[EXACT_PREFIX + name] = exact

    # describe student and base
    spec = {
        "format": FORMAT,
        "codec": CODEC if isinstance(codec, LatentCodec) else None,
        "denoiser": describe(student),
        "condition": describe(condition),
    }
    if not student.jumps:
        spec["jumps"] = False
    metadata = {
        "base": fingerprint(base_model),
        "student": fingerprint(student),
        "architecture": json.dumps(architecture(base_model), sort_keys=True),
        "codec": json.dumps(describe_codec(codec), sort_keys=True),
        "rectify": json.dumps(spec, sort_keys=True),
    }
    return tensors, metadata


def apply_delta(
    path: Path, loaded: LoadedModel, base: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of the checkpoint that a delta makes from a base."""
    # check that they fit
    base_model = loaded.denoiser
    tensors, metadata = read_safetensors(path)
    if not metadata.keys() >= METADATA_KEYS:
        raise ValueError(f"{path}: it is not a delta; {MAKE_A_DELTA}")
    parts = architecture(base_model)
    for part, wanted in json.loads(metadata["architecture"]).items():
        if parts[part] != wanted:
            raise ValueError(
                f"{base}: its {part} is {parts[part]}, that of the delta's base is {wanted}; "
                "give that base, or a fine-tune of it"
            )

    if "codec" in metadata:  # older deltas do not record it
        check_codec(json.loads(metadata["codec"]), describe_codec(loaded.codec), base)

    # add the differences
    weights: dict[str, Tensor] = {}
    base_weights = base_model.state_dict()
    is_original = fingerprint(base_model) == metadata["base"]
    for key in tensors:
        if not key.startswith(STEP_PREFIX):
            continue
        name = key.removeprefix(STEP_PREFIX)
        step = tensors[key]
        start = base_weights.get(name, torch.zeros_like(step))
        weights[name] = (start.float() + step).to(start.dtype)
        if is_original and INDEX_PREFIX + name in tensors:
            indices = tensors[INDEX_PREFIX + name].long()
            weights[name].view(-1)[indices] = tensors[EXACT_PREFIX + name]

    # check that the delta's own base gives the student
    if is_original:
        student = build(json.loads(metadata["rectify"])["denoiser"])
        student.load_state_dict(weights)
        if fingerprint(student) != metadata["student"]:
            raise ValueError(
                f"{path}: added to {base}, it does not give its student; make the delta again"
            )
    else:
        log.info(
            "%s is not the delta's base, but has the same architecture: used as a fine-tune", base
        )
    return weights, {"rectify": metadata["rectify"]}


def check_codec(before: dict[str, Any], now: dict[str, Any], base: Path) -> None:
    """Check that a base has the latents of a delta's base; other weights of a codec are reported.

    Args:
        before: weights and statistics of the codec of the delta's base.
        now: those of the base's codec.
        base: the base, for the message.
    """
    difference = find_codec_difference(before | {"codec": now.get("codec")}, now)
    if difference or before.keys() != now.keys():
        raise ValueError(
            f"{base}: its latents are not those of the delta's base ("
            f"{difference or find_codec_difference(before, now)}); give that base, or a fine-tune "
            "of it"
        )
    if before.get("codec") != now.get("codec"):
        log.info("%s: its codec has other weights than that of the delta's base", base)


def architecture(denoiser: Denoiser) -> dict[str, Any]:
    """Return the description of a denoiser without its weights, by part."""
    return describe(denoiser)["init_args"]
