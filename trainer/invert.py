"""Inverting: a teacher carries real latents to noise. Mixed among its pairs, they keep a student near the data (2405.20320)."""

from pathlib import Path

import numpy as np
import torch

from data.files import canonical, digest
from data.latents import Latents
from data.pairs import PairWriter
from models import sampler as samplers
from models import teacher as teachers
from models.codec import KL, Codec
from models.condition import ClassLabel, Condition, Unconditional
from models.denoiser import Denoiser
from models.guidance import at
from models.text import prompted
from trainer import job
from trainer.collect import Made, draw, fill, origin


def agree(teacher: Path, parts: tuple[Denoiser, Codec, Condition], source: Latents) -> None:
    """Refuse latents that are not what this teacher was trained on, naming both values."""
    denoiser, codec, condition = parts
    one, found = source.sample(), source.manifest
    if one.x.shape[1:] != denoiser.shape:
        raise ValueError(f"latents: {source} holds {tuple(one.x.shape[1:])}, {teacher} is built for {denoiser.shape}")
    if isinstance(codec, KL) and found.get("codec", codec.weights()) != codec.weights():  # foreign latents do not tell theirs
        raise ValueError(f"latents: {source} was encoded with another codec than that of {teacher}")
    if isinstance(condition, ClassLabel) and len(found.get("classes") or []) > condition.classes:
        raise ValueError(f"latents: {source} has {len(found['classes'])} classes, {teacher} knows {condition.classes}")


@torch.inference_mode()
def invert(
    teacher: Path,
    latents: Path,
    out: Path,
    steps: int = 32,
    sampler: job.Deterministic = "DDIM",
    guidance: float = 1.0,
    shard: int = 512,
    batch: int = 256,
    prompts: Path | None = None,
    lease: float = 0.0,
) -> None:
    """Carry real latents to noise through a teacher's EMA weights, as a pair set that `Mixed` takes beside collected ones.

    Any number of processes, restarts and kills gives the same bytes, as with `rectify collect`.

    Args:
        teacher: a run folder or a checkpoint of ours.
        latents: a set made by `rectify encode`: what the teacher was trained on.
        out: folder for the pair set.
        steps: of the teacher's sampler, walked backwards: the samples come back to its order of accuracy.
        sampler: the teacher's sampler; those of second order cost two evaluations a step (DPMSolver2M one), RungeKutta4 four.
        guidance: scale w of u + w (c - u), as that of the pairs that these are mixed with; 1 is none.
        shard: pairs in one shard, the unit of work.
        batch: latents inverted at once.
        prompts: what a teacher that is told texts is told of each class, a line for each; the set records it.
        lease: 0 deals shards out by rank; else processes claim them, and a claim not renewed for so many seconds is void.
    """
    if batch < 1:
        raise ValueError(f"batch: {batch}, it must be at least 1")
    state, source = job.start(), Latents(str(latents))
    denoiser, codec, condition = teachers.load(teacher)
    condition = prompted(condition, prompts, teacher)
    agree(teacher, (denoiser, codec, condition), source)
    walk = getattr(samplers, sampler)(steps)
    plan = {
        **origin(denoiser, condition),
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "batch": batch,
        "dtype": "float16",
    }
    plan["latents"] = digest(canonical([part["sha256"] for part in source.manifest["shards"]]))
    writer = PairWriter(out, plan, len(source.reader), None, denoiser.shape, shard)

    def make(number: int) -> Made:
        real = source.read(np.array(writer.shards.indices(number)))
        raw = None if isinstance(condition, Unconditional) else real.condition
        return real.x, raw, draw(walk.invert, denoiser, real.x, condition, raw, guidance, batch, state.device), None

    fill(writer, make, state, lease, "invert", walk.nfe(at(denoiser, guidance)))
