"""Indexing webdataset tars of other programs: offsets beside each tar, and a manifest."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from data.files import canonical, digest, file_checksum, write_json
from data.images import IMAGE_FIELDS
from data.progress import Meter
from data.schema import COUNT, check_schema, shorten
from data.shards.manifest import FORMAT, read_record
from data.shards.write import describe_shard, index_tar, write_offsets


def index(folder: Path) -> None:
    """Index a folder of webdataset tars: write offsets beside each tar, and a manifest.

    Samples with an image make a set of images, which must have one size. Samples with .npy make a
    set of latents. A .cls file is the number of a class.

    Args:
        folder: the tars' folder.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FileNotFoundError(f"{folder}: has no .tar files")
    if (folder / "plan.json").exists():
        raise ValueError(
            f"{folder}: is a set of this program already; "
            "run the command that makes it to repair it"
        )

    # Index each tar.
    shards = []
    with Meter("index", len(tars), "shards") as meter:
        for tar in tars:
            shards.append({"name": tar.name, **index_shard(tar)})
            meter.add(1)

    # Write the manifest.
    class_count = max(shard["largest_class"] for shard in shards) + 1
    manifest = {
        "format": FORMAT,
        "kind": find_kind(folder, shards),
        "listing": digest(canonical([shard["sha256"] for shard in shards])),
        "classes": [str(number) for number in range(class_count)] or None,
        "samples": sum(shard["count"] for shard in shards),
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)


def find_kind(folder: Path, shards: list[dict[str, Any]]) -> str:
    """Return what the samples are: images or latents."""
    fields: set[str] = set()
    for shard in shards:
        fields.update(shard["fields"])
    if fields & set(IMAGE_FIELDS):
        return "images"
    if "npy" in fields:
        return "latents"
    raise ValueError(
        f"{folder}: samples hold {sorted(fields)}; "
        f"they need an image ({', '.join(IMAGE_FIELDS)}) or npy"
    )


def index_shard(tar: Path) -> dict[str, Any]:
    """Index one tar unless that was done and the tar did not change; return its record.

    The record's `largest_class` is -1 without classes.
    """
    record_path = tar.with_suffix(".json")
    offsets_path = tar.with_suffix(".npy")
    record = read_record(record_path)
    if record and is_indexed(tar, offsets_path, record):
        check_schema(record, {"largest_class": range(-1, COUNT.stop)}, str(record_path))
        return record

    fields, offsets = index_tar(tar)
    write_offsets(offsets_path, offsets)
    largest = -1
    if "cls" in fields:
        largest = find_largest_class(tar, offsets[:, fields.index("cls")])
    record = {**describe_shard(tar, fields, offsets), "largest_class": largest}
    write_json(record_path, record)
    return record


def is_indexed(tar: Path, offsets: Path, record: dict[str, Any]) -> bool:
    """Whether a record belongs to the present content of a tar and its offsets."""
    if not offsets.exists():
        return False
    same_offsets = record["offsets"] == file_checksum(offsets)
    return same_offsets and record["xxh3"] == file_checksum(tar)


def find_largest_class(tar: Path, spans: np.ndarray) -> int:
    """Return the largest class number of a tar.

    Args:
        tar: the tar.
        spans: start, length and xxh3 of each sample's .cls, (samples, 3); -1 where it has none.
    """
    data = np.memmap(tar, np.uint8, "r")
    largest = -1
    for start, size, _ in spans:
        if start < 0:
            continue
        text = data[start : start + size].tobytes()
        if not re.fullmatch(rb"[0-9]{1,9}", text):
            raise ValueError(
                f"{tar}: .cls of a sample is {shorten(text)}; it must be a class number"
            )
        largest = max(largest, int(text))
    return largest
