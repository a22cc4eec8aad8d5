"""Images as samples of a density: each grey level becomes a uniform value in its interval."""

import numpy as np
import torch

from data.batch import Batch, IndexedDataset, check_one_size
from data.images import Images
from data.noise import TRAINING_STREAM, generator

# Last word of the generator's counter. The purposes of trainer.step_random are smaller numbers.
DEQUANTISATION = 1 << 32


class Dequantised(IndexedDataset):
    """Dequantised images (Theis et al. 2015, arXiv 1511.01844), float32 in [-1, 1).

    `x = 2 (level + u) / levels - 1` with u uniform in [0, 1). In training u is a function of the
    seed and the position in the sequence, so that every epoch has another one. When images are
    read by index, u is the same every time.

    Args:
        path: the set of images, made by `rectify pack`.
        levels: number of grey levels of the images, spread evenly over the bytes: 256, or 17 for
            digits that are packed with 8x8 pixels.
        cache: number of decoded images kept in memory.
    """

    def __init__(self, path: str, levels: int = 256, cache: int = 4096):
        if not 2 <= levels <= 256:
            raise ValueError(f"Dequantised: levels is {levels}; it must lie in [2, 256]")
        self.path = path
        self.levels = levels
        self.cache = cache
        self.images = Images(path, cache)
        self.manifest = self.images.manifest
        check_one_size(self.images, "Dequantised")

    def __repr__(self) -> str:
        return self.path

    def read(self, indices: np.ndarray) -> Batch:
        return self._dequantise(indices, 0, np.asarray(indices))

    def take(self, seed: int, position: int, count: int) -> Batch:
        indices = self.order(seed).indices(position, count)
        return self._dequantise(indices, seed, np.arange(position, position + count))

    def _dequantise(self, indices: np.ndarray, seed: int, positions: np.ndarray) -> Batch:
        """Return images; the u of each is a function of the seed and its position."""
        batch = self.images.read(indices)
        level = (batch.x + 1) * ((self.levels - 1) / 2)

        # Levels were rounded to bytes, which moves them by up to half of 1 / 255.
        rounding = (level - level.round()).abs().max()
        if rounding > self.levels / 500:
            raise ValueError(
                f"{self.path}: holds more than {self.levels} evenly spread grey levels; "
                "set levels to 256, which fits any image"
            )

        draws = []
        for position in positions:
            random = generator(seed, int(position), 0, DEQUANTISATION, stream=TRAINING_STREAM)
            draws.append(random.random(batch.x.shape[1:], dtype=np.float32))
        u = torch.from_numpy(np.stack(draws))
        x = 2 * (level.round() + u) / self.levels - 1
        return Batch(x, latent=True, condition=batch.condition)
