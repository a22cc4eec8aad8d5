"""Tars without our manifest, anywhere, read from front to back: for sets too large or too foreign to be indexed."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from threading import Thread
from typing import Any

import numpy as np
import torch
from braceexpand import braceexpand
from PIL import Image

from data.batch import Batch, Feed
from data.cache import Cache, scheme
from data.files import canonical, digest
from data.images import FIELDS, FORMATS, fit
from data.lanes import Lanes, fresh, restored
from data.noise import permutation
from data.shards import decode_array
from data.tars import LABEL, LATENT, Tar

Sample = tuple[np.ndarray, int]  # pixels (uint8) or latent (float32), (C, H, W); class
Row = tuple[int, ...]  # see Lanes


class Streamed(Feed):
    """Images or latents (.npy) in webdataset tars: paths, or URLs of s3, gs, hf, http(s), kept in a local cache.

    Every shard is read once an epoch, in an order that seed and epoch decide, by one of the reading processes. Resumed on the
    same number of them (ranks x data.workers) the sequence goes on exactly; on another, unfinished shards are begun anew.

    Args:
        urls: tars: one pattern with {000..127} in it, or a list of such.
        cache: folder of downloaded shards, shared by all processes of a machine; none is RECTIFY_CACHE, or ~/.cache/rectify.
        limit: GB that the cache keeps, beyond what is in use; none is RECTIFY_CACHE_GB, or 100.
        tolerance: fraction of a shard's samples, rounded up, that may be unreadable and are skipped; more is an error.
        block: shards that are downloaded and shuffled together; 1 shuffles within each shard.
        classes: number of classes that .cls numbers; 0 reads no classes.
        size: images are scaled and centre-cropped to so many pixels; none leaves them, and all must be of one size.
        grey: images have one channel instead of three.
        allow_pipe: run URLs of the form `pipe:COMMAND`, in a shell. Only for commands that you trust.
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
                f"Streamed: tolerance ({tolerance}) must lie in [0, 1), block ({block}) be at least 1 and classes ({classes}) "
                "not negative"
            )
        self.urls = [url for pattern in ([urls] if isinstance(urls, str) else urls) for url in braceexpand(pattern)]
        for url in self.urls:
            scheme(url, allow_pipe)
        if not self.urls:
            raise ValueError("Streamed: urls is empty; name at least one tar")
        self.cache = Cache(cache, None if limit is None else int(limit * 1e9), allow_pipe)
        self.tolerance, self.block, self.classes, self.size, self.grey = tolerance, block, classes, size, grey
        self.alike: tuple[bool, tuple[int, ...]] | None = None  # what all samples must be: images or not, and their shape
        self._begin: Lanes | None = None

    def __repr__(self) -> str:
        return self.urls[0]

    def lanes(self, count: int) -> Lanes:
        """Return where a number of lanes begin."""
        return self._begin.dealt(count, self.block) if self._begin else Lanes(fresh(count, self.block))

    def state(self, lanes: Lanes) -> dict[str, Any]:
        """Return what `resume` needs, as plain values."""
        names = digest(canonical([url.rpartition("/")[2] for url in self.urls]))  # wherever they lie
        return {"shards": len(self.urls), "names": names, **asdict(lanes)}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on where `state` says.

        Raises:
            ValueError: it is a state of other shards.
        """
        self._begin = restored(state)
        if self.state(self._begin)["names"] != state["names"]:
            raise ValueError(
                f"data.source.urls: the run was begun with other shards, or in another order ({state['shards']} then, "
                f"{len(self.urls)} now); give the same"
            )

    @property
    def manifest(self) -> dict[str, Any]:
        """What is known of the samples: their kind and the names of their classes."""
        if not self.alike:
            self.sample()
        assert self.alike
        return {"kind": "images" if self.alike[0] else "latents", "classes": [str(i) for i in range(self.classes)]}

    def sample(self) -> Batch:
        """Return the first sample of the first shard, to tell what they are like."""
        tar = self._tar(0)
        return self._batch([next(found for i in range(len(tar)) if (found := self._read(tar, i)))])

    def walk(self, seed: int, lane: int, lanes: int, places: Iterator[tuple[int, int]]) -> Iterator[Batch]:
        samples = self._samples(seed, self.lanes(lanes), lane)
        for _, count in places:
            taken = [next(samples) for _ in range(count)]
            batch = self._batch([sample for sample, _ in taken])
            batch.place = (lane, *taken[-1][1])
            yield batch

    def _samples(self, seed: int, lanes: Lanes, lane: int) -> Iterator[tuple[Sample, Row]]:
        """Yield a lane's samples, each with the lane's row once it is taken."""
        finished, begun, *skipped = lanes.rows[lane]
        for first, tars in self._blocks(seed, lanes, lane):
            for tar, count in zip(tars, skipped):
                tar.skipped = count
            ends = np.cumsum([len(tar) for tar in tars])
            held: tuple[Sample, Row] | None = None  # a block's last sample ends it, however many unreadable ones follow
            for at, entry in enumerate(permutation(int(ends[-1]), seed, first, 1)[begun:].tolist(), begun + 1):
                which = int(np.searchsorted(ends, entry, side="right"))
                if (sample := self._read(tars[which], entry - int(ends[which]))) is None:  # counted from its tar's end
                    continue
                if held:
                    yield held
                held = sample, (finished, at, *(tar.skipped for tar in tars))
            for tar in tars:
                tar.report()
            finished, begun, skipped = finished + 1, 0, [0] * self.block
            if held:
                yield held[0], (finished, begun, *skipped)

    def _blocks(self, seed: int, lanes: Lanes, lane: int) -> Iterator[tuple[int, list[Tar]]]:
        """Yield (first ticket, tars) of a lane's blocks; while one is read, the next is downloaded."""
        number = lanes.rows[lane][0]
        coming = _begun(self._open, seed, lanes.tickets(lane, number))
        while True:
            tars = coming.result()
            coming = _begun(self._open, seed, lanes.tickets(lane, number + 1))
            yield lanes.tickets(lane, number)[0], tars
            number += 1

    def _open(self, seed: int, tickets: list[int]) -> list[Tar]:
        shards = len(self.urls)
        return [self._tar(int(permutation(shards, seed, k // shards, 0)[k % shards])) for k in tickets]

    def _tar(self, shard: int) -> Tar:
        url = self.urls[shard]
        with self.cache.open(url) as file:
            try:
                return Tar(file, url, self.tolerance)
            except ValueError:
                self.cache.forget(url)  # it may be mended there by the next run
                raise

    def _read(self, tar: Tar, i: int) -> Sample | None:
        """Return a sample, or count it as unreadable."""
        key, spans = tar.samples[i]
        fields = {field: tar.data[start:][:length] for field, (start, length) in spans.items()}
        try:
            x = self._pixels(fields) if tar.images else latent(fields[LATENT])
            if self.classes and LABEL not in fields:
                raise ValueError(f"no .{LABEL}; set data.source.classes to 0 to read none")
            klass = int(fields[LABEL].tobytes()) if self.classes else 0
        except Exception as error:  # Pillow raises many kinds on broken files, the .npy header's parser too
            tar.skip(key, error)
            return None
        here = (tar.images, x.shape)
        self.alike = self.alike or here
        if here != self.alike:
            (_, shape), (_, found) = self.alike, here
            raise ValueError(f"{tar.url}: {key} is {found}, others are {shape}; data.source.size scales images to one size")
        if self.classes and not 0 <= klass < self.classes:
            raise ValueError(f"{tar.url}: {key} is of class {klass}, data.source.classes is {self.classes}")
        return x, klass

    def _pixels(self, fields: dict[str, np.ndarray]) -> np.ndarray:
        """Return an image as uint8, (C, H, W)."""
        data = next(fields[field] for field in FIELDS if field in fields)
        image = Image.open(io.BytesIO(data.tobytes()), formats=FORMATS)
        pixels = np.asarray(fit(image, self.size, self.grey) if self.size else image.convert("L" if self.grey else "RGB"))
        return pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)

    def _batch(self, samples: list[Sample]) -> Batch:
        assert self.alike
        x = torch.from_numpy(np.stack([x for x, _ in samples]))
        classes = torch.tensor([klass for _, klass in samples]) if self.classes else None
        return Batch(x.float() / 127.5 - 1 if self.alike[0] else x, latent=not self.alike[0], condition=classes)


def latent(data: np.ndarray) -> np.ndarray:
    """Return the latent in .npy bytes, (C, H, W), float32."""
    array = decode_array(data)
    if array.ndim != 3 or array.dtype.kind != "f":
        raise ValueError(f"an array of {array.dtype} and shape {array.shape}, wanted floats of (channels, height, width)")
    if not np.isfinite(array).all():
        raise ValueError("a latent that is not finite")
    return array.astype(np.float32)


def _begun(call: Callable[..., list[Tar]], *args: Any) -> Future[list[Tar]]:
    """Call in a thread that does not hold up the end of the process."""
    future: Future[list[Tar]] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:  # raised where the result is wanted
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
