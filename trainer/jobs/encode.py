"""Encoding: packed images become shards of latents with unit variance."""

import logging
import math
from pathlib import Path

import numpy as np
import torch

from data.files import atomic_folder, canonical, digest
from data.images import Images
from data.latents import latent_sample
from data.shards import ShardWriter
from models.codec import KL, load_codec
from trainer.jobs import job

log = logging.getLogger(__name__)
SCALE_IMAGES = 16384  # evenly spaced images, at most, from which the latents' scale is measured
CODEC_BATCH = 256  # images encoded at once


@torch.inference_mode()
def latent_scale(codec: KL, images: Images) -> float:
    """Return 1 / the standard deviation of unscaled latents, measured on evenly spaced images."""
    count = min(SCALE_IMAGES, len(images))
    positions = np.linspace(0, len(images) - 1, count)
    indices = positions.round().astype(int)
    total = 0.0
    total_square = 0.0
    numbers = 0.0
    for part in np.array_split(indices, math.ceil(len(indices) / CODEC_BATCH)):
        pixels = images.read(part).x.to(codec.vae.device)
        posterior = codec.vae.encode(pixels).latent_dist
        latents = posterior.mode().double()
        total += latents.sum().item()
        total_square += latents.square().sum().item()
        numbers += latents.numel()
    return 1 / math.sqrt(total_square / numbers - (total / numbers) ** 2)


@torch.inference_mode()
def encode(images: Path, codec: Path, out: Path, shard: int = 1024, lease: float = 0.0) -> None:
    """Encode packed images into shards of float16 latents.

    The codec, with the scale that gives the latents unit variance, is written to OUT/codec.

    Args:
        images: a set made by `rectify pack`, usually its train split.
        codec: an autoencoder's run folder, or the folder of any diffusers AutoencoderKL.
        out: folder for the set.
        shard: latents in one shard.
        lease: 0 divides the shards among the processes by rank. Otherwise processes claim shards,
            and a claim expires if it is not renewed within this many seconds.
    """
    # The images, the codec, and what the set is.
    state = job.start()
    source = Images(str(images))
    kl = load_codec(codec)
    assert isinstance(kl, KL)
    checksums = [record["sha256"] for record in source.manifest["shards"]]
    plan = {
        "images": digest(canonical(checksums)),
        "codec": kl.weights(),
        "classes": source.manifest["classes"],
    }
    writer = ShardWriter(out, "latents", plan, len(source), shard)
    if (out / "manifest.json").exists() and not writer.missing():
        log.info("%s is finished", out)
        return

    # Measure the scale, and write the codec with it.
    kl.to(state.device)
    kl.vae.register_to_config(scaling_factor=latent_scale(kl, source))
    if state.is_main_process:
        with atomic_folder(out / "codec") as folder:
            kl.save(folder)

    # Encode the images, shard by shard.
    for number in job.iterate_shards(writer, state, lease, "encode", "images"):
        indices = writer.indices(number)
        batch = source.read(np.array(indices))
        parts = [kl.encode(part.to(state.device)) for part in batch.x.split(CODEC_BATCH)]
        latents = torch.cat(parts)
        labels = [None] * len(latents)
        if batch.condition is not None:
            labels = batch.condition.tolist()
        samples = []
        for i, latent, label in zip(indices, latents, labels):
            samples.append(latent_sample(f"{i:09d}", latent, label))
        writer.write(number, samples)

    # The manifest records the scale and the shape of a latent.
    first = source.read(np.array([0]))
    shape = kl.encode(first.x.to(state.device)).shape[1:]
    writer.finish(scale=kl.scale, shape=list(shape))
