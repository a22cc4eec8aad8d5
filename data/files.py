"""Files that exist completely or not at all: written to a temporary name, fsynced, renamed.

JSON files carry a checksum of themselves, so that damage is noticed. The checksums of bytes and
files are defined here, those of tensors in models/tensors.py.
"""

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

AT_FDCWD = -100  # arguments of renameat2: paths are relative to the current folder
RENAME_EXCHANGE = 2  # swap the two paths


@contextmanager
def errors_named(what: object) -> Iterator[None]:
    """Turn any error in parsing foreign bytes into a ValueError that names their source.

    An OSError that names its file is left as it is.
    """
    try:
        yield
    except Exception as error:  # SyntaxError, struct.error, RecursionError, errors of libraries
        if isinstance(error, OSError) and error.filename:
            raise
        text = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            text = f"no entry {error}"
        if str(what) not in text:
            text = f"{what}: {text}"
        raise ValueError(text) from error


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary_path(path: Path) -> Path:
    """Return a temporary name beside a path, with the host and process that make it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    process = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.parent / f".{path.name}.{process}.tmp"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name; the file written there is renamed to `path` when the block succeeds.

    If the block raises, the temporary file is removed and `path` is left as it was.
    """
    temporary = _temporary_path(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        # Name the file of an error of the system, such as a full disk.
        # An OSError with a message of ours has no errno and names its file itself.
        if error.errno:
            error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under `path` only when the block succeeds."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` only when the block succeeds.

    Leftovers of killed processes beside it are removed first.
    """
    temporary = _temporary_path(path)
    remove_leftovers(path.parent)
    temporary.mkdir()
    try:
        yield temporary
        for part in [*temporary.rglob("*"), temporary]:
            sync(part)
        _rename_folder(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_folder(temporary: Path, path: Path) -> None:
    """Give a folder its final name.

    An existing folder is swapped with it, so that there is a folder under the name at all times.
    """
    try:
        os.rename(temporary, path)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    source = os.fsencode(temporary)
    target = os.fsencode(path)
    failed = ctypes.CDLL(None).renameat2(AT_FDCWD, source, AT_FDCWD, target, RENAME_EXCHANGE)
    if failed:  # some file systems cannot swap
        remove(path)
        os.rename(temporary, path)


def remove(path: Path) -> None:
    """Delete a file or folder.

    A folder gets a temporary name first, so that no reader finds it half deleted.
    """
    if path.is_dir():
        path = path.rename(_temporary_path(path))
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_leftovers(folder: Path, finished: str | None = None) -> None:
    """Remove temporary files and folders that killed processes left.

    Args:
        folder: where to look for them.
        finished: pattern of the names of files that are finished. Their temporary files are
            removed too, even if the process that made them runs.
    """
    leftovers = set()
    for temporary in folder.glob(".*.tmp"):
        if _is_abandoned(temporary):
            leftovers.add(temporary)
    if finished:
        leftovers.update(folder.glob(f".{finished}.*.tmp"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_abandoned(temporary: Path) -> bool:
    """Whether the process that made a temporary file ran on this machine and is dead."""
    host = re.escape(socket.gethostname())
    found = re.fullmatch(rf"\..*\.{host}-(\d+)-[0-9a-f]{{8}}\.tmp", temporary.name)
    return found is not None and not Path(f"/proc/{found[1]}").exists()


def canonical(value: Any) -> bytes:
    """Return the JSON text of a value with sorted keys: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def checksummed_json(value: dict[str, Any]) -> bytes:
    """Return the JSON text of an object, with a checksum of the object in the entry "seal"."""
    as_read = json.loads(canonical(value))  # JSON turns keys into text and tuples into lists
    return canonical({**value, "seal": _checksum_object(as_read)})


def _checksum_object(value: dict[str, Any]) -> str:
    return digest(json.dumps(value, sort_keys=True).encode())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as checksummed JSON, atomically."""
    with atomic_file(path) as file:
        file.write(checksummed_json(value))


def parse_checksummed_json(data: bytes, name: object) -> dict[str, Any]:
    """Return the object in checksummed JSON, without its checksum.

    Args:
        data: the text.
        name: of its file, for errors.

    Raises:
        ValueError: it is no JSON, no object, or its checksum does not match.
    """
    try:
        value = json.loads(data)
        intact = isinstance(value, dict) and value.pop("seal", None) == _checksum_object(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON ({error})") from None
    if not intact:
        raise ValueError(
            f"{name}: its checksum `seal` does not match its content: it is damaged, edited by "
            "hand or written by another version; restore it, or delete it and run the command "
            "that makes it again"
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read an object that `write_json` wrote.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    return parse_checksummed_json(path.read_bytes(), path)


def digest(data: bytes) -> str:
    """Return the sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, which identifies its content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(data: bytes | memoryview) -> str:
    """Return the xxh3 of bytes, which shows damage; it is twenty times as fast as sha256."""
    return xxhash.xxh3_128_hexdigest(data)


def file_checksum(path: Path) -> str:
    """Return the xxh3 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def sample_checksum(data: bytes | memoryview) -> int:
    """Return the xxh3 of a sample in 64 bits, one of many in a table."""
    return xxhash.xxh3_64_intdigest(data)
