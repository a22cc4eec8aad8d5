"""Collecting pairs: a teacher draws one sample from each noise, and (noise index, sample, condition) is kept."""

import logging
from pathlib import Path
from typing import Literal

import torch

from data.pairs import PairWriter
from data.progress import Meter
from models import sampler as samplers
from models import teacher as teachers
from models.condition import ClassLabel, Condition
from models.guidance import Guided
from trainer import job

log = logging.getLogger(__name__)


def asked(condition: Condition, indices: range) -> torch.Tensor | None:
    """Return the raw conditions asked at global indices: every class in turn, or nothing."""
    return torch.tensor(indices) % condition.classes if isinstance(condition, ClassLabel) else None


@torch.inference_mode()
def collect(
    teacher: Path,
    out: Path,
    pairs: int = 10_240,
    steps: int = 32,
    sampler: Literal["DDIM", "Heun"] = "DDIM",
    guidance: float = 1.0,
    seed: int = 1,
    shard: int = 512,
    batch: int = 256,
    store_noise: bool = False,
) -> None:
    """Collect pairs from a teacher's EMA weights; `torchrun --nproc-per-node N -m deploy collect ...` uses N processes.

    Any number of processes, restarts and kills gives the same bytes.

    Args:
        teacher: a run folder or a checkpoint of ours.
        out: folder for the pair set.
        pairs: how many to collect.
        steps: of the teacher's sampler.
        sampler: the teacher's sampler.
        guidance: scale w of u + w (c - u), baked into the pairs; 1 is none.
        seed: of the noises; keep it apart from the seeds of evaluation.
        shard: pairs in one shard, the unit of work.
        batch: samples drawn at once.
        store_noise: keep each noise beside its sample too.
    """
    state = job.start()
    denoiser, _, condition = teachers.load(teacher)
    walk = getattr(samplers, sampler)(steps)
    provenance = {
        "teacher": teachers.fingerprint(denoiser),
        "interpolant": repr(denoiser.interpolant),
        "prediction": repr(denoiser.prediction),
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "batch": batch,
        "dtype": "float16",
    }
    writer = PairWriter(out, provenance, pairs, seed, denoiser.shape, shard, store_noise)
    shards, guided = writer.shards, Guided(denoiser, guidance).to(state.device)
    if (out / "manifest.json").exists() and not shards.missing():
        log.info("%s is finished", out)
        return
    mine = job.share(state, list(shards.numbers()))
    done = sum(len(shards.indices(n)) for n in mine if shards.finished(n))
    with Meter("collect", sum(len(shards.indices(n)) for n in mine), "pairs", done, state.is_main_process) as meter:
        for number in mine:
            if shards.finished(number):
                continue
            noise, raw = writer.noise(number), asked(condition, shards.indices(number))
            told = condition(raw)
            samples = []
            for start in range(0, len(noise), batch):
                part = slice(start, start + batch)
                cond = None if told is None else told[part].to(state.device)
                samples.append(walk(guided, noise[part].to(state.device), cond).cpu())
                meter.add(len(samples[-1]))
            writer.write(number, torch.cat(samples), raw)
    shards.finish()
