"""Weight deltas: a student as its difference from its base, which rectifies fine-tunes of that base too (PeRFlow, 2405.07510)."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import atomic
from models import teacher
from models.codec import KL
from models.denoiser import Denoiser
from models.pipeline import INDEX
from models.tensors import packed, unpacked

log = logging.getLogger(__name__)
STEP, AT, EXACT = "delta/", "at/", "exact/"  # what stands before a weight's name: see `difference`


def delta(base: Path, out: Path, run: Path | None = None, apply: Path | None = None) -> None:
    """Write a student as its weights' difference from its base's, or apply such a delta to the base or to a fine-tune of it.

    The base itself gives the student back bit for bit. A fine-tune must be of the same form, and gets the same difference.

    Args:
        base: run, checkpoint or pipeline's folder that the student began from; to apply, also a fine-tune of it.
        out: the delta to write; to apply, the checkpoint (safetensors; keep it one folder below a run's codec).
        run: the student's run or checkpoint, to make a delta.
        apply: the delta to apply.
    """
    if (run is None) == (apply is None):
        raise ValueError("delta: give either --run, to make a delta of it, or --apply, a delta to apply")
    if apply and not apply.is_file():
        raise FileNotFoundError(f"{apply}: no such delta; make one with `rectify delta --run STUDENT --base TEACHER --out FILE`")
    read = [path if (path / INDEX).is_file() else teacher.newest(path) for path in (base, run or base)]
    if out.resolve() in [path.resolve() for path in (*read, *([apply] if apply else []))]:
        raise ValueError(f"{out}: is what is read; give --out another name")
    start = teacher.load(base)[0]
    tensors, about = made(run, start) if run else applied(apply, start, base)  # type: ignore[arg-type]
    with atomic(out) as file:
        file.write(packed(tensors, about))


def difference(value: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return value - start in float32, the flat places where adding it again rounds to something else, and the values there.

    Where value and start are within a factor of two of each other, as in most of a student, there are none (Sterbenz' lemma).
    """
    step = value.float() - start.float()
    again = (start.float() + step).to(value.dtype)
    at = ((again != value) | (again.signbit() != value.signbit())).flatten().nonzero().flatten()
    return step, at, value.flatten()[at]


def made(run: Path, start: Denoiser) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and texts of a student's delta."""
    student, codec, condition = teacher.load(run)
    if getattr(student.net, "lora", 0):
        raise ValueError(f"{run}: was trained by adapters, which are a difference already; `rectify export` writes them alone")
    there, tensors = start.state_dict(), {}
    if unknown := sorted(there.keys() - student.state_dict().keys()):
        raise ValueError(f"{run}: has no weight {unknown[0]}, its base has: it is no student of it")
    for name, value in student.state_dict().items():
        before = there.get(name, torch.zeros_like(value))  # what only the student has stands for itself
        if before.shape != value.shape:
            raise ValueError(f"{run}: {name} is {tuple(value.shape)}, its base's {tuple(before.shape)}: it is no student of it")
        tensors[STEP + name], at, exact = difference(value, before)
        if len(at):
            tensors |= {AT + name: at if value.numel() >= 2**31 else at.int(), EXACT + name: exact}
    parts = {"denoiser": teacher.describe(student), "condition": teacher.describe(condition)}
    spec = {"format": teacher.FORMAT, "codec": teacher.CODEC if isinstance(codec, KL) else None, **parts}
    hashes = {"base": teacher.fingerprint(start), "student": teacher.fingerprint(student)}
    return tensors, {**hashes, "form": json.dumps(form(start), sort_keys=True), "rectify": json.dumps(spec, sort_keys=True)}


def applied(path: Path, start: Denoiser, base: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and texts of the checkpoint that a delta makes of a base."""
    tensors, about = unpacked(path)
    if not {"base", "student", "form", "rectify"} <= about.keys():
        raise ValueError(f"{path}: not a delta; make one with `rectify delta --run STUDENT --base TEACHER --out FILE`")
    for part, wanted in json.loads(about["form"]).items():
        if (found := form(start)[part]) != wanted:
            raise ValueError(f"{base}: its {part} is {found}, that of the delta's base {wanted}; give that or a fine-tune of it")
    there, weights = start.state_dict(), {}
    own = teacher.fingerprint(start) == about["base"]
    for name in (key.removeprefix(STEP) for key in tensors if key.startswith(STEP)):
        step = tensors[STEP + name]
        before = there.get(name, torch.zeros_like(step))
        weights[name] = (before.float() + step).to(before.dtype)
        if own and AT + name in tensors:
            weights[name].view(-1)[tensors[AT + name].long()] = tensors[EXACT + name]
    if own:
        student = teacher.build(json.loads(about["rectify"])["denoiser"])
        student.load_state_dict(weights)
        if teacher.fingerprint(student) != about["student"]:
            raise ValueError(f"{path}: does not give its student back on {base}; make the delta again")
    else:
        log.info("%s is not what the delta was made from, but of the same form: taken for a fine-tune of it", base)
    return weights, {"rectify": about["rectify"]}


def form(denoiser: Denoiser) -> dict[str, Any]:
    """Return what a denoiser is beside its weights, by part."""
    return teacher.describe(denoiser)["init_args"]
