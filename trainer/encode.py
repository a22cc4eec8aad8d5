"""Encoding: packed images through a codec, into shards of latents with unit variance."""

import logging
import math
from pathlib import Path

import numpy as np
import torch

from data.files import atomic_folder, canonical, digest
from data.images import Images
from data.latents import latent_sample
from data.shards import ShardWriter
from models import codec as codecs
from models.codec import KL
from trainer import job

log = logging.getLogger(__name__)
MEASURED = 16384  # images, evenly spaced, from which the latents' scale is measured


@torch.inference_mode()
def latent_scale(codec: KL, images: Images) -> float:
    """Return 1 / the root mean square of unscaled latents about their mean, over evenly spaced images."""
    chosen = np.linspace(0, len(images) - 1, min(MEASURED, len(images))).round().astype(int)
    total = square = count = 0.0
    for part in np.array_split(chosen, math.ceil(len(chosen) / 256)):
        latents = codec.vae.encode(images.read(part).x.to(codec.vae.device)).latent_dist.mode().double()
        total, square, count = total + latents.sum().item(), square + latents.square().sum().item(), count + latents.numel()
    return 1 / math.sqrt(square / count - (total / count) ** 2)


@torch.inference_mode()
def encode(images: Path, codec: Path, out: Path, shard: int = 1024, lease: float = 0.0) -> None:
    """Encode packed images into shards of float16 latents, and put the codec with its scale into OUT/codec.

    Args:
        images: a set made by `rectify pack` (its train split, say).
        codec: an autoencoder's run folder, or any diffusers AutoencoderKL folder.
        out: folder for the set.
        shard: latents in one shard.
        lease: 0 deals shards out by rank; else processes claim them, and a claim not renewed for so many seconds is void.
    """
    state = job.start()
    source, kl = Images(str(images)), codecs.load(codec)
    assert isinstance(kl, KL)
    origin = digest(canonical([shard["sha256"] for shard in source.manifest["shards"]]))
    plan = {"images": origin, "codec": kl.weights(), "classes": source.manifest["classes"]}
    writer = ShardWriter(out, "latents", plan, len(source), shard)
    if (out / "manifest.json").exists() and not writer.missing():
        log.info("%s is finished", out)
        return
    kl.to(state.device)
    kl.vae.register_to_config(scaling_factor=latent_scale(kl, source))
    if state.is_main_process:
        with atomic_folder(out / "codec") as folder:
            kl.save(folder)
    for number in job.work(writer, state, lease, "encode", "images"):
        batch = source.read(np.array(writer.indices(number)))
        latents = torch.cat([kl.encode(part.to(state.device)) for part in batch.x.split(256)])
        labels = [None] * len(latents) if batch.condition is None else batch.condition.tolist()
        rows = zip(writer.indices(number), latents, labels)
        writer.write(number, [latent_sample(f"{i:09d}", x, label) for i, x, label in rows])
    one = kl.encode(source.read(np.array([0])).x.to(state.device))
    writer.finish(scale=kl.scale, shape=list(one.shape[1:]))
