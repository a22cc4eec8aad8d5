"""Reading sets by offset through memory maps, a batch in one strided copy.

A shard and its offsets are verified when the shard is first opened, or each sample when it is read.
"""

import ast
import io
import math
import mmap
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.lib.stride_tricks import as_strided

from data.cache import Cache
from data.files import checksum, errors_named, parse_checksummed_json, sample_checksum
from data.shards.manifest import read_manifest
from data.shards.scan import TAR_BLOCK, split_name

MAX_OPEN_SHARDS = 64  # each holds two file descriptors
LONG_NAME_TYPES = b"Lx"  # of members with the name of the next one: GNU's and PAX's
LONG_NAME_BLOCKS = 10  # up to which such a member is recognised, with its header
POSIX_MAGIC = b"ustar\0"  # GNU's differs, and has other fields where the prefix is


@lru_cache(maxsize=64)
def _parse_header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Parse an .npy header, once for all samples that share it."""
    fields = ast.literal_eval(header.decode("latin1"))
    dtype = np.dtype(fields["descr"])
    fortran = fields["fortran_order"]
    if dtype.hasobject or fortran:
        raise ValueError(
            f"an array of {dtype} (Fortran order: {fortran}) cannot be read from shards; "
            "only plain types in C order can"
        )
    return dtype, fields["shape"]


def npy_to_arrays(data: np.ndarray) -> np.ndarray:
    """Return the arrays in .npy bytes with one common header, without a copy.

    Args:
        data: .npy bytes of each sample, (B, n) uint8.

    Returns:
        The arrays, (B, ...).
    """
    raw = data[0, :10].tobytes()
    if raw[:6] != b"\x93NUMPY" or raw[6] != 1:
        raise ValueError("not an .npy array of version 1")
    start = 10 + int.from_bytes(raw[8:10], "little")
    if (data[:, :start] != data[0, :start]).any():
        raise ValueError("arrays of different shapes or types in one batch")
    dtype, shape = _parse_header(data[0, 10:start].tobytes())
    size = dtype.itemsize * math.prod(shape)
    if data.shape[1] - start != size:
        raise ValueError(
            f"an array of {dtype} {shape} has {size} bytes, not {data.shape[1] - start}"
        )
    return data[:, start:].view(dtype).reshape(len(data), *shape)


def npy_to_array(data: np.ndarray) -> np.ndarray:
    """Return the array in .npy bytes (uint8), without a copy."""
    return npy_to_arrays(data[None])[0]


def map_file(name: str, file: BinaryIO, flags: int = 0) -> mmap.mmap:
    """Map a file into memory for reading, and close it."""
    with file, errors_named(name):
        return mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED | flags, mmap.PROT_READ)


class Shard:
    """One mapped tar and its offsets.

    Args:
        tar: the file, or its URL; its offsets are beside it. Remote files go through the cache.
        record: its entry in the manifest.
        verified: skip the checksums, which were compared before.

    Raises:
        ValueError: a checksum differs, or the offsets do not fit the tar.
    """

    def __init__(self, tar: str, record: dict[str, Any], verified: bool):
        self.tar = tar
        self.fields = {field: column for column, field in enumerate(record["fields"])}
        self._views: dict[int, np.ndarray] = {}

        # Map both files. If they are not verified yet, all their bytes are about to be read.
        offsets_path = f"{tar.removesuffix('.tar')}.npy"
        populate = 0 if verified else mmap.MAP_POPULATE
        tar_map = map_file(tar, Cache().open(tar, record["xxh3"]), populate)
        offsets_file = Cache().open(offsets_path, record["offsets"])
        offsets_map = map_file(offsets_path, offsets_file, populate)
        if not verified:
            _check_map(tar, tar_map, record["xxh3"])
            _check_map(offsets_path, offsets_map, record["offsets"])

        # Read the offsets.
        with errors_named(offsets_path):
            self.data = np.frombuffer(tar_map, np.uint8)
            self.offsets = npy_to_array(np.frombuffer(offsets_map, np.uint8))
        expected = (record["count"], len(self.fields), 3)
        if self.offsets.shape != expected or self.offsets.dtype != np.int64:
            raise ValueError(
                f"{offsets_path}: the offsets are {self.offsets.dtype} {self.offsets.shape}, by "
                f"the manifest they must be int64 {expected}; make the set again"
            )
        self._check_offsets(offsets_path, record["name"])
        lengths = self.offsets[..., 1]
        self.shortest = lengths.min(0).tolist()
        self.longest = lengths.max(0).tolist()

    def _check_offsets(self, path: str, tar: str) -> None:
        """Check that all offsets lie in the tar, and that every sample has a field."""
        starts = self.offsets[..., 0]
        lengths = self.offsets[..., 1]
        present = lengths >= 0
        limit = len(self.data) - TAR_BLOCK
        outside = (starts % TAR_BLOCK > 0) | (starts < TAR_BLOCK) | (starts > limit)
        outside |= lengths > limit - starts
        if outside[present].any() or not present.any(1).all():
            raise ValueError(f"{path}: its offsets do not fit {tar}; make the set again")

    def gather(self, field: str, rows: np.ndarray, verify: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return a field of some samples: their bytes, (B, longest), and their lengths, (B,).

        Members of a tar begin at multiples of 512, so they are rows of one strided view, and
        the bytes are one copy.

        Args:
            field: name of the field.
            rows: of the offsets, one for each sample.
            verify: compare the checksum of each sample.
        """
        if field not in self.fields:
            raise ValueError(f"{self.tar}: has no .{field}, only {', '.join(self.fields)}")
        column = self.fields[field]
        shortest = self.shortest[column]
        longest = self.longest[column]
        if shortest < 0 or (longest > TAR_BLOCK and shortest < longest):
            raise ValueError(
                f"{self.tar}: .{field} is missing in some samples or differs in length; "
                "such samples cannot be joined to a batch"
            )
        starts, lengths, checksums = self.offsets[rows, column].T
        data = self._windows(longest)[starts // TAR_BLOCK]
        if verify:
            for bytes_, length, xxh3 in zip(data, lengths, checksums.view(np.uint64)):
                self._verify(bytes_[:length], xxh3)
        return data, lengths

    def content(self, field: str, row: int, verify: bool) -> bytes:
        """Return the bytes of a field of one sample, by its row of the offsets."""
        if field not in self.fields:
            raise ValueError(f"{self.tar}: has no .{field}, only {', '.join(self.fields)}")
        start, length, xxh3 = self.offsets[row, self.fields[field]].tolist()
        if start < 0:
            raise ValueError(f"{self.tar}: .{field} is missing in some samples")
        data = self.data[start : start + length]
        if verify:
            self._verify(data, xxh3 % 2**64)
        return data.tobytes()

    def _windows(self, width: int) -> np.ndarray:
        """Return a view of the tar with a row of `width` bytes from every multiple of 512."""
        if width not in self._views:
            rows = (len(self.data) - width) // TAR_BLOCK + 1
            view = as_strided(self.data, (rows, width), (TAR_BLOCK, 1), writeable=False)
            self._views[width] = view
        return self._views[width]

    def sample(self, row: int, verify: bool) -> dict[str, Any]:
        """Return {"__key__": name, field: uint8 view} of one sample, by its row of the offsets."""
        spans = self.offsets[row].tolist()

        # The name is in the header before any member that is present.
        name = _read_name(self.data, max(start for start, _, _ in spans) - TAR_BLOCK)
        split = split_name(name)
        sample: dict[str, Any] = {"__key__": split[0] if split else name}

        for field, (start, length, xxh3) in zip(self.fields, spans):
            if start >= 0:
                sample[field] = self.data[start : start + length]
                if verify:
                    self._verify(sample[field], xxh3 % 2**64)
        return sample

    def _verify(self, data: np.ndarray, xxh3: int) -> None:
        if sample_checksum(data.data) != xxh3:
            raise ValueError(
                f"{self.tar}: the checksum of a sample is not the recorded one; "
                "restore the shard or make the set again"
            )


def _read_name(data: np.ndarray, header: int) -> str:
    """Return the name of the member whose header begins at a byte of a tar.

    A name of more than 100 characters begins in the field `prefix`, or is in a member before it.
    """
    for blocks in range(2, LONG_NAME_BLOCKS):
        start = header - blocks * TAR_BLOCK
        if start >= 0 and data[start + 156] in LONG_NAME_TYPES:
            extended = data[start : header + TAR_BLOCK].tobytes() + bytes(2 * TAR_BLOCK)
            with (
                suppress(tarfile.TarError),
                tarfile.open(fileobj=io.BytesIO(extended), mode="r:") as tar,
            ):
                member = tar.next()
                if member and member.offset_data == (blocks + 1) * TAR_BLOCK:
                    return member.name
    block = data[header : header + TAR_BLOCK].tobytes()
    name, *_ = block[:100].partition(b"\0")
    prefix, *_ = block[345:500].partition(b"\0")
    if prefix and block[257:263] == POSIX_MAGIC:
        name = prefix + b"/" + name
    return name.decode(errors="replace")


def _check_map(path: str, mapped: mmap.mmap, xxh3: str) -> None:
    """Compare the checksum of a mapped file with the manifest's."""
    if checksum(memoryview(mapped)) != xxh3:
        Cache().forget(path, xxh3)  # so that the next run downloads it again
        raise ValueError(
            f"{path}: its checksum is not the manifest's; restore it or make the set again"
        )


class ShardReader:
    """Random access to a finished set.

    `len(reader)` is the number of samples, `reader[i]` is {"__key__": name, field: uint8 view}.

    Args:
        folder: the set, or its URL (s3, gs, hf, http, https). A remote shard is downloaded into the
            cache when it is first opened.
        kind: required kind of the samples.
        verify: compare the checksums of a shard when it is first opened ("open"), and of each
            sample too when it is read ("read").
    """

    def __init__(
        self, folder: str | Path, kind: str | None = None, verify: Literal["open", "read"] = "open"
    ):
        self.folder = str(folder).rstrip("/")
        self.verify = verify == "read"
        self.manifest = read_manifest(folder, kind)
        counts = [shard["count"] for shard in self.manifest["shards"]]
        self.ends: list[int] = np.cumsum(counts).tolist()
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()
        self._has_field: dict[str, bool] = {}  # of the fields that were looked up

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.ends[-1]:
            raise IndexError(f"{self.folder}: index {i} is outside [0, {len(self)})")
        number = bisect_right(self.ends, i)
        shard = self._shard(number)
        row = i - self.ends[number] + len(shard.offsets)
        return shard.sample(row, self.verify)

    def has_field(self, field: str) -> bool:
        """Return whether the samples of the set have a field. Empty shards do not count.

        Raises:
            ValueError: only some shards have it.
        """
        if field not in self._has_field:
            shards: dict[bool, str] = {}
            for shard in self.manifest["shards"]:
                if shard["count"]:
                    shards.setdefault(field in shard["fields"], shard["name"])
            if len(shards) > 1:
                raise ValueError(
                    f"{self.folder}: the samples of {shards[True]} have .{field}, those of "
                    f"{shards[False]} have none; add them, or leave out one kind"
                )
            self._has_field[field] = True in shards
        return self._has_field[field]

    def find_tar(self, i: int) -> str:
        """Return the path of the tar with sample i."""
        return f"{self.folder}/{self.manifest['shards'][bisect_right(self.ends, i)]['name']}"

    def arrays(self, field: str, indices: np.ndarray) -> np.ndarray:
        """Return the .npy arrays of a field at these indices, in this order, (B, ...)."""

        def decode(shard: Shard, rows: np.ndarray) -> np.ndarray:
            with errors_named(shard.tar):
                data, _ = shard.gather(field, rows, self.verify)
                return npy_to_arrays(data)

        return self._read(indices, decode)

    def numbers(self, field: str, indices: np.ndarray) -> np.ndarray:
        """Return the whole numbers that a field holds as text at these indices, (B,) int64.

        Blanks around a number are ignored, such as the newline that editors add.
        """

        def parse(shard: Shard, rows: np.ndarray) -> np.ndarray:
            data, lengths = shard.gather(field, rows, self.verify)
            width = data.shape[1]
            text = np.where(np.arange(width) < lengths[:, None], data, 0).astype(np.uint8)
            digits = (text >= ord("0")) & (text <= ord("9"))
            blanks = (text == ord(" ")) | ((text >= ord("\t")) & (text <= ord("\r")))
            if not ((digits | blanks) == (text > 0)).all() or not digits.any(1).all():
                raise ValueError(f"{shard.tar}: .{field} is not a whole number in every sample")
            with errors_named(f"{shard.tar}: .{field}"):
                return text.view(f"S{width}")[:, 0].astype(np.int64)

        return self._read(indices, parse)

    def contents(self, field: str, indices: np.ndarray) -> list[bytes]:
        """Return the bytes of a field at these indices, in this order; their lengths may differ."""
        found = []
        for i in indices.tolist():
            number = bisect_right(self.ends, i)
            shard = self._shard(number)
            row = i - self.ends[number] + len(shard.offsets)
            found.append(shard.content(field, row, self.verify))
        return found

    def record(self, number: int) -> dict[str, Any]:
        """Return the record beside a shard, which may hold more than its entry in the manifest.

        Raises:
            ValueError: it is damaged, or the record of another shard.
        """
        entry = self.manifest["shards"][number]
        path = f"{self.folder}/{entry['name'].removesuffix('.tar')}.json"
        record = parse_checksummed_json(Cache().read(path), path)
        if record.get("sha256") != entry["sha256"]:
            raise ValueError(
                f"{path}: is not the record of the shard in the manifest; "
                "restore it or make the set again"
            )
        return record

    def _read(
        self, indices: np.ndarray, read: Callable[[Shard, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Read from each shard once, and return the results in the order of the indices."""
        if len(indices) == 0 or indices.min() < 0 or indices.max() >= self.ends[-1]:
            raise IndexError(f"{self.folder}: no indices, or some are outside [0, {len(self)})")
        numbers = np.searchsorted(self.ends, indices, side="right")

        # All in one shard: nothing to put together.
        if numbers[0] == numbers[-1] and (numbers == numbers[0]).all():
            _, part = self._read_shard(int(numbers[0]), indices, read)
            return part

        # Group the indices by shard, and write the part of each shard where it belongs.
        out: np.ndarray | None = None
        by_shard = np.argsort(numbers, kind="stable")
        boundaries = np.flatnonzero(np.diff(numbers[by_shard])) + 1
        for positions in np.split(by_shard, boundaries):
            number = int(numbers[positions[0]])
            tar, part = self._read_shard(number, indices[positions], read)
            if out is None:
                out = np.empty((len(indices), *part.shape[1:]), part.dtype)
            if out.shape[1:] != part.shape[1:] or out.dtype != part.dtype:
                raise ValueError(
                    f"{tar}: holds {part.dtype} {part.shape[1:]}, "
                    f"but other shards {out.dtype} {out.shape[1:]}; make the set again"
                )
            out[positions] = part
        assert out is not None
        return out

    def _read_shard(
        self,
        number: int,
        indices: np.ndarray,
        read: Callable[[Shard, np.ndarray], np.ndarray],
    ) -> tuple[str, np.ndarray]:
        """Read samples of one shard by their global indices; return its name and the result."""
        shard = self._shard(number)
        rows = indices - self.ends[number] + len(shard.offsets)
        return shard.tar, read(shard, rows)

    def _shard(self, number: int) -> Shard:
        """Return a mapped shard, and close the least recently used one beyond the limit."""
        if number not in self._open:
            entry = self.manifest["shards"][number]
            tar = f"{self.folder}/{entry['name']}"
            self._open[number] = Shard(tar, entry, number in self._verified)
            self._verified.add(number)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # workers map the files themselves
