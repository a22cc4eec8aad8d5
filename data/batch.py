"""Batches, the sources of their samples, and the endless sequence of batches of one rank."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from data.bucket_order import BucketOrder
from data.buckets import Bucket
from data.shards import Order
from data.text import TextFeatures


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch, and its position in the run, which keys all random draws.

    Attributes:
        x: images in [-1, 1] or latents, (B, C, H, W) float32.
        latent: whether x is latents, which need no codec.
        condition: class labels, (B,) int64.
        noise: the noise that the teacher of a pair started from, of the shape of x.
        paired: which samples bring their noise, (B,) bool. None: all do, if there is noise.
        guidance: guidance scale of each sample, (B,) float32, if pairs record it.
        captions: a caption of each sample, chosen by (seed, index, epoch); "" where it has none.
        text: the embeddings of the captions.
        bucket: name of the bucket that the samples are from, such as 64x96, if the set has buckets.
        bucket_total: number of samples in that bucket.
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
    noise: Tensor | None = None
    paired: Tensor | None = None
    guidance: Tensor | None = None
    captions: tuple[str, ...] | None = None
    text: TextFeatures | None = None
    bucket: str | None = None
    bucket_total: int = 0
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


class Request(NamedTuple):
    """A part of a global batch that a reader reads."""

    step: int  # number of the global batch
    start: int  # position of the first sample in the global batch
    samples: int  # how many are read
    size: int  # samples in the global batch

    @property
    def position(self) -> int:
        """Position of the first sample in the sequence of all samples."""
        return self.step * self.size + self.start


class BatchStream(ABC):
    """An endless sequence of samples, shared by readers.

    There is one reader for each reading process of each rank.
    """

    @abstractmethod
    def read_batches(
        self, seed: int, reader: int, readers: int, requests: Iterator[Request]
    ) -> Iterator[Batch]:
        """Yield the batches of one reader.

        Args:
            seed: of the order of samples.
            reader: number of this reader, in [0, readers).
            readers: number of readers of all ranks.
            requests: what each batch is.
        """


class RandomAccessSource(BatchStream):
    """An endless shuffled sequence of samples that can be read at any position."""

    def read_batches(
        self, seed: int, reader: int, readers: int, requests: Iterator[Request]
    ) -> Iterator[Batch]:
        for request in requests:
            yield self.take(seed, request.position, request.samples)

    @abstractmethod
    def take(self, seed: int, position: int, count: int) -> Batch:
        """Return `count` samples from a position on: a pure function of the arguments."""


class Located(NamedTuple):
    """The samples of a batch."""

    indices: np.ndarray  # in the set, (B,)
    epochs: np.ndarray  # how often each was read before, (B,)
    bucket: Bucket | None = None  # that they are from, if the set has buckets


class IndexedDataset(RandomAccessSource):
    """Samples by index, shuffled anew in every epoch.

    A set with buckets holds samples of several sizes. Each global batch is from one bucket, and the
    epochs are those of each bucket.

    Attributes:
        manifest: the manifest of the set.
        kept: ascending indices of the samples that are read. None: all.
        buckets: samples of one size each; none if all samples have one size.
    """

    manifest: dict[str, Any]
    kept: np.ndarray | None = None
    buckets: Sequence[Bucket] = ()
    _order: Order | None = None
    _orders: Sequence[Order] = ()  # of the buckets
    _bucket_order: BucketOrder | None = None

    @abstractmethod
    def read(self, indices: np.ndarray) -> Batch:
        """Return the samples at these indices, in this order."""

    def read_epochs(self, indices: np.ndarray, seed: int, epochs: np.ndarray) -> Batch:
        """Return the samples at these indices, with what is chosen anew in every epoch.

        Args:
            indices: of the samples, (B,).
            seed: of the run.
            epochs: how often each sample was read before, (B,).
        """
        return self.read(indices)

    def sample(self) -> Batch:
        """Return one sample, which shows the kind of all; of the first bucket, if there are any."""
        return self.read(np.array([0]))

    def samples_of_sizes(self) -> list[Batch]:
        """Return one sample of each size."""
        if not self.buckets:
            return [self.sample()]
        return [self.read(np.array([bucket.start])) for bucket in self.buckets]

    def order(self, seed: int) -> Order:
        """Return the order of the samples of one size for a seed."""
        check_one_size(self, "one order of all samples")
        if self._order is None or self._order.seed != seed:
            counts = np.array([shard["count"] for shard in self.manifest["shards"]])
            if self.kept is not None:
                ends = np.cumsum([0, *counts])
                counts = np.diff(np.searchsorted(self.kept, ends))
            self._order = Order(counts, seed, self.kept)
        return self._order

    def bucket_order(self, seed: int, batch: int) -> BucketOrder:
        """Return the order of batches of the buckets, for a seed and a size of global batches."""
        order = self._bucket_order
        if order is None or order.seed != seed or order.batch != batch:
            check_buckets_hold(self, batch)
            order = BucketOrder([bucket.total for bucket in self.buckets], batch, seed)
            self._bucket_order = order
        return order

    def order_of_bucket(self, seed: int, number: int) -> Order:
        """Return the order of the samples of a bucket for a seed."""
        if not self._orders or self._orders[0].seed != seed:
            orders = []
            for i, bucket in enumerate(self.buckets):
                orders.append(Order(bucket.counts, seed, bucket=i))
            self._orders = orders
        return self._orders[number]

    def locate(self, seed: int, request: Request) -> Located:
        """Return which samples a request is for: a pure function of the arguments."""
        if not self.buckets:
            order = self.order(seed)
            indices = order.indices(request.position, request.samples)
            return Located(indices, order.epochs(request.position, request.samples))
        found = self.bucket_order(seed, request.size).locate(request.step)
        position = found.number * request.size + request.start
        return self.locate_in_bucket(seed, found.bucket, position, request.samples)

    def locate_in_bucket(self, seed: int, number: int, position: int, count: int) -> Located:
        """Return the samples of a bucket from a position in its sequence on."""
        bucket = self.buckets[number]
        order = self.order_of_bucket(seed, number)
        indices = bucket.start + order.indices(position, count)
        return Located(indices, order.epochs(position, count), bucket)

    def read_located(self, seed: int, located: Located) -> Batch:
        """Return the samples that were located, with the name of their bucket."""
        batch = self.read_epochs(located.indices, seed, located.epochs)
        if located.bucket is None:
            return batch
        return replace(batch, bucket=located.bucket.name, bucket_total=located.bucket.total)

    def read_batches(
        self, seed: int, reader: int, readers: int, requests: Iterator[Request]
    ) -> Iterator[Batch]:
        for request in requests:
            if self.buckets:
                yield self.read_located(seed, self.locate(seed, request))
            else:
                yield self.take(seed, request.position, request.samples)

    def take(self, seed: int, position: int, count: int) -> Batch:
        order = self.order(seed)
        indices = order.indices(position, count)
        return self.read_epochs(indices, seed, order.epochs(position, count))


def check_one_size(source: IndexedDataset, use: str) -> None:
    """Check that all samples of a set have one size.

    Args:
        source: the set.
        use: what needs that, for the message.
    """
    if len(source.buckets) > 1:
        sizes = ", ".join(bucket.name for bucket in source.buckets)
        raise ValueError(
            f"{source}: has images of several sizes ({sizes}), but {use} needs one size; pack the "
            "images again without `--buckets`"
        )


def check_buckets_hold(source: IndexedDataset, batch: int) -> None:
    """Check that each bucket holds a global batch, so that no sample occurs twice in one."""
    for bucket in source.buckets:
        if bucket.total < batch:
            raise ValueError(
                f"data.source: {source}: bucket {bucket.name} holds {bucket.total} samples, but "
                f"data.batch is {batch}; lower data.batch to {bucket.total}, or pack the images "
                f"again with `--bucket_minimum {batch}`, which merges small buckets"
            )


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
        requests = (Request(step, start, count, self.batch) for step, start in for_source)
        batches = self.source.read_batches(self.seed, reader, readers, requests)
        for batch, (step, start) in zip(batches, for_batches):
            yield replace(batch, seed=self.seed, step=step, start=start, size=self.batch)
