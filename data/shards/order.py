"""The order in which samples are seen: a pure function of (seed, epoch, position), so that resume is one integer."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from data.noise import permutation

BLOCK = 16  # shards whose samples are shuffled together: locality on disk, and memory that does not grow with the set


class Order:
    """Shards are permuted in every epoch, then samples within blocks of shards. Nothing is kept per sample.

    Args:
        counts: samples in each shard.
        seed: of the order.
        kept: indices of the samples that are shown, rising, of which `counts` are in each shard; None: all.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int, kept: np.ndarray | None = None):
        self.counts, self.seed, self.kept = np.asarray(counts, dtype=np.int64), seed, kept
        self.total = int(self.counts.sum())
        self.starts = np.cumsum(self.counts) - self.counts
        self._epoch = lru_cache(maxsize=2)(self._shuffle_shards)
        self._block = lru_cache(maxsize=2)(self._shuffle_block)

    def __reduce__(self) -> tuple[Any, ...]:
        return Order, (self.counts, self.seed, self.kept)  # caches stay here

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = permutation(len(self.counts), self.seed, epoch, 0)
        return shards, np.cumsum(np.add.reduceat(self.counts[shards], np.arange(0, len(shards), BLOCK)))

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        members = self._epoch(epoch)[0][block * BLOCK : (block + 1) * BLOCK]
        samples = np.concatenate([np.arange(self.starts[s], self.starts[s] + self.counts[s]) for s in members])
        return samples[permutation(len(samples), self.seed, epoch, 1 + block)]

    def indices(self, position: int, count: int) -> np.ndarray:
        """Return the indices at `count` positions of the endless sequence of epochs, from `position` on."""
        parts: list[np.ndarray] = []
        while count > 0:
            epoch, within = divmod(position, self.total)
            ends = self._epoch(epoch)[1]
            block = int(np.searchsorted(ends, within, side="right"))
            samples = self._block(epoch, block)
            part = samples[within - int(ends[block]) :][:count]  # counted from the block's end
            parts.append(part)
            position, count = position + len(part), count - len(part)
        found = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return found if self.kept is None else self.kept[found]


def order(manifest: dict[str, Any], seed: int, epoch: int, start: int, count: int) -> np.ndarray:
    """Return the indices of `count` samples from position `start` of an epoch on (running into the next ones)."""
    whole = Order([shard["count"] for shard in manifest["shards"]], seed)
    return whole.indices(epoch * whole.total + start, count)
