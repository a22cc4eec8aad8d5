"""Writing sets. Any process can make any shard, in any order and any number of times."""

import io
import re
import tarfile
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

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
from data.shards.scan import TAR_BLOCK, Spans, TarContents, scan_tar

SET_FILES = re.compile(r"manifest\.json|[0-9]{6,}\.(tar|npy|json)")  # that a set writes
# Where a tar's header has what differs among members.
NAME_SPAN = slice(0, 100)
SIZE_SPAN = slice(124, 136)
CHECKSUM_SPAN = slice(148, 156)
MAX_NAME = 100  # bytes; longer names and larger members need further blocks
MAX_SIZE = 8**11
ONLY_IN_RECORDS = ("stamp", "distances")  # keys of a shard's record that the manifest leaves out


def array_to_npy(array: np.ndarray) -> bytes:
    """Return an array as .npy bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_offsets(path: Path, offsets: np.ndarray) -> None:
    """Write the offsets of a shard."""
    with atomic_file(path) as file:
        file.write(array_to_npy(offsets))


def scan_complete_tar(path: Path) -> TarContents:
    """Return the contents of a tar.

    Raises:
        ValueError: it is compressed, damaged or no tar.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        contents = scan_tar(file, size, str(path))
    if not contents.complete:
        raise ValueError(
            f"{path}: not a complete tar (its intact part ends at byte {contents.end:,} of "
            f"{size:,}); restore it"
        )
    return contents


def measure_offsets(path: Path, samples: Sequence[Spans], fields: Sequence[str]) -> np.ndarray:
    """Return the offsets of a tar's samples, (samples, fields, 3) int64.

    They are start, length and xxh3 of every member, -1 where a sample lacks the field.

    Args:
        path: the tar.
        samples: spans of each sample; fields that are not among `fields` are left out.
        fields: names of the columns.
    """
    data = np.memmap(path, np.uint8, "r").data
    offsets = np.full((len(samples), len(fields), 3), -1, dtype=np.int64)
    for row, spans in enumerate(samples):
        for column, field in enumerate(fields):
            if field in spans:
                start, size = spans[field]
                xxh3 = np.uint64(sample_checksum(data[start : start + size]))
                offsets[row, column] = start, size, int(xxh3.view(np.int64))
    return offsets


def describe_shard(tar: Path, offsets: Path, fields: list[str], count: int) -> dict[str, Any]:
    """Return the record of a finished shard.

    It has the shard's size, its identity (sha256) and what is verified on reading (xxh3).
    """
    return {
        "count": count,
        "bytes": tar.stat().st_size,
        "fields": fields,
        "sha256": file_digest(tar),
        "xxh3": file_checksum(tar),
        "offsets": file_checksum(offsets),
    }


def write_tar(file: BinaryIO, samples: Iterable[dict[str, Any]]) -> list[Spans]:
    """Write a tar; return where the fields of each sample are.

    The bytes are those of webdataset.TarWriter with mtime=0.0, in a fraction of its time.

    Args:
        file: to write to, from its start.
        samples: each is {"__key__": name, field: bytes}.
    """
    contents = []
    end = 0
    for sample in samples:
        spans = {}
        for field in sorted(sample.keys() - {"__key__"}):
            data = sample[field]
            header = make_header(f"{sample['__key__']}.{field}", len(data))
            padding = bytes(-len(data) % TAR_BLOCK)
            file.write(header)
            file.write(data)
            file.write(padding)
            start = end + len(header)
            spans[field] = (start, len(data))
            end = start + len(data) + len(padding)
        contents.append(spans)
    mark = 2 * TAR_BLOCK  # of zeros, at the end of a tar
    file.write(bytes(mark + -(end + mark) % tarfile.RECORDSIZE))
    return contents


def make_header(name: str, size: int) -> bytes:
    """Return the header of a tar's member.

    Usual names and sizes are written into the header of another member: tarfile takes ten times as
    long, as long as it takes to decode a small image.
    """
    if not name.isascii() or len(name) > MAX_NAME or size >= MAX_SIZE:
        return make_any_header(name, size)
    template = make_any_header("x", 0)
    block = bytearray(template[-TAR_BLOCK:])  # those before it hold the time
    block[NAME_SPAN] = name.encode().ljust(MAX_NAME, b"\0")
    block[SIZE_SPAN] = b"%011o\0" % size
    block[CHECKSUM_SPAN] = b" " * 8
    block[CHECKSUM_SPAN] = b"%06o\0 " % sum(block)
    return template[:-TAR_BLOCK] + block


@lru_cache(maxsize=1)
def make_any_header(name: str, size: int) -> bytes:
    """Return the header of a tar's member, of any name and size."""
    member = tarfile.TarInfo(name)
    member.size = size
    member.mtime = 0.0
    member.mode = 0o444
    member.uname = "bigdata"  # webdataset's
    member.gname = "bigdata"
    return member.tobuf(tarfile.PAX_FORMAT)


class ShardRange(NamedTuple):
    """What a shard holds."""

    group: int
    indices: range


def split_indices(groups: Sequence[int], shard: int) -> list[ShardRange]:
    """Return what each shard holds.

    Args:
        groups: sizes of consecutive groups of indices.
        shard: indices in one shard; the last one of a group has fewer.
    """
    ranges = []
    start = 0
    for group, size in enumerate(groups):
        end = start + size
        for first in range(start, end, shard):
            ranges.append(ShardRange(group, range(first, min(end, first + shard))))
        start = end
    return ranges


class ShardWriter:
    """Writes a set shard by shard, and skips finished shards.

    The same arguments give the same bytes.

    Args:
        folder: where the set is written.
        kind: what the samples are: images, latents or pairs.
        provenance: plain values that identify the origin of the samples.
        count: number of indices in the set.
        shard: indices in one shard.
        groups: sizes of consecutive groups of indices; each shard holds samples of one group. By
            default all indices are one group.
        derived: entries of the plan that follow from the content of the inputs. An unfinished set
            that differs in nothing else is begun anew: its inputs were mended.

    Raises:
        ValueError: the set or a shard would be empty, or the folder was begun with another plan.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        provenance: dict[str, Any],
        count: int,
        shard: int,
        derived: Collection[str] = (),
        groups: Sequence[int] = (),
    ):
        if count < 1 or shard < 1:
            raise ValueError(
                f"{folder}: a set needs at least one sample, and one per shard; "
                f"got {count} samples and {shard} per shard"
            )
        self.folder = Path(folder)
        self.count = count
        self.shard = shard
        self.groups = list(groups)
        self._ranges = split_indices(self.groups or [count], shard)
        self.plan = {"format": FORMAT, "kind": kind, "count": count, "shard": shard, **provenance}
        self.stamp = digest(canonical(self.plan))
        self.derived = derived
        self._check_folder()

    def _check_folder(self) -> None:
        """Check that the folder holds this set, or no file that the set would overwrite."""
        for folder in (self.folder, *self.folder.parents):
            if folder.is_file():
                raise NotADirectoryError(f"{folder}: is a file; choose another folder")
        path = self.folder / "plan.json"
        if path.exists():
            self._check_same_plan(read_json(path))
            return
        record = read_record(self._path(0, "json"))
        if record and record.get("stamp") == self.stamp:
            return  # only its plan was lost
        for path in sorted(self.folder.glob("*")):
            if SET_FILES.fullmatch(path.name):
                raise ValueError(
                    f"{path}: could be overwritten, but belongs to no set that this command "
                    "began; choose another folder"
                )

    def _write_plan(self) -> None:
        """Write the plan, before the first shard gets its name.

        A command that is refused until then leaves nothing that binds the next one.
        """
        path = self.folder / "plan.json"
        if path.exists():  # another process began the set meanwhile, or an earlier command
            begun = read_json(path)
            if begun == self.plan:
                return
            self._check_same_plan(begun)
            self._remove_shards_beyond()
        write_json(path, self.plan)

    def _remove_shards_beyond(self) -> None:
        """Remove the shards of an unfinished set that this one does not have."""
        for path in self.folder.glob("[0-9]*"):
            if SET_FILES.fullmatch(path.name) and int(path.stem) >= len(self.numbers()):
                path.unlink()

    def _check_same_plan(self, begun: dict[str, Any]) -> None:
        """Check that the set in the folder was begun with this plan, or may be begun anew."""
        differing = {key for key in begun | self.plan if begun.get(key) != self.plan.get(key)}
        is_finished = (self.folder / "manifest.json").exists()
        if differing and not is_finished and differing.issubset(self.derived):
            return
        # the format first: sets of other formats may differ in everything; the inputs last
        keys = [*self.plan, *sorted(begun.keys() - self.plan.keys())]
        for key in sorted(keys, key=lambda key: key in self.derived):
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
        return range(len(self._ranges))

    def indices(self, number: int) -> range:
        """Return the global indices of a shard."""
        return self._ranges[number].indices

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
        with atomic_file(tar) as file:
            spans = write_tar(file, samples)
            self._write_plan()
        fields = sorted({field for sample in spans for field in sample})
        offsets = self._path(number, "npy")
        write_offsets(offsets, measure_offsets(tar, spans, fields))
        record = describe_shard(tar, offsets, fields, len(spans))
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
            if self.groups:
                shard["group"] = self._ranges[number].group
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
