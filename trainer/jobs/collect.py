"""Collecting pairs: a teacher draws one sample from each noise."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor

from data.noise import guidance_scales
from data.pairs import PairWriter
from models.condition import ClassLabel
from models.description import describe
from models.diffusers.pipeline import part_digests
from models.diffusers.text import Prompts
from trainer.conditions import encode_condition, requested_conditions
from trainer.jobs import job
from trainer.jobs.options import DEFAULT_SAMPLING, DeterministicSampler, SamplingOptions
from trainer.jobs.sampling_model import SamplingModel, check_guidance_options

log = logging.getLogger(__name__)


class ShardContent(NamedTuple):
    """The pairs of one shard."""

    samples: Tensor  # (n, C, H, W)
    conditions: Tensor | None  # raw, (n,)
    noises: Tensor | None = None  # (n, C, H, W); None: the noises of the set's seed
    scales: Tensor | None = None  # guidance scales, (n,); None: the same scale for every pair


def provenance(teacher: SamplingModel) -> dict[str, Any]:
    """Return what the manifest of a pair set records of the teacher and its prompts.

    Options of sampling that are not the default are among it.
    """
    record: dict[str, Any] = {
        "teacher": teacher.fingerprint,
        "interpolant": describe(teacher.denoiser.interpolant),
        "prediction": describe(teacher.denoiser.prediction),
    }
    if isinstance(teacher.condition, Prompts):
        record["prompts"] = teacher.condition.digest
    parts = part_digests(teacher.codec, teacher.condition, teacher.path)
    if parts:
        record["parts"] = parts
    return record | teacher.record_options()


def sample_batches(
    sampler: Callable[..., Tensor],
    teacher: SamplingModel,
    states: Tensor,
    raw: Tensor | None,
    guidance: float | Tensor,
    batch: int,
    device: torch.device,
) -> Tensor:
    """Apply a sampler, or its `invert`, to states in batches.

    Args:
        sampler: called as sampler(denoiser, states, cond).
        teacher: the teacher.
        states: where the sampler starts, (n, C, H, W).
        raw: raw conditions, (n,), or None.
        guidance: one guidance scale, or one for each state, (n,).
        batch: states in a batch.
        device: where the teacher runs.

    Returns:
        The final states, (n, C, H, W), on the CPU.
    """
    results = []
    for start in range(0, len(states), batch):
        part = slice(start, start + batch)
        scale = guidance
        if isinstance(guidance, Tensor):
            scale = guidance[part].to(device)
        raw_part = None if raw is None else raw[part]
        cond = encode_condition(teacher.condition, raw_part, device)
        final = sampler(teacher.guide(scale), states[part].to(device), cond)
        results.append(final.cpu())
    return torch.cat(results)


def write_missing_shards(
    writer: PairWriter,
    make: Callable[[int], ShardContent],
    state: PartialState,
    lease: float,
    verb: str,
    evaluations: int,
) -> None:
    """Write the shards that a pair set still lacks, and then its manifest.

    The bytes do not depend on the number of processes, nor on how often they are restarted.

    Args:
        writer: writes the set.
        make: returns the content of the shard with a given number.
        state: this process.
        lease: see `job.iterate_shards`.
        verb: name of the work, for the progress line.
        evaluations: network evaluations for each pair.
    """
    shards = writer.shards
    if (shards.folder / "manifest.json").exists() and not shards.missing():
        log.info("%s is finished", shards.folder)
        return
    for number in job.iterate_shards(shards, state, lease, verb, "pairs"):
        writer.write(number, *make(number))
    shards.finish(evaluations=shards.count * evaluations)


@torch.inference_mode()
def collect(
    teacher: Path,
    out: Path,
    pairs: int = 10_240,
    steps: int = 32,
    sampler: DeterministicSampler = "DDIM",
    sampling: SamplingOptions = DEFAULT_SAMPLING,
    guidance_max: float | None = None,
    seed: int = 1,
    shard: int = 512,
    batch: int = 256,
    store_noise: bool = False,
    classes: int | None = None,
    lease: float = 0.0,
) -> None:
    """Collect (noise, sample) pairs from a teacher's EMA weights.

    `torchrun --nproc-per-node N -m deploy collect ...` collects on N processes. The output is
    byte-identical however many processes you use and however often they are restarted. The
    manifest records the cost of the set as `evaluations`: network evaluations on one sample each,
    guidance included. A shard that was made twice because a process was killed counts once.

    Args:
        teacher: a run folder, a checkpoint, or the folder of a diffusers pipeline.
        out: folder for the pair set.
        pairs: number of pairs.
        steps: steps of the teacher's sampler.
        sampler: the teacher's sampler. Second-order samplers make two evaluations per step
            (DPMSolver2M makes one), RungeKutta4 makes four.
        sampling: guidance, which becomes part of the pairs, times and interpolant.
        guidance_max: sample each pair at a random guidance scale, uniform from `guidance` to this
            value, and record it: for a student whose network reads the scale
            (`guidance_embedded`).
        seed: seed of the noises; use other seeds than for evaluation.
        shard: pairs in one shard, the unit of work.
        batch: samples generated at once.
        store_noise: store each noise beside its sample, too.
        classes: use only the first `classes` classes of the teacher; all by default, in turn.
        lease: 0 divides the shards among the processes by rank. Otherwise processes, which may
            differ in speed, join and leave, claim shards through files in the folder, and a claim
            expires if it is not renewed within this many seconds (60, for example).
    """
    # Check the options, and load the teacher.
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    guidance = sampling.guidance
    if guidance_max is not None and not guidance < guidance_max:
        raise ValueError(
            f"guidance_max is {guidance_max}; it must be larger than guidance ({guidance})"
        )
    state = job.start()
    costliest = guidance  # a scale of 1 costs half
    if guidance_max not in (None, 1):
        costliest = guidance_max
    model = SamplingModel(teacher, sampling, costliest, state.device)
    check_guidance_options(sampling, [model])
    integrator = model.build_sampler(sampler, steps)
    evaluations = integrator.nfe(model.guide(costliest))

    # What the set is: another plan in the same folder is an error.
    plan = {
        **provenance(model),
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance if guidance_max is None else [guidance, guidance_max],
        "batch": batch,
        "dtype": "float16",
    }
    if classes is not None:
        available = 0
        if isinstance(model.condition, ClassLabel):
            available = model.condition.classes
        if not 1 <= classes <= available:
            raise ValueError(f"classes is {classes}; {teacher} has {available} classes")
        plan["requested_classes"] = classes
    writer = PairWriter(out, plan, pairs, seed, model.denoiser.shape, shard, store_noise)

    def make(number: int) -> ShardContent:
        indices = writer.shards.indices(number)
        raw = requested_conditions(model.condition, indices, classes)
        eps = writer.noise(number)
        scales = None
        if guidance_max is not None:
            scales = guidance_scales(seed, indices, guidance, guidance_max)
        samples = sample_batches(
            integrator,
            model,
            eps,
            raw,
            guidance if scales is None else scales,
            batch,
            state.device,
        )
        return ShardContent(samples, raw, eps, scales)

    write_missing_shards(writer, make, state, lease, "collect", evaluations)
