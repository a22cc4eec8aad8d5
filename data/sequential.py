"""Webdataset tars without a manifest, local or remote, read sequentially: for very large sets."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand

from data.batch import Batch, BatchStream, Request
from data.cache import Cache, parse_scheme
from data.files import canonical, digest, is_machine_fault, raise_named
from data.images import read_image
from data.latents import check_unit_variance, read_latent
from data.noise import permutation
from data.pixels import IMAGE_FIELDS, PixelOptions
from data.reader_assignment import (
    Progress,
    ReaderAssignment,
    initial_progress,
    restore_assignment,
)
from data.shards.scan import describe_passed_over
from data.tars import (
    LABEL_FIELD,
    LATENT_FIELD,
    Tar,
    check_options,
    check_used,
    field_kind,
    parse_label,
)

ONE_LAYOUT = {  # what samples that differ must be, if they are images and if not
    True: "data.source.size scales images to one size",
    False: "latents must have one type and shape",
}
SCALE_LATENTS = 64  # latents whose variance is checked
log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One sample of a tar."""

    x: np.ndarray  # pixels (uint8) or latent, not scaled yet, (C, H, W)
    label: int  # 0 if no classes are read


class Layout(NamedTuple):
    """What all samples of a set have in common."""

    images: bool  # otherwise latents
    type: np.dtype
    shape: tuple[int, ...]


class SequentialTars(BatchStream):
    """Images or latents (.npy) in webdataset tars, read sequentially.

    The tars are local files, or URLs of s3, gs, hf, http or https that are kept in a local cache.
    One reading process reads each shard, once an epoch; the order of shards and samples depends on
    the seed and the epoch. When a run resumes with the same number of reading processes (ranks x
    data.workers) the sequence continues exactly. With another number, unfinished shards begin anew.

    Args:
        urls: the tars: one pattern such as shard-{000..127}.tar, or a list of patterns.
        cache: folder of downloaded shards, shared by all processes of a machine. By default
            RECTIFY_CACHE, or ~/.cache/rectify.
        limit: GB that the cache keeps beyond what is in use. By default RECTIFY_CACHE_GB, or 100.
        tolerance: fraction of a shard's samples, rounded up, that may be unreadable. They are
            skipped; more are an error.
        block: shards that are downloaded and shuffled together; 1 shuffles within each shard.
        classes: number of classes in .cls; 0 reads no classes.
        size: height and width in pixels to which images are scaled and centre-cropped. By default
            they are left as they are, and all must have one size.
        grey: read images with one channel instead of three.
        allow_pipe: run URLs `pipe:COMMAND` in a shell. Only for commands that you trust.
        field: the field to read, for samples with several images: jpg, or mask.png.
        scale: factor that latents are multiplied by, such as the scaling_factor of their
            autoencoder; 1 reads them as they are. By default they must have about unit variance.
        background: colour on which transparent images are laid, such as white or #808080.
        white: value of white in images of 16 or 32 bits and floats. By default 65535 for 16 bits;
            others must declare it.
    """

    def __init__(
        self,
        urls: str | list[str],
        cache: str | None = None,
        limit: float | None = None,
        tolerance: float = 0.01,
        block: int = 1,
        classes: int = 0,
        size: int | None = None,
        grey: bool = False,
        allow_pipe: bool = False,
        field: str | None = None,
        scale: float | None = None,
        background: str = "white",
        white: float | None = None,
    ):
        self.pixel_options = PixelOptions(grey, background, white)
        check_options(tolerance, classes, scale, self.pixel_options)
        for name, value in {"block": block, "size": size}.items():
            if value is not None and value < 1:
                raise ValueError(f"SequentialTars: {name} is {value}; it must be at least 1")
        if field:
            field_kind(field)

        # Expand the patterns, and check every URL before anything is read.
        self.urls: list[str] = []
        patterns = [urls] if isinstance(urls, str) else urls
        for pattern in patterns:
            self.urls.extend(braceexpand(pattern))
        for url in self.urls:
            parse_scheme(url, allow_pipe)
        if not self.urls:
            raise ValueError("SequentialTars: urls is empty; name at least one tar")

        cache_bytes = None if limit is None else int(limit * 1e9)
        self.cache = Cache(cache, cache_bytes, allow_pipe)
        self.tolerance = tolerance
        self.block = block
        self.classes = classes
        self.size = size
        self.field = field
        self.scale = scale
        self.factor = 1.0 if scale is None else scale
        self.layout: Layout | None = None  # of the first sample, then required of all
        self._resumed: ReaderAssignment | None = None
        self._empty: set[str] = set()  # shards without samples, of those opened so far
        self._reported: set[str] = set()  # shards whose unread members were logged

    def __repr__(self) -> str:
        return self.urls[0]

    def assign_readers(self, count: int) -> ReaderAssignment:
        """Return the assignment of shards with which a number of readers begins."""
        if self._resumed:
            return self._resumed.reassign(count, self.block)
        return ReaderAssignment(initial_progress(count, self.block))

    def state(self, assignment: ReaderAssignment) -> dict[str, Any]:
        """Return what `resume` needs, as plain values."""
        # The shards are identified by name: they may lie in another folder later.
        names = [url.rpartition("/")[2] for url in self.urls]
        checksum = digest(canonical(names))
        return {"shards": len(self.urls), "names": checksum, **asdict(assignment)}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned.

        Raises:
            ValueError: it is the state of other shards.
        """
        self._resumed = restore_assignment(state)
        if self.state(self._resumed)["names"] != state["names"]:
            raise ValueError(
                "data.source.urls: the run began with other shards or another order of them "
                f"({state['shards']} shards then, {len(self.urls)} now); give the same urls"
            )

    @property
    def manifest(self) -> dict[str, Any]:
        """The kind of the samples and the names of their classes."""
        if not self.layout:
            self.sample()
        assert self.layout
        return {
            "kind": "images" if self.layout.images else "latents",
            "classes": [str(i) for i in range(self.classes)],
        }

    def sample(self) -> Batch:
        """Return the first sample of the first shard with samples: it shows shape and kind of all.

        Raises:
            ValueError: no shard has a readable sample, or latents do not have unit variance.
        """
        for shard in range(len(self.urls)):
            tar = self._open_tar(shard)
            samples = []
            for i in range(len(tar)):
                sample = self._read(tar, i)
                if sample is not None:
                    samples.append(sample)
                if len(samples) == SCALE_LATENTS or (samples and tar.images):
                    break
            if samples:
                batch = self._batch(samples)
                if batch.latent and self.scale is None:
                    check_unit_variance(tar.url, batch.x.std(correction=0).item())
                return self._batch(samples[:1])
        raise ValueError(f"{self.urls[0]}: no samples in it, nor in any other shard")

    def read_batches(
        self, seed: int, reader: int, readers: int, requests: Iterator[Request]
    ) -> Iterator[Batch]:
        stream = self._samples(seed, self.assign_readers(readers), reader)
        for request in requests:
            samples = []
            for _ in range(request.samples):
                sample, progress = next(stream)
                samples.append(sample)
            yield replace(self._batch(samples), reader=reader, progress=progress)

    def _samples(
        self, seed: int, assignment: ReaderAssignment, reader: int
    ) -> Iterator[tuple[Sample, Progress]]:
        """Yield the samples of a reader, each with the reader's progress after it."""
        finished, passed, *skipped = assignment.progress[reader]
        for first, tars in self._blocks(seed, assignment, reader):
            # Shuffle the block, and leave out what was read before the run resumed.
            for tar, count in zip(tars, skipped):
                tar.skipped = count
            self._check_not_all_empty(tars)
            ends = np.cumsum([len(tar) for tar in tars])
            shuffled = permutation(int(ends[-1]), seed, first, 1)
            order = shuffled[passed:].tolist()

            # Read the samples. The last readable one is held back: with it the block is finished,
            # whatever unreadable samples follow it.
            held: tuple[Sample, Progress] | None = None
            for position, entry in enumerate(order, passed + 1):
                number = int(np.searchsorted(ends, entry, side="right"))
                from_end = entry - int(ends[number])  # negative: counted from the end of its tar
                sample = self._read(tars[number], from_end)
                if sample is None:
                    continue
                if held:
                    yield held
                unreadable = [tar.skipped for tar in tars]
                held = sample, (finished, position, *unreadable)

            # Go on to the next block.
            for tar in tars:
                tar.report()
            finished += 1
            passed = 0
            skipped = [0] * self.block
            if held:
                yield held[0], (finished, passed, *skipped)

    def _check_not_all_empty(self, tars: list[Tar]) -> None:
        """Check that there are shards with samples: without any, reading would never end."""
        self._empty.update(tar.url for tar in tars if not len(tar))
        if len(self._empty) == len(set(self.urls)):
            raise ValueError(f"{tars[0].url}: no samples in it, nor in any other shard")

    def _blocks(
        self, seed: int, assignment: ReaderAssignment, reader: int
    ) -> Iterator[tuple[int, list[Tar]]]:
        """Yield (first ticket, tars) of each block of a reader, and download the next meanwhile."""
        number = assignment.progress[reader][0]
        tickets = assignment.tickets(reader, number)
        download = start_in_thread(self._open_tars, seed, tickets)
        while True:
            tars = download.result()
            number += 1
            following = assignment.tickets(reader, number)
            download = start_in_thread(self._open_tars, seed, following)
            yield tickets[0], tars
            tickets = following

    def _open_tars(self, seed: int, tickets: list[int]) -> list[Tar]:
        shards = len(self.urls)
        tars = []
        for ticket in tickets:
            epoch, position = divmod(ticket, shards)
            shard = int(permutation(shards, seed, epoch, 0)[position])
            tars.append(self._open_tar(shard))
        return tars

    def _open_tar(self, shard: int) -> Tar:
        url = self.urls[shard]
        with self.cache.open(url) as file:
            try:
                tar = Tar(file, url, self.tolerance, self.field, self.classes > 0)
            except ValueError:
                # It may be repaired at its origin before the next run.
                self.cache.forget(url)
                raise
        if tar.passed_over and url not in self._reported:
            self._reported.add(url)
            log.info("%s: passed over %s", url, describe_passed_over(tar.passed_over))
        return tar

    def _read(self, tar: Tar, i: int) -> Sample | None:
        """Return a sample, or None if it is unreadable, which is counted."""
        key, spans = tar.samples[i]
        fields = {}
        for field, (start, length) in spans.items():
            fields[field] = tar.data[start:][:length]
        try:
            sample = self._decode(tar, key, fields)
        except Exception as error:  # Pillow and the parser of .npy headers raise many kinds
            if is_machine_fault(error):
                raise_named(error, f"{tar.url}: {key}")
            tar.skip(key, error)
            return None

        # The first sample determines what all others must be.
        layout = Layout(tar.images, sample.x.dtype, sample.x.shape)
        if self.layout is None:
            kind = "images" if layout.images else "latents"
            check_used(tar.url, kind, self.scale, self.pixel_options, self.size)
            self.layout = layout
        if layout.images != self.layout.images:
            kind = "images" if layout.images else "latents"
            raise ValueError(
                f"{tar.url}: holds {kind}, but other shards do not; read images and latents apart, "
                "or name the one to read with data.source.field"
            )
        if layout != self.layout:
            raise ValueError(
                f"{tar.url}: {key} is {layout.type} {layout.shape}, but other samples are "
                f"{self.layout.type} {self.layout.shape}; {ONE_LAYOUT[layout.images]}"
            )
        if self.classes and not 0 <= sample.label < self.classes:
            raise ValueError(
                f"{tar.url}: {key} has the class {sample.label}, but data.source.classes is "
                f"{self.classes}; set it to the number of classes"
            )
        return sample

    def _decode(self, tar: Tar, key: str, fields: dict[str, np.ndarray]) -> Sample:
        x = self._pixels(tar, key, fields) if tar.images else self._latent(fields)
        if not self.classes:
            return Sample(x, 0)
        return Sample(x, parse_label(fields[LABEL_FIELD]))

    def _latent(self, fields: dict[str, np.ndarray]) -> np.ndarray:
        """Return a latent in its own type, (C, H, W)."""
        return read_latent(fields[LATENT_FIELD], self.factor)

    def _pixels(self, tar: Tar, key: str, fields: dict[str, np.ndarray]) -> np.ndarray:
        """Return an image as uint8, (C, H, W)."""
        field = next(field for field in IMAGE_FIELDS if field in fields)
        name = f"{tar.url}: {key}"
        return read_image(fields[field], field, self.pixel_options, name, self.size)

    def _batch(self, samples: list[Sample]) -> Batch:
        assert self.layout
        x = torch.from_numpy(np.stack([sample.x for sample in samples])).float()
        x = x / 127.5 - 1 if self.layout.images else x * self.factor
        condition = None
        if self.classes:
            condition = torch.tensor([sample.label for sample in samples])
        return Batch(x, latent=not self.layout.images, condition=condition)


def start_in_thread(call: Callable[..., list[Tar]], *args: Any) -> Future[list[Tar]]:
    """Start a call in a daemon thread, which does not delay the end of the process."""
    future: Future[list[Tar]] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:  # raised where the result is used
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
