"""Collecting pairs: a teacher draws one sample from each noise, and (noise index, sample, condition) is kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from data.noise import scales
from data.pairs import PairWriter
from models import sampler as samplers
from models import teacher as teachers
from models.condition import Condition
from models.denoiser import Denoiser
from models.guidance import at
from models.text import Prompts, prompted
from trainer import job

log = logging.getLogger(__name__)
Made = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def asked(condition: Condition, indices: range, classes: int | None = None) -> Tensor | None:
    """Return the raw conditions asked at global indices: every class in turn, or the first so many; or nothing."""
    return torch.tensor(indices) % classes if classes else condition.asked(indices)


def told(condition: Condition, raw: Tensor | None, device: torch.device) -> Tensor | None:
    """Return what the network reads of raw conditions, (n, ...), on a device: where texts are encoded, too."""
    return condition(None if raw is None else raw.to(device))


def origin(denoiser: Denoiser, condition: Condition) -> dict[str, Any]:
    """Return the provenance that a teacher, and the prompts that it is asked for, give its pairs."""
    form = {"interpolant": repr(denoiser.interpolant), "prediction": repr(denoiser.prediction)}
    texts = {"prompts": condition.digest} if isinstance(condition, Prompts) else {}
    return {"teacher": teachers.fingerprint(denoiser), **form, **texts}


def draw(
    walk: Callable[..., Tensor],
    denoiser: Denoiser,
    begin: Tensor,
    condition: Condition,
    raw: Tensor | None,
    scale: float | Tensor,
    batch: int,
    device: torch.device,
) -> Tensor:
    """Return, on the CPU, where a sampler, or its `invert`, leads from states (n, C, H, W), in batches.

    Raw conditions are of shape (n,), the scale of guidance is one for all or (n,).
    """
    ends = []
    for start in range(0, len(begin), batch):
        part = slice(start, start + batch)
        guided = at(denoiser, scale[part].to(device) if isinstance(scale, Tensor) else scale).to(device)
        cond = told(condition, None if raw is None else raw[part], device)
        ends.append(walk(guided, begin[part].to(device), cond).cpu())
    return torch.cat(ends)


def fill(writer: PairWriter, make: Callable[[int], Made], state: PartialState, lease: float, verb: str, evaluations: int) -> None:
    """Make what is missing of a pair set; any number of processes, restarts and kills gives the same bytes.

    Args:
        writer: of the set.
        make: returns a shard's samples, raw conditions, noises (None: the set's own) and scales (None: all one), by its number.
        state: this process.
        lease: as in `job.work`.
        verb: for the progress line.
        evaluations: of the network for each pair.
    """
    shards = writer.shards
    if (shards.folder / "manifest.json").exists() and not shards.missing():
        log.info("%s is finished", shards.folder)
        return
    for number in job.work(shards, state, lease, verb, "pairs"):
        writer.write(number, *make(number))
    shards.finish(evaluations=shards.count * evaluations)


@torch.inference_mode()
def collect(
    teacher: Path,
    out: Path,
    pairs: int = 10_240,
    steps: int = 32,
    sampler: job.Deterministic = "DDIM",
    guidance: float = 1.0,
    guidance_max: float | None = None,
    seed: int = 1,
    shard: int = 512,
    batch: int = 256,
    store_noise: bool = False,
    classes: int | None = None,
    prompts: Path | None = None,
    lease: float = 0.0,
) -> None:
    """Collect pairs from a teacher's EMA weights; any number of processes, restarts and kills gives the same bytes.

    `torchrun --nproc-per-node N -m deploy collect ...` works on N processes. The manifest says what the set cost: `evaluations`
    of the network, one sample each, guidance included (shards that a kill made necessary twice count once).

    Args:
        teacher: a run folder or a checkpoint of ours, or the folder of a diffusers pipeline.
        out: folder for the pair set.
        pairs: how many to collect.
        steps: of the teacher's sampler.
        sampler: the teacher's sampler; those of second order cost two evaluations a step (DPMSolver2M one), RungeKutta4 four.
        guidance: scale w of u + w (c - u), baked into the pairs; 1 is none.
        guidance_max: draw each pair at a scale of its own, uniform from `guidance` to this one, and record it: for a student
            whose network is told the scale (`scaled`).
        seed: of the noises; keep it apart from the seeds of evaluation.
        shard: pairs in one shard, the unit of work.
        batch: samples drawn at once.
        store_noise: keep each noise beside its sample too.
        classes: ask only for the first so many of the teacher's classes; by default for all, in turn.
        prompts: what a teacher that is told texts is asked for: a text file, one prompt a line, all in turn. The set records it.
        lease: 0 deals shards out by rank. Else processes of any speed, that may join and leave, claim them in the folder, and
            one's claim is void when it has not been renewed for so many seconds (60, say).
    """
    if batch < 1:
        raise ValueError(f"batch: {batch}, it must be at least 1")
    if guidance_max is not None and not guidance < guidance_max:
        raise ValueError(f"guidance_max: {guidance_max}, it must be larger than guidance, {guidance}")
    state = job.start()
    denoiser, _, condition = teachers.load(teacher)
    condition = prompted(condition, prompts, teacher)
    walk, scale = getattr(samplers, sampler)(steps), guidance if guidance_max is None else [guidance, guidance_max]
    plan = {
        **origin(denoiser, condition),
        "sampler": sampler,
        "steps": steps,
        "guidance": scale,
        "batch": batch,
        "dtype": "float16",
    }
    if classes is not None:
        if not 1 <= classes <= getattr(condition, "classes", 0):
            raise ValueError(f"classes: {classes}; {teacher} knows {getattr(condition, 'classes', 0)}")
        plan["asked"] = classes
    writer = PairWriter(out, plan, pairs, seed, denoiser.shape, shard, store_noise)

    def make(number: int) -> Made:
        indices = writer.shards.indices(number)
        raw, eps = asked(condition, indices, classes), writer.noise(number)
        w = None if guidance_max is None else scales(seed, indices, guidance, guidance_max)
        return draw(walk, denoiser, eps, condition, raw, guidance if w is None else w, batch, state.device), raw, eps, w

    fill(writer, make, state, lease, "collect", walk.nfe(at(denoiser, guidance_max or guidance)))
