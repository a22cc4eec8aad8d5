"""Encoding: packed images become shards of latents, or captions shards of embeddings."""

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from data.cache import exclusive
from data.files import atomic_folder, canonical, digest
from data.latents import latent_sample
from data.shards import ShardWriter, identify_shards
from models.checkpoint import CODEC, newest_checkpoint, read_checkpoint
from models.codec import CHECKSUMS, CODEC_ENTRIES, LatentCodec, load_codec
from models.text_encoder import Output
from trainer.jobs import job
from trainer.jobs.encode_text import encode_text
from trainer.latent_statistics import (
    ImageSet,
    batch_size,
    channel_statistics,
    check_finite,
    latent_scale,
    open_images,
)

log = logging.getLogger(__name__)
# Evenly spaced images, of which the standard deviation is measured where a scale is kept.
CHECKED_IMAGES = 64
UNIT_DEVIATION = (0.5, 2.0)  # a kept scale that gives latents another one is doubtful
# Entries of sets by `rectify pack`, whose .json holds captions and sizes; latents keep it.
PACKED = frozenset({"size", "captions", "buckets"})
# What mended images or codecs change in a plan.
DERIVED = ("images", "classes", "count", "captions", "buckets", "statistics", *CODEC_ENTRIES)


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


def report_kept_scale(codec: LatentCodec, source: ImageSet) -> None:
    """Log the scale of a codec that is kept, and warn if the latents are far from unit variance."""
    deviation = codec.scale / latent_scale(codec, source, CHECKED_IMAGES)
    low, high = UNIT_DEVIATION
    doubt = ""
    level = logging.INFO
    if not low <= deviation <= high:
        level = logging.WARNING
        doubt = "; a teacher may want that, else use --scale measured"
    text = "scale %.6g, kept from %s: the latents have a standard deviation of %.3g%s"
    log.log(level, text, codec.scale, codec.path, deviation, doubt)


def check_image_sizes(codec: LatentCodec, source: ImageSet) -> None:
    """Check that a codec encodes images of every bucket.

    Raises:
        ValueError: it does not.
    """
    name = f"images: {source.images}"
    try:
        codec.check_images(source.images.sample().x)
        for bucket in source.buckets:
            name = f"images: {source.images}: bucket {bucket.name}"
            codec.check_size(bucket.height, bucket.width)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


Scale = Literal["auto", "keep", "measured", "channels"]


def choose_scale(scale: Scale, codec: Path) -> Scale:
    """Return what --scale means for a codec: keep, measured or channels."""
    if scale == "auto":
        return "measured" if has_no_scale(codec) else "keep"
    return scale


def make_plan(codec: LatentCodec, source: ImageSet, scale: Scale) -> dict[str, Any]:
    """Return what a set of latents is; measured statistics follow from images and codec.

    Args:
        codec: as it was loaded.
        source: the images.
        scale: keep, measured or channels.
    """
    manifest = source.images.manifest
    plan = {
        "images": digest(canonical(identify_shards(manifest))),
        "codec": codec.weights(),
        "classes": manifest["classes"],
    }
    if scale == "channels":
        plan["statistics"] = scale
    else:
        plan |= codec.record_shift()
    if scale == "keep":
        plan["scale"] = codec.scale
    if "captions" in manifest:
        plan["captions"] = manifest["captions"]
    if "buckets" in manifest:
        plan["buckets"] = []
        for bucket in source.buckets:
            size = {"width": bucket.width, "height": bucket.height, "count": bucket.total}
            plan["buckets"].append(size)
    return plan


def apply_scale(codec: LatentCodec, source: ImageSet, scale: Scale) -> None:
    """Measure the statistics of a codec's latents, and set them in the codec.

    Args:
        codec: it is changed, unless the scale is kept.
        source: the images.
        scale: keep, measured or channels.
    """
    if scale == "channels":
        codec.set_channels(*channel_statistics(codec, source))
        log.info("measured: each of the %d channels has mean 0 and variance 1", codec.channels)
    elif scale == "measured":
        codec.set_scale(latent_scale(codec, source))
        log.info("scale %.6g, measured: the latents have unit variance", codec.scale)
    else:
        report_kept_scale(codec, source)


def encode_shard(
    codec: LatentCodec, source: ImageSet, indices: range, device: torch.device
) -> list[dict[str, Any]]:
    """Return the samples of a shard of latents.

    Only one batch of its images is in memory at a time.

    Args:
        codec: the codec.
        source: the images.
        indices: of the images, all of one bucket.
        device: of the codec.
    """
    images = source.images
    has_facts = bool(PACKED.intersection(images.manifest)) and images.reader.has_field("json")
    size = batch_size(source.find_bucket(indices[0]))
    samples = []
    for start in range(indices.start, indices.stop, size):
        part = range(start, min(start + size, indices.stop))
        batch = images.read(np.array(part))
        latents = codec.encode(batch.x.to(device))
        check_finite(latents, codec, images, part)
        labels = [None] * len(latents)
        if batch.condition is not None:
            labels = batch.condition.tolist()
        for i, latent, label in zip(part, latents.cpu(), labels):
            sample = latent_sample(f"{i:09d}", latent, label)
            if has_facts:
                sample["json"] = images.reader[i]["json"].tobytes()
            samples.append(sample)
    return samples


@torch.inference_mode()
def encode(
    images: Path,
    out: Path,
    codec: Path | None = None,
    text: Path | None = None,
    shard: int = 1024,
    scale: Scale = "auto",
    output: Output | None = None,
    pooling: Literal["auto", "mean"] = "auto",
    max_tokens: int | None = None,
    lease: float = 0.0,
) -> None:
    """Encode packed images into shards of float16 latents, or their captions into embeddings.

    The codec, with the scale of the latents, is written to OUT/codec. Encode other images, such as
    the held-out split, with `--codec OUT/codec`: they get the same scale.

    Args:
        images: a set made by `rectify pack`, usually its train split. For captions also a set of
            latents, or a folder of several sets.
        out: folder for the set.
        codec: an autoencoder's run folder, or the folder of a diffusers AutoencoderKL,
            AutoencoderDC or AutoencoderTiny.
        text: instead of a codec, the folder of a text encoder of transformers, or `package:NAME`
            of an installed package that has one.
        shard: latents or captions in one shard.
        scale: of latents: keep the codec's scaling_factor; use the one that gives the latents unit
            variance (measured); or give each channel mean 0 and variance 1 (channels). The last
            two are measured on the images. By default the scale is measured for an autoencoder's
            run, which has none, and kept for every other codec.
        output: of captions: embeddings of the tokens, of the whole text (pooled), or both. By
            default all that the encoder has.
        pooling: of captions: as the encoder does it (auto), or the mean of the tokens.
        max_tokens: of a caption; the rest is cut. By default 128, or as many as the encoder reads.
        lease: 0 divides the shards among the processes by rank. Otherwise processes claim shards,
            and a claim expires if it is not renewed within this many seconds.
    """
    # The embeddings of captions.
    if text is not None and codec is None:
        if scale != "auto":
            raise ValueError(f"scale is {scale}, but embeddings have none; leave out --scale")
        encode_text(images, text, out, shard, output, pooling, max_tokens, lease)
        return

    # The latents of images.
    if codec is None or text is not None:
        raise ValueError("codec, text: give exactly one of --codec and --text")
    text_options = {"output": output, "pooling": pooling, "max_tokens": max_tokens}
    for name, value in text_options.items():
        if value not in (None, "auto"):
            raise ValueError(f"{name} is {value}, but only --text has it; leave out --{name}")
    encode_images(images, out, codec, shard, scale, lease)


def encode_images(
    images: Path, out: Path, codec: Path, shard: int, scale: Scale, lease: float
) -> None:
    """Encode packed images into shards of latents; the arguments are those of `encode`."""
    # The images and the codec, which must fit.
    state = job.start()
    source = open_images(images)
    loaded = load_codec(codec)
    assert isinstance(loaded, LatentCodec)
    check_image_sizes(loaded, source)
    check_codec_folder(out)

    # What the set is: shards hold latents of one bucket.
    scale = choose_scale(scale, codec)
    plan = make_plan(loaded, source, scale)
    groups = [bucket.total for bucket in source.buckets] if "buckets" in plan else []
    writer = ShardWriter(out, "latents", plan, len(source.images), shard, DERIVED, groups)
    has_codec = (out / CODEC / "config.json").exists()
    if has_codec and (out / "manifest.json").exists() and not writer.missing():
        log.info("%s is finished", out)
        return

    # Measure the scale, and write the codec with it.
    loaded.to(state.device)
    apply_scale(loaded, source, scale)
    if state.is_main_process:
        # Leased processes do so, too; some file systems cannot swap folders.
        with exclusive(out / CODEC), atomic_folder(out / CODEC) as folder:
            loaded.save(folder)

    # Encode the images, shard by shard.
    for number in job.iterate_shards(writer, state, lease, "encode", "images"):
        indices = writer.indices(number)
        writer.write(number, encode_shard(loaded, source, indices, state.device))

    # The manifest records the scale and, if all latents have one, their shape.
    facts: dict[str, Any] = {"scale": loaded.scale, **loaded.record_shift()}
    if "buckets" not in plan:
        first = source.images.sample().x.to(state.device)
        facts["shape"] = list(loaded.encode(first).shape[1:])
    writer.finish(**facts)
