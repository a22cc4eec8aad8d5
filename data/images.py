"""Packed images: preparing them and reading them back."""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.batch import Batch, IndexedDataset
from data.files import errors_named
from data.schema import SHA256, check_schema
from data.shards import ShardReader

IMAGE_FIELDS = ("png", "jpg", "jpeg", "webp")  # fields of a shard's sample that hold an image

# Formats that Pillow may detect, whatever the name of the field. It runs programs for some others,
# such as EPS.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")


class LazyImage(NamedTuple):
    """An image that is opened when it is needed."""

    name: str
    open: Callable[[], Image.Image]
    label: int | None  # its class


def fit_image(image: Image.Image, size: int, grey: bool) -> Image.Image:
    """Return an image of 8 bits, grey or RGB, upright, scaled and centre-cropped to a square.

    Args:
        image: any image.
        size: height and width of the result, in pixels. The shorter side is scaled to it.
        grey: convert to grey, instead of RGB.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        values = np.asarray(image, dtype=np.int64) >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    image = image.convert("L" if grey else "RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


class Images(IndexedDataset):
    """Packed images, as float32 in [-1, 1].

    Args:
        path: the set, made by `rectify pack`.
        cache: number of decoded images kept in memory, the most recently decoded ones.
    """

    def __init__(self, path: str, cache: int = 4096):
        self.path = path
        self.cache = cache
        self.reader = ShardReader(path, "images")
        self.manifest = self.reader.manifest
        schema = {"classes": (None, [str]), "listing": SHA256}
        check_schema(self.manifest, schema, f"{path}/manifest.json")
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.reader)

    def pixels(self, i: int) -> np.ndarray:
        """Return image i as uint8, (C, H, W)."""
        if i not in self._decoded:
            sample = self.reader[i]
            with errors_named(f"{self.path}: image {i} ({sample['__key__']})"):
                data = next(sample[field] for field in IMAGE_FIELDS if field in sample)
                image = Image.open(io.BytesIO(data.tobytes()), formats=IMAGE_FORMATS)
                pixels = np.asarray(image)
                height, width = pixels.shape[:2]
                self._decoded[i] = pixels.reshape(height, width, -1).transpose(2, 0, 1)
            if len(self._decoded) > self.cache:
                self._decoded.popitem(last=False)
        return self._decoded[i]

    def read(self, indices: np.ndarray) -> Batch:
        with errors_named(self.path):  # images that we did not pack may differ in size
            pixels = [self.pixels(int(i)) for i in indices]
            x = torch.from_numpy(np.stack(pixels))
        condition = read_labels(self.reader, indices)
        return Batch(x.float() / 127.5 - 1, latent=False, condition=condition)


def read_labels(reader: ShardReader, indices: np.ndarray) -> Tensor | None:
    """Return the classes of samples, (B,) int64; None if the set has no classes."""
    if "cls" not in reader.manifest["shards"][0]["fields"]:
        return None
    return torch.from_numpy(reader.numbers("cls", indices))


def read_all(
    source: IndexedDataset, count: int, batch: int = 512
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (x, condition) of the samples 0 .. count - 1 in order, in batches."""
    for start in range(0, count, batch):
        end = min(count, start + batch)
        part = source.read(np.arange(start, end))
        yield part.x, part.condition
