"""Webdataset tars without a manifest, local or remote, read sequentially: for very large sets."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand
from PIL import Image

from data.batch import Batch, BatchStream
from data.cache import Cache, parse_scheme
from data.files import canonical, digest
from data.images import IMAGE_FIELDS, IMAGE_FORMATS, fit_image
from data.noise import permutation
from data.reader_assignment import (
    Progress,
    ReaderAssignment,
    initial_progress,
    restore_assignment,
)
from data.shards import npy_to_array
from data.tars import LABEL_FIELD, LATENT_FIELD, Tar


class Sample(NamedTuple):
    """One sample of a tar."""

    x: np.ndarray  # pixels (uint8) or latent (float32), (C, H, W)
    label: int  # 0 if no classes are read


class Layout(NamedTuple):
    """What all samples of a set have in common."""

    images: bool  # otherwise latents
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
    ):
        if not 0 <= tolerance < 1 or block < 1 or classes < 0:
            raise ValueError(
                f"SequentialTars: tolerance ({tolerance}) must be in [0, 1), block ({block}) "
                f"at least 1 and classes ({classes}) at least 0"
            )

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
        self.grey = grey
        self.layout: Layout | None = None  # of the first sample, then required of all
        self._resumed: ReaderAssignment | None = None

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
        """Return the first sample of the first shard, which shows the shape and kind of all."""
        tar = self._open_tar(0)
        for i in range(len(tar)):
            sample = self._read(tar, i)
            if sample is not None:
                return self._batch([sample])
        raise ValueError(f"{tar.url}: no readable sample; repair or leave out that shard")

    def read_batches(
        self, seed: int, reader: int, readers: int, requests: Iterator[tuple[int, int]]
    ) -> Iterator[Batch]:
        stream = self._samples(seed, self.assign_readers(readers), reader)
        for _, count in requests:
            samples = []
            for _ in range(count):
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
                return Tar(file, url, self.tolerance)
            except ValueError:
                # It may be repaired at its origin before the next run.
                self.cache.forget(url)
                raise

    def _read(self, tar: Tar, i: int) -> Sample | None:
        """Return a sample, or None if it is unreadable, which is counted."""
        key, spans = tar.samples[i]
        fields = {}
        for field, (start, length) in spans.items():
            fields[field] = tar.data[start:][:length]
        try:
            sample = self._decode(tar, fields)
        except Exception as error:  # Pillow and the parser of .npy headers raise many kinds
            tar.skip(key, error)
            return None

        # The first sample determines what all others must be.
        layout = Layout(tar.images, sample.x.shape)
        self.layout = self.layout or layout
        if layout != self.layout:
            raise ValueError(
                f"{tar.url}: {key} has the shape {layout.shape}, but other samples "
                f"{self.layout.shape}; data.source.size scales images to one size"
            )
        if self.classes and not 0 <= sample.label < self.classes:
            raise ValueError(
                f"{tar.url}: {key} has the class {sample.label}, but data.source.classes is "
                f"{self.classes}; set it to the number of classes"
            )
        return sample

    def _decode(self, tar: Tar, fields: dict[str, np.ndarray]) -> Sample:
        x = self._pixels(fields) if tar.images else read_latent(fields[LATENT_FIELD])
        if not self.classes:
            return Sample(x, 0)
        if LABEL_FIELD not in fields:
            raise ValueError(f"no .{LABEL_FIELD}; set data.source.classes to 0 to read no classes")
        return Sample(x, int(fields[LABEL_FIELD].tobytes()))

    def _pixels(self, fields: dict[str, np.ndarray]) -> np.ndarray:
        """Return an image as uint8, (C, H, W)."""
        data = next(fields[field] for field in IMAGE_FIELDS if field in fields)
        image: Image.Image = Image.open(io.BytesIO(data.tobytes()), formats=IMAGE_FORMATS)
        if self.size:
            image = fit_image(image, self.size, self.grey)
        else:
            image = image.convert("L" if self.grey else "RGB")
        pixels = np.asarray(image)
        return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)

    def _batch(self, samples: list[Sample]) -> Batch:
        assert self.layout
        x = torch.from_numpy(np.stack([sample.x for sample in samples]))
        if self.layout.images:
            x = x.float() / 127.5 - 1
        condition = None
        if self.classes:
            condition = torch.tensor([sample.label for sample in samples])
        return Batch(x, latent=not self.layout.images, condition=condition)


def read_latent(data: np.ndarray) -> np.ndarray:
    """Return the latent in .npy bytes, (C, H, W) float32.

    Raises:
        ValueError: it is not an array of finite floats with three axes.
    """
    array = npy_to_array(data)
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(
            f"an array of {array.dtype} and shape {array.shape}; "
            "a latent is floats of shape (channels, height, width)"
        )
    if not np.isfinite(array).all():
        raise ValueError("a latent that is not finite")
    return array.astype(np.float32)


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
