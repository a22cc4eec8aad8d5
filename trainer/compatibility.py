"""Checks that denoiser, condition, codec and data belong together.

Each raises a ValueError of one line that names the option to change.
"""

from collections.abc import Iterator
from typing import Any

import torch

from data.batch import IndexedDataset, check_one_size
from data.files import errors_named
from data.pairs import Pairs
from data.sequential import SequentialTars
from models.codec import CODEC_ENTRIES, Codec, LatentCodec, describe_codec, find_codec_difference
from models.condition import Condition
from models.denoiser import Denoiser
from models.description import build, describe
from models.diffusers.networks import Pretrained
from models.diffusers.pipeline import codec_digest, part_digests
from models.diffusers.text import Prompts, find_text_difference
from models.nets import Net
from trainer.objectives.base import Objective
from trainer.objectives.parts.lpips import Perceptual
from trainer.objectives.teachers import FrozenTeacher

# Options that name the parts of a pipeline; the others belong to the condition.
PART_OPTIONS = {"vae": "model.codec", "scheduler": "model.initial"}


def check_condition(denoiser: Denoiser, condition: Condition | None) -> None:
    """Check that the condition gives what the network takes."""
    net = denoiser.net
    if isinstance(net, Net) and net.needs_class and condition and condition.dropout:
        raise ValueError(
            "model.condition.dropout: this network has no label for 'no class'; set it to 0"
        )

    # The number of tokens of a text, 0 without texts.
    net_tokens = net.tokens if isinstance(net, Net) else 0
    tokens = len(condition.empty) if isinstance(condition, Prompts) else 0
    if net_tokens != tokens:
        raise ValueError(
            f"model.condition: gives texts of {tokens} tokens, the network takes {net_tokens} "
            "(0: no texts); use Prompts for a network that takes texts"
        )

    # The text encoder, recognised by its encoding of the empty text.
    if isinstance(condition, Prompts) and isinstance(net, Pretrained):
        expected = net.empty_text
        empty = condition.empty.to(expected.device)
        if empty.shape != expected.shape or not torch.allclose(empty, expected, atol=1e-3):
            raise ValueError(
                f"model.condition.encoder: {condition.encoder} is not the text encoder of this "
                "network"
            )


def check_source(
    source: IndexedDataset | SequentialTars,
    denoiser: Denoiser,
    condition: Condition,
    codec: Codec,
) -> None:
    """Check that the samples of a source fit the codec, the network and the condition."""
    manifest = source.manifest

    # 1. The classes of network and condition.
    net = denoiser.net
    net_classes = net.classes if isinstance(net, Net) else None
    classes = condition.classes
    if net_classes is not None and net_classes != classes:
        raise ValueError(
            f"model.denoiser.net.classes is {net_classes}, model.condition.classes is {classes}; "
            "make them equal"
        )

    # 2. The codec of latents. Latents that another program encoded do not record theirs.
    if manifest["kind"] == "latents":
        if not isinstance(codec, LatentCodec):
            raise ValueError(
                "model.codec: the data are latents; give the codec folder beside them "
                "(LATENTS/codec)"
            )
        check_latents_codec(manifest, f"model.codec: {codec.path}", codec, source)

    # 3. The shapes of x.
    samples = [source.sample()]
    has_buckets = False
    if isinstance(source, IndexedDataset):
        samples = source.samples_of_sizes()
        has_buckets = bool(source.buckets)
    for sample in samples:
        with errors_named(f"data.source: {source}"):
            x = sample.x if sample.latent else codec.encode(sample.x)
        check_shape(tuple(x.shape[1:]), denoiser, has_buckets)

    # 4. The classes of data and condition.
    data_classes = len(manifest.get("classes") or [])
    if classes and data_classes > classes:
        raise ValueError(
            f"data.source: has {data_classes} classes, model.condition.classes is {classes}"
        )


def check_shape(shape: tuple[int, ...], denoiser: Denoiser, has_buckets: bool) -> None:
    """Check that a denoiser takes samples of a shape (C, H, W).

    Squares must have the network's size, unless they are one of several sizes. Other shapes need a
    network that takes any.

    Args:
        shape: of a sample.
        denoiser: the denoiser.
        has_buckets: whether the samples have several sizes.
    """
    if shape == denoiser.shape:
        return
    channels, height, width = shape
    net = denoiser.net
    multiple = net.size_multiple if isinstance(net, Net) else None
    is_wrong_square = height == width and not has_buckets
    if multiple is None or is_wrong_square or channels != denoiser.shape[0]:
        raise ValueError(
            f"data.source: the shape (channels, height, width) of a sample is {shape}, "
            f"model.denoiser.net is built for {denoiser.shape}"
        )
    if height % multiple or width % multiple:
        raise ValueError(
            f"data.source: the shape (channels, height, width) of a sample is {shape}, but "
            f"model.denoiser.net takes heights and widths that are multiples of {multiple}; set "
            "another patch, or pack the images again with a larger multiple in `--buckets`"
        )


def check_latents_codec(manifest: dict[str, Any], name: str, codec: Codec, source: object) -> None:
    """Check that a codec is the one that encoded a set of latents, if the set records its codec.

    Args:
        manifest: of the latents.
        name: of the codec, for the message.
        codec: the codec that decodes the latents.
        source: the latents, for the message.
    """
    if "codec" not in manifest:
        return
    recorded = {key: manifest[key] for key in CODEC_ENTRIES if key in manifest}
    difference = find_codec_difference(recorded, describe_codec(codec))
    if difference:
        raise ValueError(
            f"{name} is not the codec that encoded {source} ({difference}); give the codec folder "
            "beside the latents (LATENTS/codec), or encode all sets with `--codec LATENTS/codec`"
        )


def check_same_codec(name: str, other: dict[str, Any], codec: Codec) -> None:
    """Check that a model has the codec of another part that works in its latents.

    Args:
        name: of the other part, for the message.
        other: weights and statistics of its codec (`models.codec.describe_codec`).
        codec: the model's.
    """
    difference = find_codec_difference(other, describe_codec(codec))
    if difference:
        raise ValueError(
            f"model.codec: {describe_path(codec)} is not the codec of {name} "
            f"({difference}); give that codec, the folder codec/ or vae/ beside its weights"
        )


def describe_path(codec: Codec) -> str:
    """Return where a codec was read from, for messages."""
    return codec.path if isinstance(codec, LatentCodec) else "no codec"


def list_codecs(objective: Objective) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name, and weights and statistics, of the codecs of an objective's parts."""
    for name, part in vars(objective).items():
        if isinstance(part, FrozenTeacher):
            yield f"model.objective.{name} ({part.run})", part.codec
        elif isinstance(part, Perceptual) and isinstance(part.codec, LatentCodec):
            yield f"model.objective.{name}", part.codec.identity()
        elif isinstance(part, Objective):
            yield from list_codecs(part)


def check_pairs(
    pairs: Pairs, denoiser: Denoiser, condition: Condition, teacher_hash: str | None
) -> None:
    """Check that a student can learn from these pairs.

    Args:
        pairs: the pairs.
        denoiser: the student.
        condition: the student's condition.
        teacher_hash: fingerprint of the teacher that the student starts from; None if it
            starts from none.
    """
    if not pairs.allow_conversion:
        check_same_part(pairs, "interpolant", denoiser.interpolant)
        check_same_part(pairs, "prediction", denoiser.prediction)
    if teacher_hash:
        pairs.check_provenance("teacher", teacher_hash)
    if isinstance(condition, Prompts):
        pairs.check_provenance("prompts", condition.digest)
    if isinstance(pairs.guidance, list) and not denoiser.reads_guidance:
        low, high = pairs.guidance
        raise ValueError(
            f"data.source: {pairs.path} records guidance scales, from {low:g} to {high:g}, which "
            "the network does not read; set model.denoiser.net.guidance_embedded"
        )


def check_parts(pairs: Pairs, codec: Codec, condition: Condition, initial: str | None) -> None:
    """Check that a student has the parts of the teacher that its pairs were collected with.

    Args:
        pairs: their manifest records digests of the text encoders, tokenizers, VAE and scheduler.
        codec: the student's.
        condition: the student's.
        initial: the run or pipeline that the student starts from.
    """
    recorded = pairs.manifest.get("parts")
    if not recorded:
        return
    found = part_digests(codec, condition, initial)
    if isinstance(codec, LatentCodec):
        found["vae"] = codec_digest(codec)
    for name, collected in recorded.items():
        if name in found and found[name] != collected:
            option = PART_OPTIONS.get(name, "model.condition.encoder")
            raise ValueError(
                f"{option}: its {name} is not the one that {pairs.path} was collected with; give "
                "the teacher's, or collect the pairs again"
            )
    if "vae" in recorded and "vae" not in found:
        raise ValueError(
            f"model.codec: {pairs.path} holds latents of a VAE; give the teacher's folder vae"
        )


def check_same_texts(name: str, other: Condition, condition: Condition) -> None:
    """Check that a model reads texts as another does, if both read texts.

    Args:
        name: of the other, for the message.
        other: its condition.
        condition: the model's.
    """
    part = find_text_difference(other, condition)
    if part:
        raise ValueError(
            f"model.condition.encoder: its {part} is not that of {name}; give the same text "
            "encoders to both"
        )


def list_conditions(objective: Objective) -> Iterator[tuple[str, Condition]]:
    """Yield name and condition of the frozen teachers in an objective."""
    for name, part in vars(objective).items():
        if isinstance(part, FrozenTeacher):
            yield f"model.objective.{name} ({part.run})", part.condition
        elif isinstance(part, Objective):
            yield from list_conditions(part)


def check_same_part(pairs: Pairs, part: str, configured: Any) -> None:
    """Check that pairs were collected with the student's interpolant or prediction.

    Args:
        pairs: their manifest describes the teacher's.
        part: "interpolant" or "prediction".
        configured: the student's.
    """
    stored = pairs.manifest.get(part)
    if stored == describe(configured):
        return
    try:
        collected = build(stored)
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{pairs.path}/manifest.json: its {part} describes none of this version ({error}); "
            "collect the pairs again"
        ) from error
    # An argument that the description lacks has its default.
    if describe(collected) != describe(configured):
        raise ValueError(
            f"{pairs.path}: collected with {part} {collected!r}, the student's is {configured!r}; "
            "to convert them, set data.source.allow_conversion"
        )


def check_same_model(run: object, key: str, stored: Any, configured: Any) -> None:
    """Check that a run that is resumed has the configured model.

    Args:
        run: the run folder, for the message.
        key: the model's option, for the message.
        stored: description of the model in the run's checkpoint.
        configured: description of the configured model.
    """
    differences = find_differences(key, stored, configured)
    if differences:
        raise ValueError(
            f"{run}: holds a run of another model ({'; '.join(differences)}); choose another --out"
        )


def find_differences(key: str, stored: Any, configured: Any) -> list[str]:
    """Return how two descriptions differ, one text for each argument that does."""
    if stored == configured:
        return []
    is_same_class = (
        isinstance(stored, dict)
        and isinstance(configured, dict)
        and stored.get("class_path") == configured.get("class_path")
    )
    if not is_same_class:
        return [
            f"{key} is {_shorten(stored)} in the run, {_shorten(configured)} in the configuration"
        ]
    differences = []
    stored_arguments = stored.get("init_args") or {}
    configured_arguments = configured.get("init_args") or {}
    for name in sorted(stored_arguments.keys() | configured_arguments.keys()):
        left = stored_arguments.get(name)
        right = configured_arguments.get(name)
        differences += find_differences(f"{key}.{name}", left, right)
    return differences


def _shorten(description: Any) -> str:
    """Return a class's path, or a plain value of at most 60 characters."""
    if isinstance(description, dict):
        return str(description.get("class_path"))
    text = repr(description)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_density_data(source: IndexedDataset, shape: tuple[int, int, int]) -> None:
    """Check that samples have a density, and the shape (C, H, W) that a model was built for."""
    check_one_size(source, "a density")
    sample = source.sample()
    if not sample.latent:
        raise ValueError(
            f"data: {type(source).__name__} gives images of 8-bit pixels, which have no density; "
            "wrap it in Dequantised"
        )
    found = tuple(sample.x.shape[1:])
    if found != shape:
        raise ValueError(
            f"data: the shape (channels, size, size) of a sample is {found}, the model's is {shape}"
        )
