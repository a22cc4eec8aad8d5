"""Writing sets. Any process can make any shard, in any order and any number of times."""

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import TarWriter

from data.files import (
    atomic_file,
    canonical,
    digest,
    file_checksum,
    file_digest,
    read_json,
    remove_leftovers,
    sample_checksum,
    write_json,
)
from data.schema import find_difference, shorten
from data.shards.manifest import FORMAT, read_record

TAR_BLOCK = 512  # bytes; headers and members of a tar begin at multiples of it
ONLY_IN_RECORDS = ("stamp", "distances")  # keys of a shard's record that the manifest leaves out
Span = tuple[int, int, int]  # of a member of a tar: start, length, xxh3 as int64


def array_to_npy(array: np.ndarray) -> bytes:
    """Return an array as .npy bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and field, as webdataset does; None if it has no field.

    The field begins after the first dot that follows the last slash.
    """
    found = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name)
    if found is None:
        return None
    return found[1], found[2]


def write_offsets(path: Path, offsets: np.ndarray) -> None:
    """Write the offsets of a shard."""
    with atomic_file(path) as file:
        file.write(array_to_npy(offsets))


def index_tar(path: Path) -> tuple[list[str], np.ndarray]:
    """Return the fields of a tar and its offsets, (samples, fields, 3) int64.

    The offsets are start, length and xxh3 of every member, -1 where a sample lacks the field.

    Raises:
        ValueError: the tar is damaged or has sparse members.
    """
    # Find the members of each sample.
    samples: dict[str, dict[str, Span]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            data = np.memmap(path, np.uint8, "r").data
            for member in tar:
                if member.issparse():
                    raise ValueError(
                        f"{path}: {member.name} is stored sparsely; "
                        "pack the tar again without --sparse"
                    )
                name = split_name(member.name) if member.isfile() else None
                if name:
                    key, field = name
                    samples.setdefault(key, {})[field] = _measure_member(path, member, data)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: not a complete tar ({error})") from None

    # Arrange their spans by sample and field.
    fields = sorted({field for sample in samples.values() for field in sample})
    offsets = np.full((len(samples), len(fields), 3), -1, dtype=np.int64)
    for row, sample in enumerate(samples.values()):
        for field, span in sample.items():
            offsets[row, fields.index(field)] = span
    return fields, offsets


def _measure_member(path: Path, member: tarfile.TarInfo, data: memoryview) -> Span:
    """Return the span of a member, and check that the end of the archive can follow it."""
    start = member.offset_data
    size = member.size
    blocks = -(-size // TAR_BLOCK)
    if start + blocks * TAR_BLOCK > len(data) - TAR_BLOCK:
        raise ValueError(f"{path}: truncated: no end of the archive follows {member.name}")
    xxh3 = np.uint64(sample_checksum(data[start : start + size]))
    return start, size, int(xxh3.view(np.int64))


def describe_shard(tar: Path, fields: list[str], offsets: np.ndarray) -> dict[str, Any]:
    """Return the record of a finished shard.

    It has the shard's size, its identity (sha256) and what is verified on reading (xxh3).
    """
    return {
        "count": len(offsets),
        "bytes": tar.stat().st_size,
        "fields": fields,
        "sha256": file_digest(tar),
        "xxh3": file_checksum(tar),
        "offsets": file_checksum(tar.with_suffix(".npy")),
    }


class ShardWriter:
    """Writes a set shard by shard, and skips finished shards.

    The same arguments give the same bytes.

    Args:
        folder: where the set is written.
        kind: what the samples are: images, latents or pairs.
        provenance: plain values that identify the origin of the samples.
        count: number of indices in the set.
        shard: indices in one shard.

    Raises:
        ValueError: the set or a shard would be empty, or the folder was begun with another plan.
    """

    def __init__(
        self, folder: str | Path, kind: str, provenance: dict[str, Any], count: int, shard: int
    ):
        if count < 1 or shard < 1:
            raise ValueError(
                f"{folder}: a set needs at least one sample, and one per shard; "
                f"got {count} samples and {shard} per shard"
            )
        self.folder = Path(folder)
        self.count = count
        self.shard = shard
        self.plan = {"format": FORMAT, "kind": kind, "count": count, "shard": shard, **provenance}
        self.stamp = digest(canonical(self.plan))
        path = self.folder / "plan.json"
        if path.exists():
            self._check_same_plan(read_json(path))
        else:
            write_json(path, self.plan)

    def _check_same_plan(self, begun: dict[str, Any]) -> None:
        """Check that the set in the folder was begun with this plan."""
        # the format first: sets of other formats may differ in everything
        for key in [*self.plan, *sorted(begun.keys() - self.plan.keys())]:
            before = begun.get(key)
            now = self.plan.get(key)
            if before != now:
                found = find_difference(key, before, now)
                raise ValueError(
                    f"{self.folder}: holds another set, with {found.key} {shorten(found.before)} "
                    f"instead of {shorten(found.now)}; choose another folder or delete this one"
                )

    def numbers(self) -> range:
        """Return the numbers of all shards."""
        return range(-(-self.count // self.shard))

    def indices(self, number: int) -> range:
        """Return the global indices of a shard."""
        return range(number * self.shard, min(self.count, (number + 1) * self.shard))

    def finished(self, number: int) -> dict[str, Any] | None:
        """Return the record of a finished shard; None if it is missing or was damaged since."""
        record = read_record(self._path(number, "json"))
        if record is None or record.get("stamp") != self.stamp:
            return None
        if not self._path(number, "npy").exists():
            return None
        tar = self._path(number, "tar")
        if not tar.exists() or tar.stat().st_size != record["bytes"]:
            return None
        return record

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not finished."""
        return [number for number in self.numbers() if not self.finished(number)]

    def write(self, number: int, samples: Iterable[dict[str, Any]], **extra: Any) -> None:
        """Write one shard: the tar, its offsets, and last its record.

        Args:
            number: of the shard.
            samples: each is {"__key__": name, field: bytes}, with a name that is unique in the set.
            extra: plain values for the record.
        """
        try:
            self._write_files(number, samples, extra)
        except FileNotFoundError:
            # Another process may have made this shard too, finished the set and removed leftovers.
            if not self.finished(number):
                raise

    def _write_files(
        self, number: int, samples: Iterable[dict[str, Any]], extra: dict[str, Any]
    ) -> None:
        tar = self._path(number, "tar")
        with atomic_file(tar) as file, TarWriter(file, encoder=False, mtime=0.0) as writer:
            for sample in samples:
                writer.write(sample)
        fields, offsets = index_tar(tar)
        write_offsets(self._path(number, "npy"), offsets)
        record = describe_shard(tar, fields, offsets)
        write_json(self._path(number, "json"), {**record, "stamp": self.stamp, **extra})

    def finish(self, **extra: Any) -> bool:
        """Write the manifest if every shard is finished; return whether it was written.

        Any process may do so: all of them would write the same bytes.

        Args:
            extra: plain values for the manifest.
        """
        # Collect the records of all shards.
        shards = []
        samples = 0
        for number in self.numbers():
            record = self.finished(number)
            if record is None:
                return False
            shard = {"name": self._path(number, "tar").name, **record}
            for key in ONLY_IN_RECORDS:
                shard.pop(key, None)
            shards.append(shard)
            samples += shard["count"]

        # Write the manifest, then remove what killed processes left.
        manifest = {**self.plan, **extra, "samples": samples, "shards": shards}
        write_json(self.folder / "manifest.json", manifest)
        remove_leftovers(self.folder, "[0-9]*")
        return True

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"
