"""Reading sets in O(1) by offset, through memory maps, a whole batch in one strided copy.

A shard and its offsets are verified when it is first opened, or every sample whenever it is read (`verify`).
"""

import mmap
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import xxhash
from numpy.lib.stride_tricks import as_strided

from data.cache import Cache
from data.files import naming, parse_sealed
from data.shards.manifest import read_manifest
from data.shards.write import BLOCK, split_name

OPEN = 64  # shards kept mapped at once: a map holds a file descriptor


@lru_cache(maxsize=64)
def _header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Parse an .npy header, once for all samples that share it."""
    import ast

    fields = ast.literal_eval(header.decode("latin1"))
    dtype = np.dtype(fields["descr"])
    if dtype.hasobject or fields["fortran_order"]:
        raise ValueError(f"an array of {dtype} (Fortran order: {fields['fortran_order']}) is not read from shards")
    return dtype, fields["shape"]


def decode_arrays(data: np.ndarray) -> np.ndarray:
    """Return the arrays in .npy bytes with one common header, (B, n) uint8 -> (B, ...), without a copy."""
    raw = data[0, :10].tobytes()
    if raw[:6] != b"\x93NUMPY" or raw[6] != 1:
        raise ValueError("not an .npy array of version 1")
    start = 10 + int.from_bytes(raw[8:10], "little")
    if (data[:, :start] != data[0, :start]).any():
        raise ValueError("arrays of different shapes or types in one batch")
    dtype, shape = _header(data[0, 10:start].tobytes())
    return data[:, start:].view(dtype).reshape(len(data), *shape)


def decode_array(data: np.ndarray) -> np.ndarray:
    """Return the array in .npy bytes (uint8 view), without a copy."""
    return decode_arrays(data[None])[0]


def mapping(place: str, opened: BinaryIO, flags: int = 0) -> mmap.mmap:
    """Map a file into memory, to be read only, and close it."""
    with opened as file, naming(place):
        return mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED | flags, mmap.PROT_READ)


class Shard:
    """One mapped tar and its offsets.

    Args:
        tar: the file (a path, or a URL that is fetched into the cache), its offsets beside it.
        record: its entry in the manifest.
        verified: skip the checksums, which were compared before.
    """

    def __init__(self, tar: str, record: dict[str, Any], verified: bool):
        beside = f"{tar.removesuffix('.tar')}.npy"
        self.tar, self.fields = tar, {name: column for column, name in enumerate(record["fields"])}
        populate = 0 if verified else mmap.MAP_POPULATE  # all of it is about to be read
        places = ((tar, record["xxh3"]), (beside, record["offsets"]))
        mapped, index = (mapping(place, Cache().open(place, wanted), populate) for place, wanted in places)
        for (place, wanted), data in () if verified else zip(places, (mapped, index)):
            if xxhash.xxh3_128_hexdigest(data) != wanted:
                Cache().forget(place, wanted)  # a fetched one is fetched anew by the next run
                raise ValueError(f"{place}: its checksum is not the manifest's; restore it or make the set again")
        with naming(beside):
            self.data, self.offsets = np.frombuffer(mapped, np.uint8), decode_array(np.frombuffer(index, np.uint8))
        if self.offsets.shape != (record["count"], len(self.fields), 3) or self.offsets.dtype != np.int64:
            raise ValueError(f"{beside}: offsets {self.offsets.dtype} {self.offsets.shape} do not fit the manifest")
        starts, lengths, _ = np.moveaxis(self.offsets, -1, 0)
        there, limit = lengths >= 0, len(self.data) - BLOCK
        outside = (starts % BLOCK > 0) | (starts < BLOCK) | (starts > limit) | (lengths > limit - starts)
        if outside[there].any() or not there.any(1).all():
            raise ValueError(f"{beside}: its offsets do not fit {record['name']}; make the set again")
        self.shortest, self.longest = lengths.min(0).tolist(), lengths.max(0).tolist()
        self._views: dict[int, np.ndarray] = {}

    def gather(self, field: str, rows: np.ndarray, verify: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return a field's bytes of some rows, (B, longest), and their lengths (B,): one strided copy.

        Members of a tar begin at multiples of 512, so that they are rows of a strided view.
        """
        if field not in self.fields:
            raise ValueError(f"{self.tar}: has no .{field}, only {', '.join(self.fields)}")
        column = self.fields[field]
        starts, lengths, sums = self.offsets[rows, column].T
        shortest, longest = self.shortest[column], self.longest[column]
        if shortest < 0 or (longest > BLOCK and shortest < longest):
            raise ValueError(f"{self.tar}: .{field} is missing in some samples, or has several lengths; they make no batch")
        data = self._windows(longest)[starts // BLOCK]
        for row, length, wanted in zip(data, lengths, sums.view(np.uint64)) if verify else ():
            self._verify(row[:length], wanted)
        return data, lengths

    def _windows(self, width: int) -> np.ndarray:
        if width not in self._views:
            shape = (len(self.data) - width) // BLOCK + 1, width
            self._views[width] = as_strided(self.data, shape, (BLOCK, 1), writeable=False)
        return self._views[width]

    def sample(self, row: int, verify: bool) -> dict[str, Any]:
        """Return {"__key__": name, field: uint8 view} of one row."""
        spans = self.offsets[row].tolist()
        header = max(span[0] for span in spans) - BLOCK  # of any field that is there: the name stands first
        name = bytes(self.data[header : header + 100]).partition(b"\0")[0].decode(errors="replace")
        sample: dict[str, Any] = {"__key__": (split_name(name) or (name, ""))[0]}
        for field, (start, length, wanted) in zip(self.fields, spans):
            if start >= 0:
                sample[field] = self.data[start : start + length]
                if verify:
                    self._verify(sample[field], wanted % 2**64)
        return sample

    def _verify(self, data: np.ndarray, wanted: int) -> None:
        if xxhash.xxh3_64_intdigest(data.data) != wanted:
            raise ValueError(f"{self.tar}: a sample's checksum is not the recorded one; restore it or make the set again")


class ShardReader:
    """Random access to a finished set: `len(reader)`, `reader[i] -> {"__key__": name, field: uint8 view}`.

    Args:
        folder: the set, or its URL (s3, gs, hf, http, https): a shard is fetched into the cache when it is first opened.
        kind: refuse a set of another kind.
        verify: compare checksums of a shard when it is first opened, or also of every sample when it is read.
    """

    def __init__(self, folder: str | Path, kind: str | None = None, verify: Literal["open", "read"] = "open"):
        self.folder, self.verify = str(folder).rstrip("/"), verify == "read"
        self.manifest = read_manifest(folder, kind)
        self.ends: list[int] = np.cumsum([shard["count"] for shard in self.manifest["shards"]]).tolist()
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.ends[-1]:
            raise IndexError(f"{self.folder}: index {i} outside [0, {len(self)})")
        number = bisect_right(self.ends, i)
        shard = self._shard(number)
        return shard.sample(i - self.ends[number] + len(shard.offsets), self.verify)

    def arrays(self, field: str, indices: np.ndarray) -> np.ndarray:
        """Return the .npy arrays of a field at these indices, in this order, (B, ...)."""

        def decode(shard: Shard, rows: np.ndarray) -> np.ndarray:
            with naming(shard.tar):
                return decode_arrays(shard.gather(field, rows, self.verify)[0])

        return self._together(indices, decode)

    def numbers(self, field: str, indices: np.ndarray) -> np.ndarray:
        """Return the whole numbers written as text in a field at these indices, (B,) int64."""

        def parse(shard: Shard, rows: np.ndarray) -> np.ndarray:
            data, lengths = shard.gather(field, rows, self.verify)
            text = np.where(np.arange(data.shape[1]) < lengths[:, None], data, 0).astype(np.uint8)
            if not (((text >= ord("0")) & (text <= ord("9"))) == (text > 0)).all() or not lengths.all():
                raise ValueError(f"{shard.tar}: .{field} is not a whole number in every sample")
            return text.view(f"S{data.shape[1]}")[:, 0].astype(np.int64)

        return self._together(indices, parse)

    def record(self, number: int) -> dict[str, Any]:
        """Return a shard's own record, the file beside it, which may say more than the manifest.

        Raises:
            ValueError: it is damaged, or another shard's.
        """
        entry = self.manifest["shards"][number]
        place = f"{self.folder}/{entry['name'].removesuffix('.tar')}.json"
        record = parse_sealed(Cache().read(place), place)
        if record.get("sha256") != entry["sha256"]:
            raise ValueError(f"{place}: is not the record of the shard in the manifest; restore it or make the set again")
        return record

    def _together(self, indices: np.ndarray, read: Callable[[Shard, np.ndarray], np.ndarray]) -> np.ndarray:
        """Read from each shard at once, and put the parts back into the order of the indices."""
        if len(indices) == 0 or indices.min() < 0 or indices.max() >= self.ends[-1]:
            raise IndexError(f"{self.folder}: no indices, or some outside [0, {len(self)})")
        numbers = np.searchsorted(self.ends, indices, side="right")
        if numbers[0] == numbers[-1] and (numbers == numbers[0]).all():
            shard = self._shard(int(numbers[0]))
            return read(shard, indices - self.ends[numbers[0]] + len(shard.offsets))
        out, order = None, np.argsort(numbers, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            number = int(numbers[places[0]])
            shard = self._shard(number)
            part = read(shard, indices[places] - self.ends[number] + len(shard.offsets))
            out = np.empty((len(indices), *part.shape[1:]), part.dtype) if out is None else out
            if out.shape[1:] != part.shape[1:] or out.dtype != part.dtype:
                raise ValueError(f"{shard.tar}: holds {part.dtype} {part.shape[1:]}, other shards {out.dtype} {out.shape[1:]}")
            out[places] = part
        assert out is not None
        return out

    def _shard(self, number: int) -> Shard:
        """Return a mapped shard; the least recently used ones are let go."""
        if number not in self._open:
            record = self.manifest["shards"][number]
            self._open[number] = Shard(f"{self.folder}/{record['name']}", record, number in self._verified)
            self._verified.add(number)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # workers map the files themselves
