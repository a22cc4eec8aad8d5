"""Drawing a grid of images from a run."""

from pathlib import Path

import torch

from data.files import replacing
from trainer import job
from trainer.evaluate import Drawing, grid


@torch.inference_mode()
def sample(
    run: Path,
    out: Path,
    steps: int = 4,
    count: int = 40,
    columns: int = 10,
    guidance: float = 1.0,
    seed: int = 3,
    sampler: job.Sampling = "DDIM",
    edges: list[float] | None = None,
    prompts: Path | None = None,
) -> None:
    """Draw images, every class or prompt in turn, from a run's EMA weights into one PNG.

    Args:
        run: run folder or checkpoint.
        out: the PNG to write.
        steps: of the sampler.
        count: number of images, a multiple of columns.
        columns: of the grid.
        guidance: scale w of u + w (c - u); a student that reads scales is told it.
        seed: of the noises.
        sampler: what walks from noise to data.
        edges: of a phased student's windows, falling from 1 to 0, if they are not equal: all are stepped on.
        prompts: what a network that is told texts is asked for, one a line; by default what it was trained on.
    """
    if columns < 1 or count < 1 or count % columns:
        raise ValueError(f"count: {count} is not a positive multiple of columns ({columns})")
    images, _ = Drawing(run, guidance, seed, job.start(), sampler, edges, prompts).images(range(count), steps)
    with replacing(out) as temporary:
        grid(images, columns).save(temporary, "png")
