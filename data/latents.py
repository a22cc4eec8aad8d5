"""Latents: images encoded by a codec, in float16. The codec that decodes them is in `set/codec`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, IndexedDataset
from data.buckets import read_buckets
from data.captioned import CaptionReader
from data.files import errors_named
from data.images import read_labels
from data.schema import check_schema
from data.shards import ShardReader, array_to_npy, npy_to_array
from data.text import TextSource

FIELD = "npy"  # of a shard's sample that holds the latent
DEVIATIONS = (0.4, 2.5)  # the standard deviations of latents that are taken for scaled


def latent_sample(key: str, latent: Tensor, label: int | None) -> dict[str, Any]:
    """Return one latent (C, H, W), and its class if it has one, as a sample of a shard.

    The latent is stored in float16.
    """
    array = latent.cpu().numpy().astype(np.float16)
    sample: dict[str, Any] = {"__key__": key, "npy": array_to_npy(array)}
    if label is not None:
        sample["cls"] = str(label).encode()
    return sample


def read_latent(data: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """Return the latent in .npy bytes, (C, H, W), of its own type of floats, not scaled.

    Args:
        data: the bytes.
        factor: that will scale it.

    Raises:
        ValueError: it is not an array of floats with three axes, or not finite when it is scaled.
    """
    array = npy_to_array(data)
    if array.ndim != 3 or array.size == 0:
        raise ValueError(
            f"an array of shape {array.shape}; a latent has the axes (channels, height, width)"
        )
    check_floats(array)
    with np.errstate(over="ignore", invalid="ignore"):
        values = array.astype(np.float32) * np.float32(factor)
    if not np.isfinite(values).all():
        raise ValueError("a latent that is not finite")
    return array


def check_floats(array: np.ndarray) -> None:
    """Check that latents are floats that can be read without a guess.

    Raises:
        ValueError: they are of another type, such as the bits of bfloat16.
    """
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(
            f"latents of type {array.dtype.str}; they must be float16, float32 or float64 of this "
            "machine (write bfloat16 as float32)"
        )


def check_unit_variance(where: str, deviation: float) -> None:
    """Check that latents of other programs have about unit variance, as training expects.

    Args:
        where: the latents, for the message.
        deviation: their standard deviation.
    """
    low, high = DEVIATIONS
    if not low <= deviation <= high:
        raise ValueError(
            f"{where}: its latents have a standard deviation of {deviation:.3g}, not about 1; give "
            "the factor that scales them with the option `scale` (the scaling_factor of their "
            "autoencoder), or 1 to read them as they are"
        )


class Latents(IndexedDataset):
    """Encoded images, as float32 of unit variance.

    Args:
        path: the set, made by `rectify encode` or `rectify index`.
        text: gives the embeddings of captions. By default batches have the captions only.
    """

    def __init__(self, path: str, text: TextSource | None = None):
        self.path = path
        self.reader = ShardReader(path, "latents")
        self.manifest = self.reader.manifest
        self.factor = self.manifest.get("factor", 1.0)  # of latents that were not scaled
        check_schema(self.factor, float, f"{path}/manifest.json: factor")
        self.buckets = read_buckets(self.manifest, f"{path}/manifest.json")
        self.captions = CaptionReader(self.reader, text)

    def __repr__(self) -> str:
        return self.path

    def read(self, indices: np.ndarray) -> Batch:
        x = read_latents(self.reader, indices)
        if self.factor != 1:
            x = x * self.factor
        return Batch(x, latent=True, condition=read_labels(self.reader, indices))

    def read_epochs(self, indices: np.ndarray, seed: int, epochs: np.ndarray) -> Batch:
        return self.captions.add_captions(self.read(indices), indices, seed, epochs)


def read_latents(reader: ShardReader, indices: np.ndarray) -> Tensor:
    """Return the latents of samples, (B, C, H, W) float32.

    Raises:
        ValueError: they are no floats, or one is not finite; the message names it.
    """
    array = reader.arrays(FIELD, indices)
    with errors_named(reader.folder):
        check_floats(array)
    x = torch.from_numpy(array).float()
    if not x.isfinite().all():
        finite = x.flatten(1).isfinite().all(1)
        index = int(indices[int(finite.logical_not().nonzero()[0])])
        raise ValueError(
            f"{reader.find_tar(index)}: the latent of {reader[index]['__key__']} is not finite; "
            "repair or leave out that sample, and make the set again"
        )
    return x
