"""Packed images: preparing them and reading them back."""

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.batch import Batch, IndexedDataset, check_one_size
from data.buckets import read_buckets
from data.captioned import CaptionReader
from data.captions import Caption
from data.files import errors_named
from data.pixels import IMAGE_FIELDS, PixelOptions, convert_image, open_image, pixels_of
from data.schema import SHA256, check_schema
from data.shards import ShardReader
from data.text import TextSource

# Entries of a set's manifest that say how its images become pixels; those of ours are converted.
PIXEL_SCHEMA = {"grey": bool, "background": str, "white": (None, float)}


class LazyImage(NamedTuple):
    """An image that is opened when it is needed."""

    name: str
    open: Callable[[], Image.Image]
    label: int | None  # its class
    captions: tuple[Caption, ...] = ()
    kept: dict[str, Any] | None = None  # other facts of it, that are stored with it


def fit_image(image: Image.Image, size: int, options: PixelOptions, name: str) -> Image.Image:
    """Return a converted image, scaled and centre-cropped to a square.

    Args:
        image: any image, as it was opened.
        size: height and width of the result, in pixels. The shorter side is scaled to it.
        options: how it becomes pixels.
        name: of the image, for the log.
    """
    image = convert_image(image, options, name)
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def read_image(
    data: np.ndarray, field: str, options: PixelOptions, name: str, size: int | None = None
) -> np.ndarray:
    """Return the pixels of an image of a tar, uint8 (C, H, W).

    Args:
        data: its bytes.
        field: under which it is stored, the suffix of its format.
        options: how it becomes pixels.
        name: of the image, for the log.
        size: height and width to which it is scaled and cropped; None leaves its own.
    """
    image = open_image(io.BytesIO(data.tobytes()), f".{field}")
    if size:
        return pixels_of(fit_image(image, size, options, name))
    return pixels_of(convert_image(image, options, name))


def pixel_options(manifest: dict[str, Any], name: str) -> PixelOptions:
    """Return how the images of a set become pixels, by its manifest.

    Raises:
        ValueError: it does not state that: an older version indexed the tars.
    """
    if "grey" not in manifest:
        raise ValueError(
            f"{name}: does not state whether its images are grey; run `rectify index` again, with "
            "--grey if they are"
        )
    entries = PixelOptions()._asdict()
    entries.update((key, manifest[key]) for key in entries if key in manifest)
    check_schema(entries, PIXEL_SCHEMA, name)
    return PixelOptions(**entries)


class Images(IndexedDataset):
    """Packed images, as float32 in [-1, 1].

    Args:
        path: the set, made by `rectify pack` or `rectify index`.
        cache: number of decoded images kept in memory, the most recently decoded ones.
        text: gives the embeddings of captions. By default batches have the captions only.
    """

    def __init__(self, path: str, cache: int = 4096, text: TextSource | None = None):
        self.path = path
        self.cache = cache
        self.reader = ShardReader(path, "images")
        self.manifest = self.reader.manifest
        schema = {"classes": (None, [str]), "listing": SHA256}
        check_schema(self.manifest, schema, f"{path}/manifest.json")
        self.options = pixel_options(self.manifest, f"{path}/manifest.json")
        self.buckets = read_buckets(self.manifest, f"{path}/manifest.json")
        self.captions = CaptionReader(self.reader, text)
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()

    def __repr__(self) -> str:
        return self.path

    def __len__(self) -> int:
        return len(self.reader)

    def pixels(self, i: int) -> np.ndarray:
        """Return image i as uint8, (C, H, W)."""
        if i not in self._decoded:
            sample = self.reader[i]
            name = f"{self.path}: image {i} ({sample['__key__']})"
            with errors_named(name):
                field = next(field for field in IMAGE_FIELDS if field in sample)
                self._decoded[i] = read_image(sample[field], field, self.options, name)
            if len(self._decoded) > self.cache:
                self._decoded.popitem(last=False)
        return self._decoded[i]

    def read(self, indices: np.ndarray) -> Batch:
        pixels = [self.pixels(int(i)) for i in indices]
        x = torch.from_numpy(np.stack(pixels))
        condition = read_labels(self.reader, indices)
        return Batch(x.float() / 127.5 - 1, latent=False, condition=condition)

    def read_epochs(self, indices: np.ndarray, seed: int, epochs: np.ndarray) -> Batch:
        return self.captions.add_captions(self.read(indices), indices, seed, epochs)


def read_labels(reader: ShardReader, indices: np.ndarray) -> Tensor | None:
    """Return the classes of samples, (B,) int64; None if the set has no classes.

    Raises:
        ValueError: only some shards have classes.
    """
    if not reader.has_field("cls"):
        return None
    return torch.from_numpy(reader.numbers("cls", indices))


def read_all(
    source: IndexedDataset, count: int, batch: int = 512
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (x, condition) of the samples 0 .. count - 1 in order, in batches.

    Raises:
        ValueError: the samples have several sizes.
    """
    check_one_size(source, "this command")
    for start in range(0, count, batch):
        end = min(count, start + batch)
        part = source.read(np.arange(start, end))
        yield part.x, part.condition
