"""Files that are whole or not there: written to a temporary name, fsynced, renamed."""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Turn whatever goes wrong while foreign bytes are made sense of into a ValueError that names them."""
    try:
        yield
    except Exception as error:  # parsers raise many kinds: SyntaxError, struct.error, RecursionError, those of their library
        if isinstance(error, OSError) and error.filename:
            raise
        text = f"no entry {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(text if str(what) in text else f"{what}: {text}") from error


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
    """Yield a temporary folder that replaces `path` only when the block ends well; what killed ones left is removed."""
    temporary = _temporary(path)
    sweep(path.parent)
    temporary.mkdir()
    try:
        yield temporary
        for part in [*temporary.rglob("*"), temporary]:
            sync(part)
        _place(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _place(temporary: Path, path: Path) -> None:
    """Give a folder its final name; one that is there changes places with it, so that the name is never without a folder."""
    try:
        return os.rename(temporary, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if ctypes.CDLL(None).renameat2(here, os.fsencode(temporary), here, os.fsencode(path), swap):  # not on every file system
        remove(path)
        os.rename(temporary, path)


def remove(path: Path) -> None:
    """Delete a file or folder; a folder goes under a temporary name first, so that it is never half there."""
    if path.is_dir():
        path = path.rename(_temporary(path))
        shutil.rmtree(path)
    else:
        path.unlink()


def sweep(folder: Path, finished: str | None = None) -> None:
    """Remove what killed processes left: temporary files of dead processes, or of finished work (a pattern of final names)."""
    done = folder.glob(f".{finished}.*.tmp") if finished else ()
    for leftover in {*done, *filter(_abandoned, folder.glob(".*.tmp"))}:
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _abandoned(temporary: Path) -> bool:
    """Tell whether the process that made a temporary file ran on this machine and is dead."""
    made = re.fullmatch(rf"\..*\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]{{8}}\.tmp", temporary.name)
    return made is not None and not Path(f"/proc/{made[1]}").exists()


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, so that equal values are equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def sealed(value: dict[str, Any]) -> bytes:
    """Return the JSON text of an object with a checksum of itself, which `read_json` compares."""
    return canonical({**value, "seal": _seal(json.loads(canonical(value)))})  # as it will be read: keys are text


def _seal(value: dict[str, Any]) -> str:
    return digest(json.dumps(value, sort_keys=True).encode())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as sealed JSON, atomically."""
    with atomic(path) as file:
        file.write(sealed(value))


def parse_sealed(data: bytes, name: object) -> dict[str, Any]:
    """Return the object in sealed JSON; anything else is an error with its name."""
    try:
        value = json.loads(data)
        whole = isinstance(value, dict) and value.pop("seal", None) == _seal(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from None
    if not whole:
        raise ValueError(
            f"{name}: its seal does not fit: damaged, edited by hand, or written by another version; restore it, or delete it "
            "and run the command that makes it again"
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read an object that `write_json` wrote; anything else is an error that names the file."""
    return parse_sealed(path.read_bytes(), path)


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
