"""Indexing tars that others made, so that they are read like our own: offsets beside them, and a manifest."""

import re
from pathlib import Path

import numpy as np

from data.files import canonical, checksum, digest, write_json
from data.form import COUNT, conform, shown
from data.images import FIELDS
from data.progress import Meter
from data.shards.manifest import FORMAT, read_record
from data.shards.write import described, index_tar, write_offsets


def index(folder: Path) -> None:
    """Index a folder of webdataset tars in place: offsets and checksum beside each, and a manifest for all.

    Samples with an image are a set of images (all of one size), those with .npy one of latents; .cls are class numbers.

    Args:
        folder: the tars' folder.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FileNotFoundError(f"{folder}: no .tar files there")
    if (folder / "plan.json").exists():
        raise ValueError(f"{folder}: is a set of ours already; run the command that makes it to repair it")
    shards, classes = [], 0
    with Meter("index", len(tars), "shards") as meter:
        for tar in tars:
            record, most = index_one(tar)
            shards.append({"name": tar.name, **record})
            classes = max(classes, most + 1)
            meter.add(1)
    held = {field for shard in shards for field in shard["fields"]}
    kind = "images" if held & set(FIELDS) else "latents" if "npy" in held else None
    if kind is None:
        raise ValueError(f"{folder}: samples hold {sorted(held)}, wanted an image ({', '.join(FIELDS)}) or npy")
    listing = digest(canonical([shard["sha256"] for shard in shards]))
    named = [str(number) for number in range(classes)] or None
    plan = {"format": FORMAT, "kind": kind, "listing": listing, "classes": named, "samples": sum(s["count"] for s in shards)}
    write_json(folder / "manifest.json", {**plan, "shards": shards})


def index_one(tar: Path) -> tuple[dict, int]:
    """Index one tar (again only if it changed); return its record and its largest class number, or -1."""
    record_path, offsets_path = tar.with_suffix(".json"), tar.with_suffix(".npy")
    record = read_record(record_path)
    if record and offsets_path.exists() and [record["xxh3"], record["offsets"]] == [checksum(tar), checksum(offsets_path)]:
        conform(record, {"largest_class": range(-1, COUNT.stop)}, str(record_path))
        return record, record["largest_class"]
    fields, offsets = index_tar(tar)
    write_offsets(offsets_path, offsets)
    largest = -1
    if "cls" in fields:
        data = np.memmap(tar, np.uint8, "r")
        told = [data[start : start + size].tobytes() for start, size, _ in offsets[:, fields.index("cls")] if start >= 0]
        if wrong := [text for text in told if not re.fullmatch(rb"[0-9]{1,9}", text)]:
            raise ValueError(f"{tar}: .cls of a sample is {shown(wrong[0])}, wanted a class number")
        largest = max(map(int, told))
    write_json(record_path, record := {**described(tar, fields, offsets), "largest_class": largest})
    return record, largest
