"""Latents: what a codec made of images, as float16, beside the codec that can decode them (`set/codec`)."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, Set
from data.images import labels
from data.shards import ShardReader, encode_array


def latent_sample(key: str, latent: Tensor, klass: int | None) -> dict[str, Any]:
    """Return one latent (C, H, W), and its class if it has one, as a shard's sample in float16."""
    sample = {"__key__": key, "npy": encode_array(latent.cpu().numpy().astype(np.float16))}
    return sample if klass is None else {**sample, "cls": str(klass).encode()}


class Latents(Set):
    """Encoded images, float32 of unit variance.

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
        latents = torch.from_numpy(self.reader.arrays("npy", indices)).float()
        return Batch(latents, latent=True, condition=labels(self.reader, indices))
