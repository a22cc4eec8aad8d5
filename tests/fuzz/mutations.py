"""Damage to files, as disks, networks and attackers do it.

Every mutation is a function of a `random.Random`.
"""

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

from data.files import canonical, checksummed_json, file_checksum, file_digest

REPLACEMENTS = (
    *(None, True, -1, 0, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, math.nan, math.inf),
    *("", "x", "3", "1e999", "../../x", "/etc/passwd", "a\nb", "a\0b"),
    *("os.system", "models.checkpoint.load_checkpoint"),
    *([], {}, [[]], [1, "x"], {"x": {"y": []}}),
)
BRACKETS = 100_000  # far more than Python's recursion limit
HEADER_CHANGES = (  # position in a tar header, new bytes
    # name
    (0, b"../../escaped.png\0"),
    (0, b"/tmp/escaped.npy\0"),
    (0, b"\xff\xfe.png\0"),
    (0, bytes(100)),
    (0, b"nodot\0"),
    # size
    (124, b"77777777777\0"),
    (124, b"00000000000\0"),
    (124, b"\xff" * 12),
    (124, b"\x80" + b"\x7f" * 11),
    (124, b"zz\0"),
    # type
    *((156, kind) for kind in (b"1", b"2", b"3", b"5", b"L", b"x", b"g", b"S", b"\xff")),
)


def bits(data: bytes, rng: Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: Random) -> bytes:
    """Keep the beginning, sometimes none of it."""
    length = rng.choice([0, 1, len(data) - 1, rng.randrange(len(data))])
    return data[:length]


def zeros(data: bytes, rng: Random) -> bytes:
    """Zero a range, as a lost block of a file system reads."""
    start = rng.randrange(len(data))
    length = min(len(data) - start, rng.choice([1, 512, 4096]))
    return data[:start] + bytes(length) + data[start + length :]


def insertion(data: bytes, rng: Random) -> bytes:
    """Insert random bytes."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice([1, 100, 512])) + data[start:]


def find_spots(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) for everything inside nested lists and dictionaries."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    spots = [(value, key) for key, _ in items]
    for _, part in items:
        spots += find_spots(part)
    return spots


def change_structure(value: Any, rng: Random) -> tuple[Any, str]:
    """Delete, replace or rename one spot of a nested value.

    Returns the changed copy, and a description of the change.
    """
    value = copy.deepcopy(value)
    container, key = rng.choice(find_spots(value))
    kind = rng.choice(["delete", "replace", "replace", "replace", "rename"])
    if kind == "delete":
        del container[key]
        return value, f"delete {key}"
    if kind == "rename" and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
        return value, f"rename {key}"
    container[key] = copy.deepcopy(rng.choice(REPLACEMENTS))
    return value, f"{key} = {str(container[key])[:30]!r}"


def reseal_text(value: Any) -> bytes:
    """Return the JSON text of a value; if it had a seal, with one that fits.

    Only validation can find this damage.
    """
    if not isinstance(value, dict) or "seal" not in value:
        return canonical(value)
    return checksummed_json({key: part for key, part in value.items() if key != "seal"})


def reseal_shard(tar: Path) -> None:
    """Make the record and the manifest of a changed shard fit its bytes.

    Checksums cannot find this forgery.
    """
    # the checksums of the changed files
    facts = {"bytes": tar.stat().st_size, "sha256": file_digest(tar), "xxh3": file_checksum(tar)}
    offsets = tar.with_suffix(".npy")
    if offsets.exists():
        facts["offsets"] = file_checksum(offsets)

    # the files that record them
    record = tar.with_suffix(".json")
    if record.exists():
        record.write_bytes(reseal_text(json.loads(record.read_bytes()) | facts))
    manifest = tar.parent / "manifest.json"
    if manifest.exists():
        content = json.loads(manifest.read_bytes())
        for shard in content["shards"]:
            if shard["name"] == tar.name:
                shard.update(facts)
        manifest.write_bytes(reseal_text(content))


def change_tar_header(path: Path, rng: Random) -> str:
    """Change a member's name, size or type, with a header checksum that fits."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = rng.choice(tar.getmembers()).offset
    field, value = rng.choice(HEADER_CHANGES)
    data[start + field : start + field + len(value)] = value
    checksum_field = slice(start + 148, start + 156)
    data[checksum_field] = b" " * 8
    data[checksum_field] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    return f"header byte {field} of the member at {start} = {value[:12]!r}"


def change_file_structure(path: Path, rng: Random) -> str:
    """Change the structure of a JSON, YAML or checkpoint file."""
    if path.suffix == ".ckpt":
        value, change = change_structure(torch.load(path, weights_only=True), rng)
        torch.save(value, path)
        return f"{change}, checksums renewed"
    if path.suffix == ".yaml":
        value, change = change_structure(yaml.safe_load(path.read_text()), rng)
        path.write_text(yaml.safe_dump(value))
        return change
    value, change = change_structure(json.loads(path.read_bytes()), rng)
    if rng.random() < 0.7:
        path.write_bytes(reseal_text(value))
        return f"{change}, seal renewed"
    path.write_bytes(canonical(value))
    return change


def nest_deeply(path: Path, rng: Random) -> str:
    """Insert very many nested brackets before some value."""
    text = path.read_text()
    separator = rng.choice([":", ","])
    positions = [i for i, character in enumerate(text) if character == separator]
    start = rng.choice(positions or [0]) + 1
    brackets = "[" * BRACKETS + "]" * rng.choice([0, BRACKETS])
    path.write_text(f"{text[:start]} {brackets}{text[start:]}")
    return f"{BRACKETS} brackets at {start}"


def copy_another_file(path: Path, rng: Random) -> str:
    """Overwrite a file with another file of the same kind."""
    data = path.read_bytes()
    siblings = sorted(path.parent.glob(f"*{path.suffix}"))
    others = [other for other in siblings if other.read_bytes() != data]
    if not others:
        return damage_bytes(path, rng)
    other = rng.choice(others)
    path.write_bytes(other.read_bytes())
    return f"holds {other.name}"


def damage_bytes(path: Path, rng: Random) -> str:
    """Damage a file's bytes."""
    damage = rng.choice([bits, cut, zeros, insertion])
    path.write_bytes(damage(path.read_bytes() or b"\0", rng))
    return damage.__name__


def mutate(path: Path, rng: Random) -> str:
    """Mutate a file in a way that suits its format; return a description of the change."""
    # the mutations of its format
    mutations = [damage_bytes, damage_bytes, copy_another_file]
    if path.suffix in (".json", ".yaml", ".ckpt"):
        mutations += [change_file_structure] * 5
    if path.suffix in (".json", ".yaml", ".jsonl"):
        mutations += [nest_deeply]
    if path.suffix == ".tar":
        mutations += [change_tar_header] * 3

    # one of them, sometimes with checksums that fit
    change = rng.choice(mutations)(path, rng)
    if path.suffix == ".tar" and rng.random() < 0.5:
        reseal_shard(path)
        change += ", checksums renewed"
    return change


def append_member(tar: Path, name: str, data: bytes) -> None:
    """Append a member to a tar."""
    with tarfile.open(tar, "a") as file:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
