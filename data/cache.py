"""A local cache of remote files, shared by all processes of a machine.

Each file is downloaded once. Beyond a limit the least recently used files are evicted.
"""

import errno
import fcntl
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from filelock import FileLock

from data.files import atomic_path, digest, file_checksum, remove_leftovers

DEFAULT_FOLDER = "~/.cache/rectify"  # unless RECTIFY_CACHE is set
DEFAULT_GIGABYTES = "100"  # unless RECTIFY_CACHE_GB is set
SCHEMES = ("file", "gs", "hf", "http", "https", "memory", "s3")
LOCAL_SCHEMES = ("", "file")

# Errors after which another try would not help.
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def parse_scheme(url: str, allow_pipe: bool = False) -> str:
    """Return the scheme of a URL, "" for a local path.

    Raises:
        ValueError: the scheme is not supported. `pipe:` and the chains of fsspec (`a::b`) could
            run or reach anything.
    """
    found = re.match(r"([A-Za-z][\w+.-]*):", url)
    if not found:
        return ""
    scheme = found[1]
    if scheme == "pipe":
        if not allow_pipe:
            raise ValueError(
                f"{url}: pipe: runs a shell command, which is refused; "
                "set allow_pipe: true if you trust it"
            )
    elif scheme not in SCHEMES or not url[found.end() :].startswith("//"):
        raise ValueError(
            f"{url}: neither a path (write ./NAME if it has a colon) "
            f"nor a URL of {', '.join(SCHEMES)}"
        )
    return scheme


def download(url: str, path: Path, scheme: str) -> None:
    """Write the content of a URL to a file. Only the scheme `pipe` runs a command."""
    if scheme == "pipe":
        command = url.removeprefix("pipe:")
        with path.open("wb") as out:
            subprocess.run(command, shell=True, stdout=out, check=True)
        return
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        # By default aiohttp aborts after five minutes, even if the download makes progress.
        timeout = ClientTimeout(total=None, sock_connect=30, sock_read=60)
        options = {"client_kwargs": {"timeout": timeout}}

    # fsspec.open would follow chains of protocols, a file system does not.
    file_system = fsspec.get_filesystem_class(scheme)(**options)
    file_system.get_file(file_system._strip_protocol(url), str(path))


class CachedFile(NamedTuple):
    """A file in the cache. The least recently used one sorts first."""

    used: int  # when it was last used, in ns
    size: int  # bytes
    path: Path


class Cache:
    """A folder of downloaded files, shared by any number of processes.

    A local path is opened directly. A file that some process has open or mapped is never evicted,
    so the folder may exceed its limit by the files in use. A URL must hold the same bytes forever,
    unless their checksum is given.

    Args:
        folder: where the files are kept, named by hashes of their URLs. By default RECTIFY_CACHE,
            or ~/.cache/rectify.
        limit: bytes to keep. By default RECTIFY_CACHE_GB, or 100 GB.
        allow_pipe: run `pipe:` URLs, which are shell commands.
        tries: number of attempts for a download.
        wait: seconds before the second attempt, doubled before each further one.

    Raises:
        ValueError: the limit or the number of tries is below 1.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        limit: int | None = None,
        allow_pipe: bool = False,
        tries: int = 4,
        wait: float = 1.0,
    ):
        folder = folder or os.environ.get("RECTIFY_CACHE", DEFAULT_FOLDER)
        if limit is None:
            gigabytes = os.environ.get("RECTIFY_CACHE_GB", DEFAULT_GIGABYTES)
            limit = int(float(gigabytes) * 1e9)
        if limit < 1 or tries < 1:
            raise ValueError(
                f"{folder}: a cache's limit ({limit} bytes) and tries ({tries}) must be at least 1"
            )
        self.folder = Path(folder).expanduser()
        self.limit = limit
        self.allow_pipe = allow_pipe
        self.tries = tries
        self.wait = wait

    def path(self, url: str, xxh3: str = "") -> Path:
        """Return the path of a URL's file in the cache. No part of the URL occurs in the name."""
        key = f"{url} {xxh3}".encode()
        return self.folder / f"{digest(key)}.part"

    def open(self, url: str, xxh3: str = "") -> BinaryIO:
        """Return the file of a URL, opened for reading.

        It is not evicted while it, or a memory map of it, is open.

        Args:
            url: a path or a URL.
            xxh3: checksum that a download must have (see data.files).

        Raises:
            ValueError: the scheme is not supported.
            OSError: the file cannot be downloaded.
        """
        scheme = parse_scheme(url, self.allow_pipe)
        if scheme in LOCAL_SCHEMES:
            return _local_path(url).open("rb")
        path = self.path(url, xxh3)
        file = _open_cached(path)
        if file:
            return file
        with exclusive(path):  # one process downloads, the others wait for it
            file = _open_cached(path) or self._download(url, path, scheme, xxh3)
        self._evict()
        return file

    def forget(self, url: str, xxh3: str = "") -> None:
        """Remove the file of a URL, so that it is downloaded again."""
        if parse_scheme(url, self.allow_pipe) not in LOCAL_SCHEMES:
            self.path(url, xxh3).unlink(missing_ok=True)

    def read(self, url: str) -> bytes:
        """Return the current content of a URL without caching it: for small files that change."""
        scheme = parse_scheme(url, self.allow_pipe)
        if scheme in LOCAL_SCHEMES:
            return _local_path(url).read_bytes()
        path = self.path(url)
        with atomic_path(path) as temporary:
            self._try_download(url, temporary, scheme, "")
            data = temporary.read_bytes()
        path.unlink(missing_ok=True)
        return data

    def _download(self, url: str, path: Path, scheme: str, xxh3: str) -> BinaryIO:
        with atomic_path(path) as temporary:
            self._try_download(url, temporary, scheme, xxh3)
            file = temporary.open("rb")
            # Mark it as in use before it has its name and another process could evict it.
            fcntl.flock(file, fcntl.LOCK_SH)
        return file

    def _try_download(self, url: str, path: Path, scheme: str, xxh3: str) -> None:
        """Download a file; try again after errors that the network may have caused."""
        for attempt in range(1, self.tries + 1):
            try:
                download(url, path, scheme)
                if xxh3 and file_checksum(path) != xxh3:
                    raise ValueError(
                        "its checksum is not the manifest's; restore it or make the set again"
                    )
                return
            except PERMANENT_ERRORS as error:
                raise OSError(f"{url}: {_explain_permanent(error)}") from None
            except Exception as error:  # every library raises its own kinds
                if getattr(error, "errno", None) in DISK_FULL:
                    raise
                if attempt == self.tries:
                    raise OSError(
                        f"{url}: not downloaded in {attempt} tries "
                        f"({type(error).__name__}: {error})"
                    ) from None
                time.sleep(self.wait * 2 ** (attempt - 1))

    def _evict(self) -> None:
        """Remove the least recently used files beyond the limit, and what killed processes left."""
        with exclusive(self.folder / "evict"):
            remove_leftovers(self.folder)
            files = []
            for path in self.folder.glob("*.part"):
                with suppress(FileNotFoundError):  # another process just removed it
                    stat = path.stat()
                    files.append(CachedFile(stat.st_mtime_ns, stat.st_size, path))
            excess = sum(file.size for file in files) - self.limit
            for file in sorted(files):
                if excess > 0 and _remove_unused(file.path):
                    excess -= file.size


def _local_path(url: str) -> Path:
    return Path(url.removeprefix("file://")).expanduser()


def _explain_permanent(error: Exception) -> str:
    """Return the text of an error that another try would repeat, with the way out."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = str(error) or type(error).__name__
    if isinstance(error, ImportError):
        return f"{text}; pip install 'rectify[remote]'"
    return text


def _open_cached(path: Path) -> BinaryIO | None:
    """Return a cached file, marked as in use and as most recently used; None if there is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    # The lock lasts as long as any copy of the handle, and a memory map holds a copy.
    fcntl.flock(file, fcntl.LOCK_SH)
    with suppress(FileNotFoundError):  # evicted since it was opened: it can still be read
        os.utime(path)
    return file


def _remove_unused(path: Path) -> bool:
    """Remove a cached file unless it is in use; return whether it is gone."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Run the block in one process at a time, by a lock on PATH's .lock file.

    The system releases the lock of a killed process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with FileLock(lock):
        try:
            yield
        finally:
            # Processes that wait for this file notice that it is gone, and compete for a new one.
            lock.unlink(missing_ok=True)
