"""Damage, as disks, networks and strangers do it. Every mutation is a function of a `random.Random`."""

import copy
import io
import json
import math
import tarfile
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from data.files import canonical, checksum, file_digest, sealed

VALUES = (
    *(None, True, -1, 0, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, math.nan, math.inf, "", "x", "3", "1e999", "../../x"),
    *("/etc/passwd", "a\nb", "a\0b", "os.system", "models.teacher.load", [], {}, [[]], [1, "x"], {"x": {"y": []}}),
)  # fmt: skip
DEPTH = 100_000  # brackets, far past Python's recursion limit


def bits(data: bytes, draw: Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: Random) -> bytes:
    """Keep a beginning, sometimes none of it."""
    return data[: draw.choice([0, 1, len(data) - 1, draw.randrange(len(data))])]


def zeros(data: bytes, draw: Random) -> bytes:
    """Zero a range, as a lost block of a file system reads."""
    start = draw.randrange(len(data))
    length = min(len(data) - start, draw.choice([1, 512, 4096]))
    return data[:start] + bytes(length) + data[start + length :]


def insertion(data: bytes, draw: Random) -> bytes:
    """Insert random bytes somewhere."""
    start = draw.randrange(len(data) + 1)
    return data[:start] + draw.randbytes(draw.choice([1, 100, 512])) + data[start:]


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of everything inside nested lists and dictionaries."""
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [(value, key) for key, _ in inside] + [spot for _, part in inside for spot in spots(part)]


def restructure(value: Any, draw: Random) -> tuple[Any, str]:
    """Return a nested value with one spot deleted, replaced or renamed, and what was done."""
    value = copy.deepcopy(value)
    container, key = draw.choice(spots(value))
    kind = draw.choice(["delete", "replace", "replace", "replace", "rename"])
    if kind == "delete":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    else:
        kind, container[key] = "replace", copy.deepcopy(draw.choice(VALUES))
        return value, f"{key} = {str(container[key])[:30]!r}"
    return value, f"{kind} {key}"


def resealed(value: Any) -> bytes:
    """Return the JSON text of a value with a seal that fits, if it had one: a damage that only validation can see."""
    if not isinstance(value, dict) or "seal" not in value:
        return canonical(value)
    return sealed({key: part for key, part in value.items() if key != "seal"})


def reseal(tar: Path) -> None:
    """Make a changed shard's record and manifest fit its bytes again: a forgery that checksums cannot see."""
    facts = {"bytes": tar.stat().st_size, "sha256": file_digest(tar), "xxh3": checksum(tar)}
    if (offsets := tar.with_suffix(".npy")).exists():
        facts["offsets"] = checksum(offsets)
    record, manifest = tar.with_suffix(".json"), tar.parent / "manifest.json"
    if record.exists():
        record.write_bytes(resealed(json.loads(record.read_bytes()) | facts))
    if manifest.exists():
        whole = json.loads(manifest.read_bytes())
        whole["shards"] = [shard | (facts if shard["name"] == tar.name else {}) for shard in whole["shards"]]
        manifest.write_bytes(resealed(whole))


def tar_header(path: Path, draw: Random) -> str:
    """Change a member's name, size or type, with a header checksum that fits."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = draw.choice(tar.getmembers()).offset
    field, value = draw.choice(
        [(0, b"../../escaped.png\0"), (0, b"/tmp/escaped.npy\0"), (0, b"\xff\xfe.png\0"), (0, bytes(100)), (0, b"nodot\0")]
        + [(124, b"77777777777\0"), (124, b"00000000000\0"), (124, b"\xff" * 12), (124, b"\x80" + b"\x7f" * 11), (124, b"zz\0")]
        + [(156, kind) for kind in (b"1", b"2", b"3", b"5", b"L", b"x", b"g", b"S", b"\xff")]
    )
    data[start + field : start + field + len(value)] = value
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    return f"header byte {field} of the member at {start} = {value[:12]!r}"


def restructured_file(path: Path, draw: Random) -> str:
    """Change the structure of a JSON, YAML or checkpoint file."""
    if path.suffix == ".ckpt":
        value, what = restructure(torch.load(path, weights_only=True), draw)
        torch.save(value, path)
        what += ", checksums renewed"
    elif path.suffix == ".yaml":
        value, what = restructure(yaml.safe_load(path.read_text()), draw)
        path.write_text(yaml.safe_dump(value))
    else:
        value, what = restructure(json.loads(path.read_bytes()), draw)
        forged = draw.random() < 0.7
        path.write_bytes(resealed(value) if forged else canonical(value))
        what += ", seal renewed" if forged else ""
    return what


def deep(path: Path, draw: Random) -> str:
    """Nest without end in the place of some value."""
    text, mark = path.read_text(), draw.choice([":", ","])
    at = draw.choice([i for i, c in enumerate(text) if c == mark] or [0]) + 1
    path.write_text(text[:at] + " " + "[" * DEPTH + "]" * draw.choice([0, DEPTH]) + text[at:])
    return f"{DEPTH} brackets at {at}"


def swapped(path: Path, draw: Random) -> str:
    """Put another file of the same kind in this one's place."""
    others = sorted(other for other in path.parent.glob(f"*{path.suffix}") if other.read_bytes() != path.read_bytes())
    if not others:
        return damaged(path, draw)
    other = draw.choice(others)
    path.write_bytes(other.read_bytes())
    return f"holds {other.name}"


def damaged(path: Path, draw: Random) -> str:
    """Damage a file's bytes."""
    kind = draw.choice([bits, cut, zeros, insertion])
    path.write_bytes(kind(path.read_bytes() or b"\0", draw))
    return kind.__name__


def mutate(path: Path, draw: Random) -> str:
    """Mutate a file in a way that suits it; return what was done."""
    kinds = [damaged, damaged, swapped]
    if path.suffix in (".json", ".yaml", ".ckpt"):
        kinds += [restructured_file] * 5
    if path.suffix in (".json", ".yaml", ".jsonl"):
        kinds += [deep]
    if path.suffix == ".tar":
        kinds += [tar_header] * 3
    what = draw.choice(kinds)(path, draw)
    if path.suffix == ".tar" and draw.random() < 0.5:
        reseal(path)
        what += ", checksums renewed"
    return what


def member(tar: Path, name: str, data: bytes) -> None:
    """Append a member to a tar."""
    with tarfile.open(tar, "a") as file:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
