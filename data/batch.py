"""Batches, the sources of their samples, and the endless sequence of batches of one rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from data.shards import Order
from data.text import TextFeatures


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch, and its position in the run, which keys all random draws.

    Attributes:
        x: images in [-1, 1] or latents, (B, C, H, W) float32.
        latent: whether x is latents, which need no codec.
        condition: class labels, (B,) int64.
        captions: a caption of each sample, drawn by (seed, index, epoch); "" where it has none.
        text: the embeddings of the captions.
        noise: the noise that the teacher of a pair started from, of the shape of x.
        paired: which samples bring their noise, (B,) bool. None: all do, if there is noise.
        guidance: guidance scale of each sample, (B,) float32, if pairs record it.
        seed: seed of the run's draws.
        step: optimizer step.
        start: position of the first sample in the global batch.
        size: samples in the global batch.
        reader: number of the reader, for a source that is read sequentially.
        progress: that reader's progress after this batch (see `ReaderAssignment`).
    """

    x: Tensor
    latent: bool
    condition: Tensor | None = None
    captions: tuple[str, ...] | None = None
    text: TextFeatures | None = None
    noise: Tensor | None = None
    paired: Tensor | None = None
    guidance: Tensor | None = None
    seed: int = 0
    step: int = 0
    start: int = 0
    size: int = 0
    reader: int | None = None
    progress: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on a device."""
        if self.x.device == device:
            return self
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor | TextFeatures):
                moved[name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


class BatchStream(ABC):
    """An endless sequence of samples, shared by readers.

    There is one reader for each reading process of each rank.
    """

    @abstractmethod
    def read_batches(
        self, seed: int, reader: int, readers: int, requests: Iterator[tuple[int, int]]
    ) -> Iterator[Batch]:
        """Yield the batches of one reader.

        Args:
            seed: of the order of samples.
            reader: number of this reader, in [0, readers).
            readers: number of readers of all ranks.
            requests: for each batch its position in the global sequence and its number of samples.
        """


class RandomAccessSource(BatchStream):
    """An endless shuffled sequence of samples that can be read at any position."""

    def read_batches(
        self, seed: int, reader: int, readers: int, requests: Iterator[tuple[int, int]]
    ) -> Iterator[Batch]:
        for position, count in requests:
            yield self.take(seed, position, count)

    @abstractmethod
    def take(self, seed: int, position: int, count: int) -> Batch:
        """Return `count` samples from a position on: a pure function of the arguments."""


class IndexedDataset(RandomAccessSource):
    """Samples by index, shuffled anew in every epoch.

    Attributes:
        manifest: the manifest of the set.
        kept: ascending indices of the samples that are read. None: all.
    """

    manifest: dict[str, Any]
    kept: np.ndarray | None = None
    _order: Order | None = None

    @abstractmethod
    def read(self, indices: np.ndarray) -> Batch:
        """Return the samples at these indices, in this order."""

    def sample(self) -> Batch:
        """Return one sample, which shows the shape and kind of all."""
        return self.read(np.array([0]))

    def order(self, seed: int) -> Order:
        """Return the order of the samples for a seed."""
        if self._order is None or self._order.seed != seed:
            counts = np.array([shard["count"] for shard in self.manifest["shards"]])
            if self.kept is not None:
                ends = np.cumsum([0, *counts])
                counts = np.diff(np.searchsorted(self.kept, ends))
            self._order = Order(counts, seed, self.kept)
        return self._order

    def take(self, seed: int, position: int, count: int) -> Batch:
        return self.read(self.order(seed).indices(position, count))


class RankBatches(IterableDataset):
    """The batches of one rank from a step on.

    A global batch begins at position step x batch of the sequence; each rank takes its slice.

    Args:
        source: the samples.
        batch: samples in the global batch.
        seed: of the order and of all draws.
        first_step: step to begin with.
        rank: number of this process.
        world: number of processes.
        accumulate: micro-batches accumulated in one step.
        steps: number of steps. None: endless.

    Raises:
        ValueError: the global batch cannot be split evenly.
    """

    def __init__(
        self,
        source: BatchStream,
        batch: int,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        steps: int | None = None,
    ):
        divisor = world * accumulate
        if batch < 1 or batch % divisor:
            raise ValueError(
                f"data.batch is {batch}; it must be a positive multiple of {divisor} "
                f"({world} processes x {accumulate} accumulated batches)"
            )
        self.source = source
        self.batch = batch
        self.seed = seed
        self.first_step = first_step
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.steps = steps

    def micro_batches(self, micro: int, stride: int) -> Iterator[tuple[int, int]]:
        """Yield (step, position in the global batch) of this rank's micro-batches.

        They are numbered over all steps; `micro` is the first one, then every `stride`-th follows.
        """
        divisor = self.world * self.accumulate
        while self.steps is None or micro < (self.first_step + self.steps) * self.accumulate:
            step, part = divmod(micro, self.accumulate)
            slice_number = part * self.world + self.rank
            yield step, slice_number * self.batch // divisor
            micro += stride

    def __iter__(self) -> Iterator[Batch]:
        # The workers of a rank read its micro-batches in turn.
        worker = get_worker_info()
        worker_id = worker.id if worker else 0
        workers = worker.num_workers if worker else 1
        micro = self.first_step * self.accumulate + worker_id

        # A reader's number depends on the step, so that it goes on with its shards when resumed.
        reader = micro % workers * self.world + self.rank
        readers = workers * self.world

        # Request the batches from the source, and complete them with their position in the run.
        for_source, for_batches = tee(self.micro_batches(micro, workers))
        count = self.batch // (self.world * self.accumulate)
        requests = ((step * self.batch + start, count) for step, start in for_source)
        batches = self.source.read_batches(self.seed, reader, readers, requests)
        for batch, (step, start) in zip(batches, for_batches):
            yield replace(batch, seed=self.seed, step=step, start=start, size=self.batch)
