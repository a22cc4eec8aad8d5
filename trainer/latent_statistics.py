"""Statistics of latents: measured on packed images, so that latents have unit variance."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.buckets import Bucket
from data.images import Images
from models.codec import LatentCodec

SCALE_IMAGES = 16384  # evenly spaced images, at most, from which statistics are measured
CONSTANT = 1e-6  # a channel whose deviation is a smaller part of its mean is constant
# Images encoded at once: so many, or so many pixels if that is less.
CODEC_BATCH = 256
CODEC_PIXELS = 2**20


class ImageSet(NamedTuple):
    """Packed images, and the buckets of their sizes: one bucket if all have one size."""

    images: Images
    buckets: Sequence[Bucket]

    def find_bucket(self, index: int) -> Bucket:
        """Return the bucket of an image."""
        for bucket in self.buckets:
            if index < bucket.start + bucket.total:
                return bucket
        raise IndexError(f"{self.images}: index {index} is outside [0, {len(self.images)})")


def open_images(path: Path) -> ImageSet:
    """Open packed images for reading each once."""
    images = Images(str(path), cache=1)
    buckets = images.buckets
    if not buckets:
        height, width = images.sample().x.shape[2:]
        counts = np.array([shard["count"] for shard in images.manifest["shards"]])
        buckets = [Bucket(width, height, 0, counts)]
    return ImageSet(images, buckets)


def batch_size(bucket: Bucket) -> int:
    """Return how many images of a bucket are encoded at once."""
    pixels = bucket.width * bucket.height
    return max(1, min(CODEC_BATCH, CODEC_PIXELS // pixels))


def sample_raw_latents(codec: LatentCodec, source: ImageSet, limit: int) -> Iterator[Tensor]:
    """Yield the raw latents of evenly spaced images, in batches of one size.

    Args:
        codec: the codec.
        source: the images.
        limit: number of images at most.

    Raises:
        ValueError: a latent is not finite.
    """
    count = min(limit, len(source.images))
    positions = np.linspace(0, len(source.images) - 1, count)
    indices = positions.round().astype(int)
    for bucket in source.buckets:
        end = bucket.start + bucket.total
        members = indices[(indices >= bucket.start) & (indices < end)]
        batches = math.ceil(len(members) / batch_size(bucket))
        for part in np.array_split(members, max(1, batches)):
            if not len(part):
                continue
            pixels = source.images.read(part).x.to(codec.vae.device)
            raw = codec.encode_raw(pixels)
            check_finite(raw, codec, source.images, part)
            yield raw


@torch.inference_mode()
def latent_scale(codec: LatentCodec, source: ImageSet, limit: int = SCALE_IMAGES) -> float:
    """Return 1 / the standard deviation of unscaled latents, measured on evenly spaced images.

    Args:
        codec: the codec.
        source: the images.
        limit: number of images at most.

    Raises:
        ValueError: a latent is not finite, or all are alike.
    """
    total = 0.0
    total_square = 0.0
    numbers = 0.0
    for raw in sample_raw_latents(codec, source, limit):
        latents = codec.center(raw).double()
        total += latents.sum().item()
        total_square += latents.square().sum().item()
        numbers += latents.numel()
    variance = total_square / numbers - (total / numbers) ** 2
    if not variance > 0:
        raise ValueError(
            f"codec: {codec.path} gives the same latent numbers for all of {source.images}; is it "
            "trained?"
        )
    return 1 / math.sqrt(variance)


class ChannelStatistics(NamedTuple):
    """Statistics of raw latents, one number for each channel."""

    mean: list[float]
    std: list[float]


@torch.inference_mode()
def channel_statistics(
    codec: LatentCodec, source: ImageSet, limit: int = SCALE_IMAGES
) -> ChannelStatistics:
    """Return mean and standard deviation of each channel, measured on evenly spaced images.

    Args:
        codec: the codec.
        source: the images.
        limit: number of images at most.

    Raises:
        ValueError: a latent is not finite, or a channel is constant.
    """
    axes = (0, 2, 3)  # all but the channels
    total = torch.zeros(())
    total_square = torch.zeros(())
    numbers = 0
    for raw in sample_raw_latents(codec, source, limit):
        latents = raw.double().cpu()
        total = total + latents.sum(axes)
        total_square = total_square + latents.square().sum(axes)
        numbers += latents.numel() // latents.shape[1]
    mean = total / numbers
    std = (total_square / numbers - mean.square()).clamp(min=0).sqrt()
    constant = std <= CONSTANT * mean.abs()
    if constant.any():
        channel = int(constant.nonzero()[0])
        raise ValueError(
            f"codec: {codec.path} gives the same number in channel {channel} of the latents of all "
            f"of {source.images}; use --scale measured, or repair the codec"
        )
    return ChannelStatistics(mean.tolist(), std.tolist())


def check_finite(
    latents: Tensor, codec: LatentCodec, images: Images, indices: np.ndarray | range
) -> None:
    """Check that latents are finite in float16, in which they are stored.

    Args:
        latents: (B, C, H, W).
        codec: what encoded them.
        images: what was encoded.
        indices: of the images.
    """
    finite = latents.half().flatten(1).isfinite().all(1)
    if not finite.all():
        index = int(indices[int(finite.logical_not().nonzero()[0])])
        raise ValueError(
            f"codec: {codec.path} gives a latent that is not finite in float16, for image {index} "
            f"({images.reader[index]['__key__']}) of {images}; repair the codec, or choose another"
        )
