"""Files that are whole or not there: written to a temporary name, fsynced, renamed."""

import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name; the file written there appears under `path` only when the block ends well."""
    temporary = _temporary(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:  # a full disk, say: name the file that was being written
        if error.errno:  # one of our own lines names its file itself
            error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under `path` only when the block ends well."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` only when the block ends well."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for part in [*temporary.rglob("*"), temporary]:
            sync(part)
        shutil.rmtree(path, ignore_errors=True)  # rename cannot replace a filled folder
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file or folder; a folder goes under a temporary name first, so that it is never half there."""
    if path.is_dir():
        path = path.rename(_temporary(path))
        shutil.rmtree(path)
    else:
        path.unlink()


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes left: temporary files of finished work (a pattern of final names), or of dead processes."""
    for leftover in {*folder.glob(f".{pattern}.*.tmp"), *filter(_abandoned, folder.glob(".*.tmp"))}:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _abandoned(temporary: Path) -> bool:
    """Tell whether the process that made a temporary file ran on this machine and is dead."""
    host, pid, _ = temporary.name.removesuffix(".tmp").rpartition(".")[2].rsplit("-", 2)
    return host == socket.gethostname() and not Path(f"/proc/{pid}").exists()


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, so that equal values are equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    with atomic(path) as file:
        file.write(canonical(value))


def parse_json(data: bytes, name: object) -> Any:
    """Return what JSON bytes hold; bytes that are none are an error with their name."""
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from None


def read_json(path: Path) -> Any:
    """Read a JSON file; one that is no JSON is an error that names it."""
    return parse_json(path.read_bytes(), path)


def digest(data: bytes) -> str:
    """Return the sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file: what it is."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path) -> str:
    """Return the xxh3 of a file: whether it is undamaged, twenty times as fast."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
