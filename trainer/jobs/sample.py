"""Sampling a grid of images from a run."""

from pathlib import Path

import torch

from data.files import atomic_path
from trainer.jobs.device import choose_device
from trainer.jobs.options import DEFAULT_SAMPLING, AnySampler, SamplingOptions
from trainer.jobs.run_sampler import RunSampler, tile_images
from trainer.jobs.sampling_model import check_guidance_options


@torch.inference_mode()
def sample(
    run: Path,
    out: Path,
    steps: int = 4,
    count: int = 40,
    columns: int = 10,
    seed: int = 3,
    sampler: AnySampler = "DDIM",
    sampling: SamplingOptions = DEFAULT_SAMPLING,
) -> None:
    """Sample images from a run's EMA weights, every class or prompt in turn, into one PNG.

    Args:
        run: run folder, checkpoint, or the folder of a diffusers pipeline.
        out: the PNG to write.
        steps: steps of the sampler.
        count: number of images, a multiple of `columns`.
        columns: columns of the grid.
        seed: seed of the noises.
        sampler: the sampler.
        sampling: guidance, times and interpolant.
    """
    if columns < 1 or count < 1 or count % columns:
        raise ValueError(f"count is {count}; it must be a positive multiple of columns ({columns})")
    run_sampler = RunSampler(run, sampling, sampling.guidance, seed, choose_device(), sampler)
    check_guidance_options(sampling, [run_sampler.model])
    images, _ = run_sampler.draw_images(range(count), steps)
    with atomic_path(out) as temporary:
        tile_images(images, columns).save(temporary, "png")
