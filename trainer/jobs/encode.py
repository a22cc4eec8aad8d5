"""Encoding: packed images become shards of latents with unit variance."""

import logging
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data.cache import exclusive
from data.files import atomic_folder, canonical, digest
from data.images import Images
from data.latents import latent_sample
from data.shards import ShardWriter, identify_shards
from models.checkpoint import CODEC, newest_checkpoint, read_checkpoint
from models.codec import CHECKSUMS, CODEC_ENTRIES, KL, load_codec
from trainer.jobs import job

log = logging.getLogger(__name__)
SCALE_IMAGES = 16384  # evenly spaced images, at most, from which the latents' scale is measured
CHECKED_IMAGES = 256  # of these the standard deviation is measured where a scale is kept
UNIT_DEVIATION = (0.5, 2.0)  # a kept scale that gives latents another one is doubtful
# What mended images or codecs change in a plan.
DERIVED = ("images", "classes", "count", *CODEC_ENTRIES)
CODEC_BATCH = 256  # images encoded at once


@torch.inference_mode()
def latent_scale(codec: KL, images: Images, limit: int = SCALE_IMAGES) -> float:
    """Return 1 / the standard deviation of unscaled latents, measured on evenly spaced images.

    Args:
        codec: the codec.
        images: the images.
        limit: number of images at most.

    Raises:
        ValueError: a latent is not finite, or all are alike.
    """
    count = min(limit, len(images))
    positions = np.linspace(0, len(images) - 1, count)
    indices = positions.round().astype(int)
    total = 0.0
    total_square = 0.0
    numbers = 0.0
    for part in np.array_split(indices, math.ceil(len(indices) / CODEC_BATCH)):
        pixels = images.read(part).x.to(codec.vae.device)
        posterior = codec.vae.encode(pixels).latent_dist
        raw = posterior.mode()
        check_finite(raw, codec, images, part)
        latents = codec.center(raw).double()
        total += latents.sum().item()
        total_square += latents.square().sum().item()
        numbers += latents.numel()
    variance = total_square / numbers - (total / numbers) ** 2
    if not variance > 0:
        raise ValueError(
            f"codec: {codec.path} gives the same latent numbers for all of {images}; is it trained?"
        )
    return 1 / math.sqrt(variance)


def check_finite(latents: Tensor, codec: KL, images: Images, indices: np.ndarray | range) -> None:
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


def has_no_scale(codec: Path) -> bool:
    """Whether a codec is that of an autoencoder's run: its config has diffusers' default scale."""
    run = codec if (codec / CODEC).is_dir() else codec.resolve().parent
    if not any((run / "checkpoints").glob("step=*")):
        return False
    return "autoencoder" in read_checkpoint(newest_checkpoint(run), tensors=False)["rectify"]


def check_codec_folder(out: Path) -> None:
    """Check that OUT/codec is new, or was written by this command: it is about to be replaced."""
    folder = out / CODEC
    if not folder.exists() or (out / "plan.json").exists():
        return
    is_run = (out / "checkpoints").exists() or (out / "config.yaml").exists()
    if is_run or not (folder / CHECKSUMS).exists():
        raise ValueError(
            f"{folder}: would be replaced, but belongs to no latents; choose another --out"
        )


def report_kept_scale(codec: KL, images: Images) -> None:
    """Log the scale of a codec that is kept, and warn if the latents are far from unit variance."""
    deviation = codec.scale / latent_scale(codec, images, CHECKED_IMAGES)
    low, high = UNIT_DEVIATION
    doubt = ""
    level = logging.INFO
    if not low <= deviation <= high:
        level = logging.WARNING
        doubt = "; a teacher may want that, else use --scale measured"
    text = "scale %.6g, kept from %s: the latents have a standard deviation of %.3g%s"
    log.log(level, text, codec.scale, codec.path, deviation, doubt)


@torch.inference_mode()
def encode(
    images: Path,
    codec: Path,
    out: Path,
    shard: int = 1024,
    scale: Literal["auto", "keep", "measured"] = "auto",
    lease: float = 0.0,
) -> None:
    """Encode packed images into shards of float16 latents.

    The codec, with the scale of the latents, is written to OUT/codec. Encode other images, such as
    the held-out split, with `--codec OUT/codec`: they get the same scale.

    Args:
        images: a set made by `rectify pack`, usually its train split.
        codec: an autoencoder's run folder, or the folder of any diffusers AutoencoderKL.
        out: folder for the set.
        shard: latents in one shard.
        scale: keep the codec's scaling_factor, or use the one that gives the latents unit
            variance, measured on the images. By default it is measured for an autoencoder's run,
            which has none, and kept for every other codec.
        lease: 0 divides the shards among the processes by rank. Otherwise processes claim shards,
            and a claim expires if it is not renewed within this many seconds.
    """
    # The images and the codec, which must fit.
    state = job.start()
    source = Images(str(images))
    kl = load_codec(codec)
    assert isinstance(kl, KL)
    try:
        kl.check_images(source.sample().x)
    except ValueError as error:
        raise ValueError(f"images: {source}: {error}") from None
    check_codec_folder(out)

    # What the set is. A measured scale follows from images and codec, a kept one does not.
    measured = scale == "measured" or (scale == "auto" and has_no_scale(codec))
    plan = {
        "images": digest(canonical(identify_shards(source.manifest))),
        "codec": kl.weights(),
        "classes": source.manifest["classes"],
        **kl.record_shift(),
    }
    if not measured:
        plan["scale"] = kl.scale
    writer = ShardWriter(out, "latents", plan, len(source), shard, DERIVED)
    has_codec = (out / CODEC / "config.json").exists()
    if has_codec and (out / "manifest.json").exists() and not writer.missing():
        log.info("%s is finished", out)
        return

    # Measure the scale, and write the codec with it.
    kl.to(state.device)
    if measured:
        kl.vae.register_to_config(scaling_factor=latent_scale(kl, source))
        log.info("scale %.6g, measured: the latents have unit variance", kl.scale)
    else:
        report_kept_scale(kl, source)
    if state.is_main_process:
        # Leased processes do so, too; some file systems cannot swap folders.
        with exclusive(out / CODEC), atomic_folder(out / CODEC) as folder:
            kl.save(folder)

    # Encode the images, shard by shard.
    for number in job.iterate_shards(writer, state, lease, "encode", "images"):
        indices = writer.indices(number)
        batch = source.read(np.array(indices))
        parts = [kl.encode(part.to(state.device)) for part in batch.x.split(CODEC_BATCH)]
        latents = torch.cat(parts)
        check_finite(latents, kl, source, indices)
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
