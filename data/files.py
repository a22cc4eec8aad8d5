"""Files that exist completely or not at all: written to a temporary name, fsynced, renamed.

JSON files carry a checksum of themselves, so that damage is noticed. The checksums of bytes and
files are defined here, those of tensors in models/tensors.py.
"""

import ctypes
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import xxhash

AT_FDCWD = -100  # arguments of renameat2: paths are relative to the current folder
OFFSET_ERRORS = (errno.EINVAL, errno.EOVERFLOW, errno.EFBIG)  # of seeking where forged bytes say
RENAME_EXCHANGE = 2  # swap the two paths
ABANDONED_SECONDS = 24 * 3600  # since a temporary file of an unknown process was written


@contextmanager
def errors_named(what: object) -> Iterator[None]:
    """Turn any error in parsing foreign bytes into a ValueError that names their source.

    A fault of the machine, such as too little memory, is left as it is.
    """
    try:
        yield
    except Exception as error:  # SyntaxError, struct.error, RecursionError, errors of libraries
        if is_machine_fault(error):
            raise_named(error, what)
        text = describe_error(error)
        if str(what) not in text:
            text = f"{what}: {text}"
        raise ValueError(text) from error


def describe_error(error: Exception) -> str:
    """Return the message of an error, or its kind if it has none."""
    if isinstance(error, KeyError):
        return f"no entry {error}"
    return str(error) or type(error).__name__


def is_machine_fault(error: Exception) -> bool:
    """Whether an error comes from the machine, and not from the bytes that were read.

    The system's errors have a number; those of parsers that are an OSError have none.
    """
    if isinstance(error, OSError):
        return error.errno not in (None, *OFFSET_ERRORS)
    return isinstance(error, MemoryError)


def raise_named(error: Exception, what: object) -> NoReturn:
    """Raise a fault of the machine with the name of what was read."""
    if isinstance(error, MemoryError):
        text = f"{what}: {error}" if str(error) else str(what)
        raise MemoryError(text) from error
    if isinstance(error, OSError):
        error.filename = error.filename or str(what)
    raise error


def check_folder(folder: Path) -> None:
    """Check that there is a folder.

    Raises:
        OSError: there is none, or it is a file.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file; give the folder that has the files in it")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_path(path: Path) -> Path:
    """Return a temporary name beside a path, with the process that makes it and its start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    process = os.getpid()
    maker = f"{process_space()}-{process}-{process_start(process)}"
    return path.parent / f".{path.name}.{maker}-{secrets.token_hex(4)}.tmp"


def process_space() -> str:
    """Return a name of where this process's id is valid: its host, and what tells hosts apart.

    Containers may share a host name, and have processes of the same ids. They differ in the
    boot of their machine or in their namespace of processes.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{socket.gethostname()}-{digest(f'{boot} {namespace}'.encode())[:12]}"


def process_start(process: int) -> str:
    """Return when a process of this machine began, in its clock's ticks; "" if it is dead.

    One that has ended counts as dead though its parent has not collected its exit code.
    """
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def read_clock(folder: Path) -> float:
    """Return the time of the clock that stamps the files in a folder: the file server's."""
    probe = temporary_path(folder / "now")
    probe.touch()
    stamp = probe.stat().st_mtime
    probe.unlink()
    return stamp


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name; the file written there is renamed to `path` when the block succeeds.

    If the block raises, the temporary file is removed and `path` is left as it was.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        # Name the file of an error of the system, such as a full disk.
        # An OSError with a message of ours has no errno and names its file itself.
        if error.errno and error.filename in (None, str(temporary)):
            error.filename = str(path)
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
    temporary = temporary_path(path)
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


def files_by_step(folder: Path, suffix: str) -> list[Path]:
    """Return the files and folders step=N<suffix> in a folder, in the order of N.

    Their names may have zeros before N or not. Of two with the same N, the longer name comes last.
    """
    found = []
    for path in folder.glob(f"step=*{suffix}"):
        step = path.name.removeprefix("step=").removesuffix(suffix)
        if step.isdecimal():
            found.append((int(step), len(step), path))
    return [path for _, _, path in sorted(found)]


def set_aside(path: Path) -> Path:
    """Rename a file or folder to the first free NAME.earlier-N beside it, and return that."""
    for number in itertools.count(1):
        target = path.with_name(f"{path.name}.earlier-{number}")
        if not target.exists():
            break
    return path.rename(target)


def remove(path: Path) -> None:
    """Delete a file or folder.

    A folder gets a temporary name first, so that no reader finds it half deleted.
    """
    if path.is_dir():
        path = path.rename(temporary_path(path))
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
    """Whether the process that made a temporary file is dead.

    That of another machine or container, or from before a restart, counts as dead when nothing
    was written for a day.
    """
    space = re.escape(process_space())
    found = re.fullmatch(rf"\..*\.{space}-(\d+)-(\d+)-[0-9a-f]{{8}}\.tmp", temporary.name)
    if found:  # ids are used again: the first process of every container is number 1
        return process_start(int(found[1])) != found[2]
    with suppress(FileNotFoundError):  # it has just got its name
        return time.time() - _last_written(temporary) > ABANDONED_SECONDS
    return False


def _last_written(path: Path) -> float:
    """Return when a file, or anything in a folder, was written last."""
    return max(part.stat().st_mtime for part in [path, *path.rglob("*")])


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
