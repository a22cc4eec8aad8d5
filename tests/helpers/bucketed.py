"""Sets of images or latents of several sizes, with captions, as `rectify pack` writes them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.captions import Caption, captions_to_json
from data.files import canonical, digest
from data.latents import latent_sample
from data.noise import generator
from data.shards import ShardWriter
from data.text import TextFeatures

Size = tuple[int, int, int]  # width, height, images
SIZES: tuple[Size, ...] = ((8, 8, 20), (12, 8, 13), (8, 12, 27))


def facts_of(captions: Sequence[Caption], width: int, height: int) -> bytes:
    """Return the .json of a sample."""
    facts = {
        "captions": captions_to_json(captions),
        "original_size": [height, width],
        "crops_coords_top_left": [0, 0],
        "target_size": [height, width],
    }
    return json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()


def captions_of(i: int) -> list[Caption]:
    """Return the captions of image i: two, of which the first is three times as frequent."""
    return [Caption(f"image {i}", 3.0), Caption(f"another text of image {i}", 1.0)]


def write_set(
    folder: Path,
    kind: str = "images",
    sizes: Sequence[Size] = SIZES,
    captions: bool = True,
    buckets: bool = True,
    shard: int = 8,
) -> str:
    """Write a set of random grey images or latents of several sizes; return its folder.

    Args:
        folder: where it is written.
        kind: images, or latents of one channel.
        sizes: of the buckets.
        captions: whether samples have captions.
        buckets: whether the set has buckets; without any it has one size.
        shard: samples in one shard.
    """
    totals = [count for _, _, count in sizes]
    provenance: dict[str, Any] = {"classes": None}
    if kind == "images":
        provenance |= {"listing": digest(b"listing"), "grey": True}
    if captions:
        texts = [[list(caption) for caption in captions_of(i)] for i in range(sum(totals))]
        provenance["captions"] = digest(canonical(texts))
    entries = {}
    if buckets:
        keys = ("width", "height", "count")
        entries["buckets"] = [dict(zip(keys, size)) for size in sizes]
    groups = totals if buckets else ()
    writer = ShardWriter(folder, kind, provenance, sum(totals), shard, groups=groups)

    first_of_bucket = np.cumsum([0, *totals])
    for number in writer.numbers():
        samples = []
        for i in writer.indices(number):
            width, height, _ = sizes[int(np.searchsorted(first_of_bucket, i, side="right")) - 1]
            sample = make_sample(i, kind, width, height)
            if captions:
                sample["json"] = facts_of(captions_of(i), width, height)
            samples.append(sample)
        writer.write(number, samples)
    assert writer.finish(**entries)
    return str(folder)


def make_sample(i: int, kind: str, width: int, height: int) -> dict[str, Any]:
    """Return image or latent i, whose first number identifies it."""
    key = f"{i:09d}"
    if kind == "latents":
        latent = torch.from_numpy(generator(0, i).standard_normal((1, height, width)))
        latent[0, 0, 0] = i / 1024
        return latent_sample(key, latent, None)
    pixels = generator(0, i).integers(256, size=(height, width), dtype=np.uint8)
    pixels[0, 0] = i
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return {"__key__": key, "png": file.getvalue()}


class TextLengths:
    """A source of text features: the number of characters of each caption."""

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def features(self, texts: Sequence[str]) -> TextFeatures:
        """Return the embeddings of texts."""
        lengths = [self.scale * len(text) for text in texts]
        return TextFeatures(pooled=torch.tensor(lengths)[:, None])

    def identity(self) -> dict[str, object]:
        """Return what identifies the encoder."""
        return {"scale": self.scale}
