"""Batches, the sources of their samples, and the endless sequence of them that one rank works through."""

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


@dataclass
class Batch:
    """One rank's slice of a global batch, and where in the run it stands (which keys every random draw)."""

    x: Tensor  # images in [-1, 1] or latents, (B, C, H, W) float32
    latent: bool  # x needs no codec
    condition: Tensor | None = None  # class labels, (B,) int64
    noise: Tensor | None = None  # the noise that a pair's teacher started from, as x
    paired: Tensor | None = None  # which samples bring their noise, (B,) bool; None: all, if there is noise
    scale: Tensor | None = None  # of the guidance that each sample was drawn at, (B,) float32, where pairs record it
    seed: int = 0
    step: int = 0  # optimizer step
    start: int = 0  # position of the first sample in the global batch
    size: int = 0  # samples in the global batch
    place: tuple[int, ...] | None = None  # of a source that is read from front to back: the lane, and its row after this batch

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on a device."""
        if self.x.device == device:
            return self
        parts: dict[str, Any] = {name: part for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **{name: part.to(device, non_blocking=True) for name, part in parts.items()})


class Feed(ABC):
    """An endless sequence of samples, dealt out to lanes: one for each reading process of each rank."""

    @abstractmethod
    def walk(self, seed: int, lane: int, lanes: int, places: Iterator[tuple[int, int]]) -> Iterator[Batch]:
        """Yield a lane's batches, for each (position in the whole sequence, number of samples)."""


class Source(Feed):
    """An endless shuffled sequence of samples, in which every place can be read at once."""

    def walk(self, seed: int, lane: int, lanes: int, places: Iterator[tuple[int, int]]) -> Iterator[Batch]:
        return (self.take(seed, position, count) for position, count in places)

    @abstractmethod
    def take(self, seed: int, position: int, count: int) -> Batch:
        """Return `count` samples from a position of the sequence on: a pure function of its arguments."""


class Set(Source):
    """Samples by index, shuffled anew in every epoch. `manifest` is the set's manifest."""

    manifest: dict[str, Any]
    kept: np.ndarray | None = None  # indices of the samples that are shown, rising; None: all
    _order: Order | None = None

    @abstractmethod
    def read(self, indices: np.ndarray) -> Batch:
        """Return the samples at these indices, in this order."""

    def sample(self) -> Batch:
        """Return one sample, to tell what they are like."""
        return self.read(np.array([0]))

    def order(self, seed: int) -> Order:
        """Return the set's order under a seed."""
        if self._order is None or self._order.seed != seed:
            counts = np.array([shard["count"] for shard in self.manifest["shards"]])
            if self.kept is not None:
                counts = np.diff(np.searchsorted(self.kept, np.cumsum([0, *counts])))
            self._order = Order(counts, seed, self.kept)
        return self._order

    def take(self, seed: int, position: int, count: int) -> Batch:
        return self.read(self.order(seed).indices(position, count))


class Steps(IterableDataset):
    """The batches of one rank from a certain step on: position = step x global batch, of which a rank takes its slice.

    Args:
        source: the samples.
        batch: size of the global batch.
        seed: of the order and of all draws.
        first: step to begin with.
        rank: this process.
        world: number of processes.
        parts: micro-batches accumulated in one step.
        steps: how many there are; none is without end.
    """

    def __init__(
        self,
        source: Feed,
        batch: int,
        seed: int,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        steps: int | None = None,
    ):
        if batch < 1 or batch % (world * parts):
            raise ValueError(f"data.batch: {batch} is not a positive multiple of {world} processes x {parts} accumulated batches")
        self.source, self.batch, self.seed, self.first = source, batch, seed, first
        self.rank, self.world, self.parts, self.steps = rank, world, parts, steps

    def slices(self, micro: int, stride: int) -> Iterator[tuple[int, int]]:
        """Yield (step, first sample in the global batch) of every `stride`-th micro-batch of this rank."""
        while self.steps is None or micro < (self.first + self.steps) * self.parts:
            step, part = divmod(micro, self.parts)
            yield step, (part * self.world + self.rank) * self.batch // (self.world * self.parts)
            micro += stride

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        at, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        micro, local = self.first * self.parts + at, self.batch // (self.world * self.parts)
        lane = micro % stride * self.world + self.rank  # a matter of the step, so that a resumed worker goes on with its own
        asked, marks = tee(self.slices(micro, stride))
        places = ((step * self.batch + start, local) for step, start in asked)
        batches = self.source.walk(self.seed, lane, stride * self.world, places)
        for batch, (step, start) in zip(batches, marks):
            batch.seed, batch.step, batch.start, batch.size = self.seed, step, start, self.batch
            yield batch
