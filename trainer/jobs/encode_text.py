"""Encoding captions: each distinct caption of packed images is embedded once, in float16."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from data.files import canonical, digest
from data.schema import shorten
from data.shards import ShardWriter
from data.text import KIND, find_captioned_sets, find_distinct_captions, text_sample
from models.text_encoder import Output, TextEncoder
from trainer.jobs import job

log = logging.getLogger(__name__)
DERIVED = ("captions", "count")  # what mended captions change in a plan


def encode_text(
    images: Path | Sequence[Path],
    text: Path,
    out: Path,
    shard: int = 1024,
    output: Output | None = None,
    pooling: Literal["auto", "mean"] = "auto",
    max_tokens: int | None = None,
    lease: float = 0.0,
) -> None:
    """Embed the captions of packed images, each distinct one once.

    Args:
        images: a set of images or latents with captions, or a folder of several, or several.
        text: folder of a text encoder, or `package:NAME` (see `models.text_encoder.TextEncoder`).
        out: folder for the set.
        shard: captions in one shard.
        output: embeddings of the tokens, of the whole text, or both. By default all that the
            encoder has.
        pooling: auto: as the encoder does it; mean: the mean of the tokens.
        max_tokens: of a caption; the rest is cut. By default 128, or as many as the encoder reads.
        lease: 0 divides the shards among the processes by rank. Otherwise processes claim shards,
            and a claim expires if it is not renewed within this many seconds.

    Raises:
        ValueError: there are no captions, the folder is no text encoder, an embedding is not finite
            in float16, or `out` holds another set.
    """
    # The captions and the encoder.
    state = job.start()
    folders = [images] if isinstance(images, Path) else images
    sets = [path for folder in folders for path in find_captioned_sets(folder)]
    encoder = TextEncoder(str(text), output, pooling, max_tokens)
    captions = find_distinct_captions(sets)

    # What the set is.
    plan = {"encoder": encoder.identity(), "captions": digest(canonical(captions))}
    writer = ShardWriter(out, KIND, plan, len(captions), shard, DERIVED)
    if (out / "manifest.json").exists() and not writer.missing():
        log.info("%s is finished", out)
        return
    encoder.to(state.device)
    example = encoder.embed([""])[0]
    if state.is_main_process:
        report_captions(encoder, captions)

    # Embed the captions, shard by shard.
    for number in job.iterate_shards(writer, state, lease, "encode", "captions"):
        indices = writer.indices(number)
        part = captions[indices.start : indices.stop]
        samples = []
        longest = 0
        for i, caption, embedding in zip(indices, part, encoder.embed(part)):
            tokens = _as_array(embedding.tokens)
            pooled = _as_array(embedding.pooled)
            samples.append(text_sample(f"{i:09d}", caption, tokens, pooled))
            longest = max(longest, 0 if tokens is None else len(tokens))
        writer.write(number, samples, longest=longest)

    # The manifest records the sizes of the embeddings.
    writer.finish(
        tokens_channels=_count_channels(example.tokens),
        pooled_channels=_count_channels(example.pooled),
    )


def report_captions(encoder: TextEncoder, captions: Sequence[str]) -> None:
    """Log how many captions are embedded, and warn of those that are cut."""
    log.info("%d distinct captions, with the empty one", len(captions))
    cut = encoder.find_long(captions)
    if cut:
        log.warning(
            "%d of %d captions have more than %d tokens, and are cut; the first is %s",
            len(cut),
            len(captions),
            encoder.length,
            shorten(captions[cut[0]]),
        )


def _as_array(values: Tensor | None) -> np.ndarray | None:
    return None if values is None else values.cpu().numpy()


def _count_channels(values: Tensor | None) -> int | None:
    return None if values is None else values.shape[-1]
