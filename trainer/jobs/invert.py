"""Inversion: a teacher carries real latents to noise.

Mixed with its collected pairs, inverted ones keep a student near the data (Lee et al. 2024,
arXiv 2405.20320).
"""

from pathlib import Path

import numpy as np
import torch

from data.batch import check_one_size
from data.files import canonical, digest
from data.latents import Latents
from data.pairs import PairWriter
from data.shards import identify_shards
from models.condition import ClassLabel, Unconditional
from trainer.compatibility import check_latents_codec
from trainer.jobs import job
from trainer.jobs.collect import ShardContent, provenance, sample_batches, write_missing_shards
from trainer.jobs.options import DEFAULT_SAMPLING, DeterministicSampler, SamplingOptions
from trainer.jobs.sampling_model import SamplingModel, check_guidance_options


def check_latents(source: Latents, teacher: SamplingModel) -> None:
    """Check that latents have the shape, codec and classes that a teacher was trained with.

    Raises:
        ValueError: they differ.
    """
    # Shape.
    check_one_size(source, "`rectify invert`")
    shape = tuple(source.sample().x.shape[1:])
    expected = teacher.denoiser.shape
    if shape != expected:
        raise ValueError(
            f"latents: {source} holds latents of shape {shape}, "
            f"{teacher.path} was built for {expected}; give the latents it was trained on"
        )

    # Codec; the manifest of latents that were not made by `rectify encode` has none.
    manifest = source.manifest
    check_latents_codec(manifest, f"latents: that of {teacher.path}", teacher.codec, source)

    # Classes.
    classes = len(manifest.get("classes") or [])
    condition = teacher.condition
    if isinstance(condition, ClassLabel) and classes > condition.classes:
        raise ValueError(
            f"latents: {source} has {classes} classes, {teacher.path} has {condition.classes}; "
            "give the latents it was trained on"
        )


@torch.inference_mode()
def invert(
    teacher: Path,
    latents: Path,
    out: Path,
    steps: int = 32,
    sampler: DeterministicSampler = "DDIM",
    sampling: SamplingOptions = DEFAULT_SAMPLING,
    shard: int = 512,
    batch: int = 256,
    lease: float = 0.0,
) -> None:
    """Invert real latents to noise with a teacher's EMA weights.

    The result is a pair set, which the data source `Mixed` combines with collected ones. As with
    `rectify collect`, it is byte-identical however many processes you use and however often they
    are restarted.

    Args:
        teacher: a run folder, a checkpoint, or the folder of a diffusers pipeline.
        latents: a set made by `rectify encode`, the one the teacher was trained on.
        out: folder for the pair set.
        steps: steps of the teacher's sampler, taken backwards. Sampling from the noises returns
            the latents up to the sampler's order of accuracy.
        sampler: the teacher's sampler. Second-order samplers make two evaluations per step
            (DPMSolver2M makes one), RungeKutta4 makes four.
        sampling: guidance, times and interpolant, the same as of the pairs that these will be
            mixed with.
        shard: pairs in one shard, the unit of work.
        batch: latents inverted at once.
        lease: 0 divides the shards among the processes by rank. Otherwise processes claim shards,
            and a claim expires if it is not renewed within this many seconds.
    """
    # Check the options, and load the teacher and the latents.
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    state = job.start()
    source = Latents(str(latents))
    guidance = sampling.guidance
    model = SamplingModel(teacher, sampling, guidance, state.device)
    check_guidance_options(sampling, [model])
    check_latents(source, model)
    integrator = model.build_sampler(sampler, steps)
    evaluations = integrator.nfe(model.guide(guidance), inverse=True)

    # What the set is: another plan in the same folder is an error.
    plan = {
        **provenance(model),
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "batch": batch,
        "dtype": "float16",
        "latents": digest(canonical(identify_shards(source.manifest))),
    }
    writer = PairWriter(out, plan, len(source.reader), None, model.denoiser.shape, shard)

    def make(number: int) -> ShardContent:
        real = source.read(np.array(writer.shards.indices(number)))
        raw = None if isinstance(model.condition, Unconditional) else real.condition
        noises = sample_batches(
            integrator.invert, model, real.x, raw, guidance, batch, state.device
        )
        return ShardContent(real.x, raw, noises)

    write_missing_shards(writer, make, state, lease, "invert", evaluations)
