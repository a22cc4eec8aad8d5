"""Latents: images encoded by a codec, in float16. The codec that decodes them is in `set/codec`."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, IndexedDataset
from data.images import read_labels
from data.shards import ShardReader, array_to_npy


def latent_sample(key: str, latent: Tensor, label: int | None) -> dict[str, Any]:
    """Return one latent (C, H, W), and its class if it has one, as a sample of a shard.

    The latent is stored in float16.
    """
    array = latent.cpu().numpy().astype(np.float16)
    sample: dict[str, Any] = {"__key__": key, "npy": array_to_npy(array)}
    if label is not None:
        sample["cls"] = str(label).encode()
    return sample


class Latents(IndexedDataset):
    """Encoded images, as float32 of unit variance.

    Args:
        path: the set, made by `rectify encode`.
    """

    def __init__(self, path: str):
        self.path = path
        self.reader = ShardReader(path, "latents")
        self.manifest = self.reader.manifest

    def __repr__(self) -> str:
        return self.path

    def read(self, indices: np.ndarray) -> Batch:
        x = torch.from_numpy(self.reader.arrays("npy", indices)).float()
        return Batch(x, latent=True, condition=read_labels(self.reader, indices))
