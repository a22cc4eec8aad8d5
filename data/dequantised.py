"""Images as samples of a density: a grey level is drawn anew, uniformly, from the interval that it stands for."""

import numpy as np
import torch

from data.batch import Batch, Set
from data.images import Images
from data.noise import TRAINING, generator

KIND = 1 << 32  # the counter's last word, apart from the purposes of trainer.draws


class Dequantised(Set):
    """Packed images, dequantised (1511.01844): `x = 2 (level + u) / levels - 1`, u uniform in [0, 1), float32.

    In training u is a function of (seed, position in the sequence): another one in every epoch. Read by index, one for all times.

    Args:
        path: the set of images, made by `rectify pack`.
        levels: grey levels of the images, spread evenly over the bytes: 256, or 17 for the packed digits in their own size.
        cache: decoded images kept in memory.
    """

    def __init__(self, path: str, levels: int = 256, cache: int = 4096):
        if not 2 <= levels <= 256:
            raise ValueError(f"Dequantised: levels is {levels}, it must lie in [2, 256]")
        self.path, self.levels, self.cache = path, levels, cache
        self.images = Images(path, cache)
        self.manifest = self.images.manifest

    def __repr__(self) -> str:
        return self.path

    def read(self, indices: np.ndarray) -> Batch:
        return self._spread(indices, 0, np.asarray(indices))

    def take(self, seed: int, position: int, count: int) -> Batch:
        return self._spread(self.order(seed).indices(position, count), seed, np.arange(position, position + count))

    def _spread(self, indices: np.ndarray, seed: int, places: np.ndarray) -> Batch:
        """Return images with what is drawn for (seed, place)."""
        batch = self.images.read(indices)
        level = (batch.x + 1) * ((self.levels - 1) / 2)
        if (level - level.round()).abs().max() > self.levels / 500:  # bytes are rounded levels: off by half of 1 / 255
            raise ValueError(f"{self.path}: holds more than {self.levels} evenly spread grey levels; any image has 256")
        draws = [generator(seed, int(place), 0, KIND, stream=TRAINING) for place in places]
        u = torch.from_numpy(np.stack([draw.random(batch.x.shape[1:], dtype=np.float32) for draw in draws]))
        return Batch(2 * (level.round() + u) / self.levels - 1, latent=True, condition=batch.condition)
