"""Writing sets: every shard is a unit of work that can be done by anyone, in any order, any number of times."""

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from webdataset import TarWriter

from data.files import atomic, canonical, checksum, digest, file_digest, read_json, sweep, write_json
from data.shards.manifest import FORMAT, read_record

BLOCK = 512  # of a tar: headers and members begin at its multiples
OWN = ("stamp", "distances")  # of a shard's record: the manifest does without


def encode_array(array: np.ndarray) -> bytes:
    """Return an array as .npy bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, field) of a member's name, as webdataset splits it: at the first dot after the last slash."""
    found = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name)
    return (found[1], found[2]) if found else None


def write_offsets(path: Path, offsets: np.ndarray) -> None:
    """Write a shard's offsets."""
    with atomic(path) as file:
        file.write(encode_array(offsets))


def index_tar(path: Path) -> tuple[list[str], np.ndarray]:
    """Return a tar's fields, and (samples, fields, 3) int64: start, length, xxh3 of every member; -1 where absent."""
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            data = np.memmap(path, np.uint8, "r").data
            for member in tar:
                if member.issparse():
                    raise ValueError(f"{path}: {member.name} is stored sparsely; pack the tar again without --sparse")
                if member.isfile() and (name := split_name(member.name)):
                    start, size = member.offset_data, member.size
                    if start + -(-size // BLOCK) * BLOCK > len(data) - BLOCK:
                        raise ValueError(f"{path}: truncated: no end of the archive follows {member.name}")
                    sum64 = np.uint64(xxhash.xxh3_64_intdigest(data[start : start + size])).view(np.int64)
                    samples.setdefault(name[0], {})[name[1]] = (start, size, int(sum64))
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: not a whole tar ({error})") from None
    fields = sorted({field for sample in samples.values() for field in sample})
    offsets = [[sample.get(field, (-1, -1, -1)) for field in fields] for sample in samples.values()]
    return fields, np.array(offsets, dtype=np.int64).reshape(len(offsets), len(fields), 3)


def described(tar: Path, fields: list[str], offsets: np.ndarray) -> dict[str, Any]:
    """Return a finished shard's record: size, identity (sha256), and what is verified on reading (xxh3)."""
    sums = {"sha256": file_digest(tar), "xxh3": checksum(tar), "offsets": checksum(tar.with_suffix(".npy"))}
    return {"count": len(offsets), "bytes": tar.stat().st_size, "fields": fields, **sums}


class ShardWriter:
    """Writes a set shard by shard, skipping what is finished; the same arguments give the same bytes.

    Args:
        folder: where the set goes.
        kind: what the samples are: images, latents or pairs.
        provenance: plain values that say where the samples come from; a folder that was begun with others is refused.
        count: number of indices in the whole set.
        shard: indices in one shard.
    """

    def __init__(self, folder: str | Path, kind: str, provenance: dict[str, Any], count: int, shard: int):
        if count < 1 or shard < 1:
            raise ValueError(f"{folder}: a set needs at least one sample and one per shard, got {count} and {shard}")
        self.folder, self.count, self.shard = Path(folder), count, shard
        self.plan = {"format": FORMAT, "kind": kind, "count": count, "shard": shard, **provenance}
        self.stamp = digest(canonical(self.plan))
        path = self.folder / "plan.json"
        if path.exists():
            self._refuse_another(read_json(path))
        else:
            write_json(path, self.plan)

    def _refuse_another(self, begun: dict[str, Any]) -> None:
        for key in sorted(begun.keys() | self.plan.keys()):
            if begun.get(key) != self.plan.get(key):
                raise ValueError(
                    f"{self.folder}: holds another set: {key} is {begun.get(key)!r} there and {self.plan.get(key)!r} here; "
                    "choose another folder or delete that one"
                )

    def numbers(self) -> range:
        """Return the numbers of all shards."""
        return range(-(-self.count // self.shard))

    def indices(self, number: int) -> range:
        """Return the global indices of a shard."""
        return range(number * self.shard, min(self.count, (number + 1) * self.shard))

    def finished(self, number: int) -> dict[str, Any] | None:
        """Return a finished shard's record, or None if it is still to be made (or was damaged since)."""
        record, tar = read_record(self._path(number, "json")), self._path(number, "tar")
        if record is None or record.get("stamp") != self.stamp or not self._path(number, "npy").exists():
            return None
        return record if tar.exists() and tar.stat().st_size == record["bytes"] else None

    def missing(self) -> list[int]:
        """Return the numbers of the shards still to be made."""
        return [number for number in self.numbers() if not self.finished(number)]

    def write(self, number: int, samples: Iterable[dict[str, Any]], **extra: Any) -> None:
        """Write one shard: the tar, its offsets, and last its record (with plain values `extra`).

        Each sample is {"__key__": name, field: bytes}; the names must be unique in the set.
        """
        try:
            self._make(number, samples, extra)
        except FileNotFoundError:  # swept by another process that made this shard too, and with it finished the set
            if not self.finished(number):
                raise

    def _make(self, number: int, samples: Iterable[dict[str, Any]], extra: dict[str, Any]) -> None:
        tar = self._path(number, "tar")
        with atomic(tar) as file, TarWriter(file, encoder=False, mtime=0.0) as writer:
            for sample in samples:
                writer.write(sample)
        fields, offsets = index_tar(tar)
        write_offsets(self._path(number, "npy"), offsets)
        write_json(self._path(number, "json"), {**described(tar, fields, offsets), "stamp": self.stamp, **extra})

    def finish(self, **extra: Any) -> bool:
        """Write the manifest if every shard is finished, and tell; any process may, and all would write the same."""
        records = [self.finished(number) for number in self.numbers()]
        if not all(records):
            return False
        told = [{key: value for key, value in record.items() if key not in OWN} for record in records if record]
        shards = [{"name": self._path(n, "tar").name, **record} for n, record in enumerate(told)]
        samples = sum(shard["count"] for shard in shards)
        write_json(self.folder / "manifest.json", {**self.plan, **extra, "samples": samples, "shards": shards})
        sweep(self.folder, "[0-9]*")
        return True

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"
