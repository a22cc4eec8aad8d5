"""Sampling a grid of images from a run."""

from pathlib import Path

import torch

from data.files import atomic_path
from trainer.jobs import job
from trainer.jobs.evaluate import RunSampler, tile_images


@torch.inference_mode()
def sample(
    run: Path,
    out: Path,
    steps: int = 4,
    count: int = 40,
    columns: int = 10,
    guidance: float = 1.0,
    seed: int = 3,
    sampler: job.AnySampler = "DDIM",
    edges: list[float] | None = None,
    prompts: Path | None = None,
) -> None:
    """Sample images from a run's EMA weights, every class or prompt in turn, into one PNG.

    Args:
        run: run folder or checkpoint.
        out: the PNG to write.
        steps: steps of the sampler.
        count: number of images, a multiple of `columns`.
        columns: columns of the grid.
        guidance: guidance scale w of u + w (c - u); a guidance-conditioned student reads it.
        seed: seed of the noises.
        sampler: the sampler.
        edges: window edges of a phased student, falling from 1 to 0, if the windows are not equal;
            the sampler steps on all of them.
        prompts: for a text-to-image network: a text file with one prompt on each line; by default
            the prompts that it was trained on.
    """
    if columns < 1 or count < 1 or count % columns:
        raise ValueError(f"count is {count}; it must be a positive multiple of columns ({columns})")
    run_sampler = RunSampler(run, guidance, seed, job.start(), sampler, edges, prompts)
    images, _ = run_sampler.draw_images(range(count), steps)
    with atomic_path(out) as temporary:
        tile_images(images, columns).save(temporary, "png")
