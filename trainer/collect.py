"""Collecting pairs: a teacher draws one sample from each noise, and (noise index, sample, condition) is kept."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.pairs import PairWriter
from models import sampler as samplers
from models import teacher as teachers
from models.condition import ClassLabel, Condition
from models.denoiser import Denoiser
from models.guidance import Guided
from models.sampler import DenoiserLike, Sampler
from trainer import job

log = logging.getLogger(__name__)


def asked(condition: Condition, indices: range) -> Tensor | None:
    """Return the raw conditions asked at global indices: every class in turn, or nothing."""
    return torch.tensor(indices) % condition.classes if isinstance(condition, ClassLabel) else None


def origin(denoiser: Denoiser) -> dict[str, Any]:
    """Return the provenance that a teacher gives its pairs."""
    form = {"interpolant": repr(denoiser.interpolant), "prediction": repr(denoiser.prediction)}
    return {"teacher": teachers.fingerprint(denoiser), **form}


def draw(
    walk: Sampler, denoiser: DenoiserLike, eps: Tensor, cond: Tensor | None, batch: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield samples, on the CPU, of noises (n, C, H, W) and conditions (n,), in batches."""
    for start in range(0, len(eps), batch):
        told = None if cond is None else cond[start : start + batch].to(device)
        yield walk(denoiser, eps[start : start + batch].to(device), told).cpu()


@torch.inference_mode()
def collect(
    teacher: Path,
    out: Path,
    pairs: int = 10_240,
    steps: int = 32,
    sampler: job.Deterministic = "DDIM",
    guidance: float = 1.0,
    seed: int = 1,
    shard: int = 512,
    batch: int = 256,
    store_noise: bool = False,
    lease: float = 0.0,
) -> None:
    """Collect pairs from a teacher's EMA weights; any number of processes, restarts and kills gives the same bytes.

    `torchrun --nproc-per-node N -m deploy collect ...` works on N processes. The manifest says what the set cost: `evaluations`
    of the network, one sample each, guidance included (shards that a kill made necessary twice count once).

    Args:
        teacher: a run folder or a checkpoint of ours.
        out: folder for the pair set.
        pairs: how many to collect.
        steps: of the teacher's sampler.
        sampler: the teacher's sampler; those of second order cost two evaluations a step (DPMSolver2M one), RungeKutta4 four.
        guidance: scale w of u + w (c - u), baked into the pairs; 1 is none.
        seed: of the noises; keep it apart from the seeds of evaluation.
        shard: pairs in one shard, the unit of work.
        batch: samples drawn at once.
        store_noise: keep each noise beside its sample too.
        lease: 0 deals shards out by rank. Else processes of any speed, that may join and leave, claim them in the folder, and
            one's claim is void when it has not been renewed for so many seconds (60, say).
    """
    if batch < 1:
        raise ValueError(f"batch: {batch}, it must be at least 1")
    state = job.start()
    denoiser, _, condition = teachers.load(teacher)
    walk, guided = getattr(samplers, sampler)(steps), Guided(denoiser, guidance).to(state.device)
    plan = {**origin(denoiser), "sampler": sampler, "steps": steps, "guidance": guidance, "batch": batch, "dtype": "float16"}
    writer = PairWriter(out, plan, pairs, seed, denoiser.shape, shard, store_noise)
    shards = writer.shards
    if (out / "manifest.json").exists() and not shards.missing():
        log.info("%s is finished", out)
        return
    for number in job.work(shards, state, lease, "collect", "pairs"):
        raw = asked(condition, shards.indices(number))
        drawn = list(draw(walk, guided, writer.noise(number), condition(raw), batch, state.device))
        writer.write(number, torch.cat(drawn), raw)
    shards.finish(evaluations=pairs * walk.nfe(guided))
