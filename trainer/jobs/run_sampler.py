"""Images of a run, by index."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.noise import noises, step_noise
from models.codec import to_uint8
from models.sampler import Sampler
from trainer.conditions import encode_condition, requested_conditions
from trainer.jobs.options import AnySampler, SamplingOptions
from trainer.jobs.sampling_model import SamplingModel

GAP = 2  # pixels between the images of a grid


class SampleInputs(NamedTuple):
    """What samples are made from."""

    noises: Tensor  # (n, C, H, W)
    raw: Tensor | None  # raw conditions, (n,)
    cond: Tensor | None  # conditions as the network reads them, (n, ...)


class SampledImages(NamedTuple):
    """Images with their conditions."""

    images: Tensor  # in [-1, 1], (n, C, H, W), on the CPU
    raw: Tensor | None  # raw conditions, (n,)


class RunSampler:
    """Generates images from a run, each from the noise of its index.

    An image depends on its index, not on the others that are generated with it.

    Args:
        run: run folder or checkpoint.
        options: guidance, times and interpolant.
        guidance: guidance scale of this run, instead of that of the options.
        seed: seed of the noises.
        device: where the run is sampled.
        sampler: name of the sampler.
    """

    classes: int | None = None  # use only the first `classes` classes; None: all

    def __init__(
        self,
        run: Path,
        options: SamplingOptions,
        guidance: float,
        seed: int,
        device: torch.device,
        sampler: AnySampler = "DDIM",
    ):
        self.model = SamplingModel(run, options, guidance, device)
        self.denoiser = self.model.guide(guidance)
        self.condition = self.model.condition
        self.codec = self.model.codec.to(device)
        self.fingerprint = self.model.fingerprint
        self.shape = self.model.denoiser.shape
        self.run = run
        self.seed = seed
        self.device = device
        self.sampler = sampler

    def with_sampler(self, sampler: AnySampler) -> "RunSampler":
        """Switch to another sampler, and return self."""
        self.sampler = sampler
        return self

    def build_sampler(self, steps: int) -> Sampler:
        """Return the sampler with a number of steps.

        Raises:
            ValueError: the steps do not fit the grid of times.
        """
        return self.model.build_sampler(self.sampler, steps)

    def draw_inputs(self, indices: range) -> SampleInputs:
        """Return what the samples of these indices are made from."""
        eps = noises(self.seed, indices, self.shape).to(self.device)
        raw = requested_conditions(self.condition, indices, self.classes)
        return SampleInputs(eps, raw, encode_condition(self.condition, raw, self.device))

    def draw_images(self, indices: range, steps: int) -> SampledImages:
        """Return the images of these indices.

        Raises:
            ValueError: the steps do not fit the grid of times, or the sampler fails, for example
                because its states are not finite.
        """
        eps, raw, cond = self.draw_inputs(indices)

        def noise_of_step(step: int) -> Tensor:
            return torch.stack([step_noise(self.seed, i, step, self.shape) for i in indices])

        try:
            sampler = self.build_sampler(steps)
            x = sampler(self.denoiser, eps, cond, noise_of_step)
        except ValueError as error:
            raise ValueError(f"{self.run}: {error}") from None
        images = self.codec.decode(x).clamp(-1, 1)
        return SampledImages(images.cpu(), raw)


def tile_images(images: Tensor, columns: int) -> Image.Image:
    """Return images in [-1, 1], (B, C, H, W), as one grid with white gaps between them."""
    tiles = F.pad(to_uint8(images), (0, GAP, 0, GAP), value=255)
    lines = []
    for line in tiles.split(columns):
        lines.append(torch.cat(list(line), dim=-1))
    pixels = torch.cat(lines, dim=-2)[:, :-GAP, :-GAP].permute(1, 2, 0)
    return Image.fromarray(pixels.squeeze(-1).numpy())
