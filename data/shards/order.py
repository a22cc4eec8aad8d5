"""The order of samples: a pure function of (seed, epoch, position), resumed by one integer."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from data.noise import permutation

# Samples are shuffled within groups of shards: reads stay local on disk, and the memory needed
# does not grow with the set.
SHARDS_PER_BLOCK = 16


class Order:
    """A shuffled order of all samples for every epoch.

    Each epoch permutes the shards, then the samples within blocks of shards. Nothing is stored per
    sample.

    Args:
        counts: samples in each shard.
        seed: of the order.
        kept: ascending indices of the samples in the order; `counts` of them are in each shard.
            None: all samples.
        bucket: number of the bucket whose samples these are. Each has another order.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        seed: int,
        kept: np.ndarray | None = None,
        bucket: int = 0,
    ):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed = seed
        self.kept = kept
        self.bucket = bucket
        self.total = int(self.counts.sum())
        self.starts = np.cumsum(self.counts) - self.counts
        self._epoch = lru_cache(maxsize=2)(self._shuffle_shards)
        self._block = lru_cache(maxsize=2)(self._shuffle_block)

    def __reduce__(self) -> tuple[Any, ...]:
        return Order, (self.counts, self.seed, self.kept, self.bucket)  # without the caches

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards of an epoch in order, and the position at which each block ends."""
        shards = permutation(len(self.counts), self.seed, epoch, 0, self.bucket)
        first_of_block = np.arange(0, len(shards), SHARDS_PER_BLOCK)
        sizes = np.add.reduceat(self.counts[shards], first_of_block)
        return shards, np.cumsum(sizes)

    def _shuffle_block(self, epoch: int, block: int) -> np.ndarray:
        """Return the samples of a block in order."""
        first = block * SHARDS_PER_BLOCK
        shards = self._epoch(epoch)[0][first : first + SHARDS_PER_BLOCK]
        of_shards = []
        for shard in shards:
            start = self.starts[shard]
            of_shards.append(np.arange(start, start + self.counts[shard]))
        samples = np.concatenate(of_shards)
        return samples[permutation(len(samples), self.seed, epoch, 1 + block, self.bucket)]

    def indices(self, position: int, count: int) -> np.ndarray:
        """Return the indices of `count` samples from a position in the sequence of all epochs."""
        parts: list[np.ndarray] = []
        while count > 0:
            epoch, within = divmod(position, self.total)
            ends = self._epoch(epoch)[1]
            block = int(np.searchsorted(ends, within, side="right"))
            samples = self._block(epoch, block)
            from_end = within - int(ends[block])  # negative: counted from the end of the block
            part = samples[from_end:][:count]
            parts.append(part)
            position += len(part)
            count -= len(part)
        found = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return found if self.kept is None else self.kept[found]

    def epochs(self, position: int, count: int) -> np.ndarray:
        """Return the epoch of each of `count` samples from a position on, (count,) int64."""
        return np.arange(position, position + count) // self.total
