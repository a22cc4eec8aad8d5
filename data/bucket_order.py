"""The bucket of each training step: a pure function of (seed, step), resumed by one integer."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from data.noise import BUCKET_STREAM, permutation


class BucketBatch(NamedTuple):
    """One of a bucket's batches."""

    bucket: int  # number of the bucket
    number: int  # of the batch, among all batches of its bucket


class _Cycle(NamedTuple):
    """The batches of a cycle, in order, (n,) each."""

    bucket: np.ndarray
    number: np.ndarray


class BucketOrder:
    """The order of batches, each of samples of one bucket, in proportion to the buckets' sizes.

    Steps are grouped in cycles. After e cycles, a bucket of n samples has had floor(e n / B)
    batches of B samples: after e cycles each sample was read e times, except for less than one
    batch of each bucket, which the next cycles read. The batches of a cycle are shuffled by the
    seed and the number of the cycle.

    Args:
        totals: samples in each bucket, at least `batch`.
        batch: samples in a batch.
        seed: of the order.
    """

    def __init__(self, totals: Sequence[int], batch: int, seed: int):
        if min(totals) < batch:
            raise ValueError(f"buckets of {list(totals)} samples; each must hold {batch}, a batch")
        self.totals = list(totals)
        self.batch = batch
        self.seed = seed
        self._cycle = lru_cache(maxsize=2)(self._shuffle_cycle)

    def __reduce__(self) -> tuple[Any, ...]:
        return BucketOrder, (self.totals, self.batch, self.seed)  # without the cache

    def locate(self, step: int) -> BucketBatch:
        """Return which batch a step takes. The time is logarithmic in the step."""
        # With N samples in all and K buckets, eN / B - K < first_step(e) <= eN / B.
        total = sum(self.totals)
        low = step * self.batch // total
        high = (step + len(self.totals)) * self.batch // total + 1
        cycle = bisect_right(range(high + 1), step, lo=low, key=self.first_step) - 1

        batches = self._cycle(cycle)
        within = step - self.first_step(cycle)
        return BucketBatch(int(batches.bucket[within]), int(batches.number[within]))

    def first_step(self, cycle: int) -> int:
        """Return the number of steps before a cycle."""
        return sum(self._batches_before(cycle))

    def _batches_before(self, cycle: int) -> list[int]:
        """Return the number of batches of each bucket before a cycle."""
        return [cycle * total // self.batch for total in self.totals]

    def _shuffle_cycle(self, cycle: int) -> _Cycle:
        """Return the batches of a cycle in order."""
        # The batches of one bucket after those of another.
        before = self._batches_before(cycle)
        buckets = []
        for bucket, end in enumerate(self._batches_before(cycle + 1)):
            buckets.append(np.full(end - before[bucket], bucket))
        of_batches = np.concatenate(buckets)

        # Shuffled; then each bucket's batches are numbered in the order of the steps.
        of_batches = of_batches[
            permutation(len(of_batches), self.seed, cycle, stream=BUCKET_STREAM)
        ]
        numbers = np.empty(len(of_batches), dtype=np.int64)
        for bucket, first in enumerate(before):
            steps = np.flatnonzero(of_batches == bucket)
            numbers[steps] = first + np.arange(len(steps))
        return _Cycle(of_batches, numbers)
