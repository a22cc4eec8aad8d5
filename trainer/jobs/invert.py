"""Inversion: a teacher carries real latents to noise.

Mixed with its collected pairs, inverted ones keep a student near the data (Lee et al. 2024,
arXiv 2405.20320).
"""

from pathlib import Path

import numpy as np
import torch

from data.files import canonical, digest
from data.latents import Latents
from data.pairs import PairWriter
from models import sampler as samplers
from models.checkpoint import load_checkpoint
from models.codec import KL, Codec
from models.condition import ClassLabel, Condition, Unconditional
from models.denoiser import Denoiser
from models.diffusers.text import with_prompts
from models.guidance import with_guidance
from trainer.jobs import job
from trainer.jobs.collect import ShardContent, provenance, sample_batches, write_missing_shards


def check_latents(
    source: Latents, teacher: Path, denoiser: Denoiser, codec: Codec, condition: Condition
) -> None:
    """Check that latents have the shape, codec and classes that a teacher was trained with.

    Raises:
        ValueError: they differ.
    """
    # Shape.
    shape = tuple(source.sample().x.shape[1:])
    if shape != denoiser.shape:
        raise ValueError(
            f"latents: {source} holds latents of shape {shape}, "
            f"{teacher} was built for {denoiser.shape}; give the latents it was trained on"
        )

    # Codec; the manifest of latents that were not made by `rectify encode` has none.
    manifest = source.manifest
    if isinstance(codec, KL) and manifest.get("codec", codec.weights()) != codec.weights():
        raise ValueError(
            f"latents: {source} was encoded with another codec than that of {teacher}; "
            "give the latents it was trained on"
        )

    # Classes.
    classes = len(manifest.get("classes") or [])
    if isinstance(condition, ClassLabel) and classes > condition.classes:
        raise ValueError(
            f"latents: {source} has {classes} classes, {teacher} has {condition.classes}; "
            "give the latents it was trained on"
        )


@torch.inference_mode()
def invert(
    teacher: Path,
    latents: Path,
    out: Path,
    steps: int = 32,
    sampler: job.DeterministicSampler = "DDIM",
    guidance: float = 1.0,
    shard: int = 512,
    batch: int = 256,
    prompts: Path | None = None,
    lease: float = 0.0,
) -> None:
    """Invert real latents to noise with a teacher's EMA weights.

    The result is a pair set that `Mixed` combines with collected ones. It is byte-identical
    however many processes you use and however often they are restarted, as with
    `rectify collect`.

    Args:
        teacher: a run folder or a checkpoint.
        latents: a set made by `rectify encode`, the one the teacher was trained on.
        out: folder for the pair set.
        steps: steps of the teacher's sampler, taken backwards. Sampling from the noises returns
            the latents up to the sampler's order of accuracy.
        sampler: the teacher's sampler. Second-order samplers make two evaluations per step
            (DPMSolver2M makes one), RungeKutta4 makes four.
        guidance: guidance scale w of u + w (c - u), the same as in the pairs that these will be
            mixed with; 1 is none.
        shard: pairs in one shard, the unit of work.
        batch: latents inverted at once.
        prompts: for a text-to-image teacher: a text file with a prompt for each class, one on
            each line. The set records its digest.
        lease: 0 divides the shards among the processes by rank. Otherwise processes claim shards,
            and a claim expires if it is not renewed within this many seconds.
    """
    # Check the options, and load the teacher and the latents.
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    state = job.start()
    source = Latents(str(latents))
    denoiser, codec, condition = load_checkpoint(teacher)
    condition = with_prompts(condition, prompts, teacher)
    check_latents(source, teacher, denoiser, codec, condition)
    integrator = getattr(samplers, sampler)(steps)

    # What the set is: another plan in the same folder is an error.
    checksums = [record["sha256"] for record in source.manifest["shards"]]
    plan = {
        **provenance(denoiser, condition),
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "batch": batch,
        "dtype": "float16",
        "latents": digest(canonical(checksums)),
    }
    writer = PairWriter(out, plan, len(source.reader), None, denoiser.shape, shard)

    def make(number: int) -> ShardContent:
        real = source.read(np.array(writer.shards.indices(number)))
        raw = None if isinstance(condition, Unconditional) else real.condition
        noises = sample_batches(
            integrator.invert, denoiser, real.x, condition, raw, guidance, batch, state.device
        )
        return ShardContent(real.x, raw, noises)

    # Write the shards.
    evaluations = integrator.nfe(with_guidance(denoiser, guidance))
    write_missing_shards(writer, make, state, lease, "invert", evaluations)
