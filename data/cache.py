"""Files on other machines, kept here: downloaded once for all processes, the least recently used evicted beyond a limit."""

import errno
import fcntl
import hashlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import fsspec

from data.files import checksum, replacing, sweep

FOLDER, GIGABYTES = "~/.cache/rectify", "100"  # unless RECTIFY_CACHE and RECTIFY_CACHE_GB say otherwise
SCHEMES = ("file", "gs", "hf", "http", "https", "memory", "s3")
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError)  # what trying again does not mend
FULL = (errno.ENOSPC, errno.EDQUOT)


def scheme(url: str, allow_pipe: bool = False) -> str:
    """Return the scheme of a URL, "" for a local path.

    Raises:
        ValueError: a scheme that is not read; `pipe:` and fsspec's chains (`a::b`) could run or reach anything.
    """
    found = re.match(r"([A-Za-z][\w+.-]*):", url)
    if not found:
        return ""
    if found[1] == "pipe":
        if not allow_pipe:
            raise ValueError(f"{url}: pipe: runs a shell command, which is refused; set allow_pipe: true if you trust it")
    elif found[1] not in SCHEMES or not url[found.end() :].startswith("//"):
        raise ValueError(f"{url}: neither a path (write ./NAME if it has a colon) nor a URL of {', '.join(SCHEMES)}")
    return found[1]


def download(url: str, path: Path, kind: str) -> None:
    """Write what a URL of a scheme holds to a file. Nothing but `pipe:` runs a command."""
    if kind == "pipe":
        with path.open("wb") as out:
            subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=out, check=True)
        return
    options = {}
    if kind in ("http", "https"):
        from aiohttp import ClientTimeout

        # aiohttp's own limit is five minutes for a whole file, however well it flows
        options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
    files = fsspec.get_filesystem_class(kind)(**options)  # not fsspec.open: it would follow chains of protocols
    files.get_file(files._strip_protocol(url), str(path))


class Cache:
    """A folder of downloaded files, shared by any number of processes. Local paths are opened where they are.

    A file that some process holds open, or maps, is never evicted: the folder may grow beyond the limit by what is in use.
    A URL is taken to hold the same bytes for ever, unless their checksum is given.

    Args:
        folder: where the files go, under names that are hashes of their URLs; by default RECTIFY_CACHE, or ~/.cache/rectify.
        limit: bytes kept; by default RECTIFY_CACHE_GB, or 100 GB.
        allow_pipe: run `pipe:` URLs, which are shell commands.
        tries: how often a download is tried.
        wait: seconds before the second try; doubled before each further one.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        limit: int | None = None,
        allow_pipe: bool = False,
        tries: int = 4,
        wait: float = 1.0,
    ):
        folder = folder or os.environ.get("RECTIFY_CACHE", FOLDER)
        limit = int(float(os.environ.get("RECTIFY_CACHE_GB", GIGABYTES)) * 1e9) if limit is None else limit
        if limit < 1 or tries < 1:
            raise ValueError(f"{folder}: a cache's limit ({limit} bytes) and tries ({tries}) must be at least 1")
        self.folder, self.limit, self.allow_pipe = Path(folder).expanduser(), limit, allow_pipe
        self.tries, self.wait = tries, wait

    def path(self, url: str, xxh3: str = "") -> Path:
        """Return where a URL's file is kept: nothing in the name comes from the URL itself."""
        return self.folder / f"{hashlib.sha256(f'{url} {xxh3}'.encode()).hexdigest()}.part"

    def open(self, url: str, xxh3: str = "") -> BinaryIO:
        """Return a URL's file, opened for reading; while it, or a map of it, is open it is not evicted.

        Args:
            url: a path, or a URL.
            xxh3: refuse a download with another checksum (data.files).

        Raises:
            ValueError: a scheme that is not read.
            OSError: it cannot be downloaded.
        """
        kind = scheme(url, self.allow_pipe)
        if kind in ("", "file"):
            return Path(url.removeprefix("file://")).expanduser().open("rb")
        path = self.path(url, xxh3)
        if file := _held(path):
            return file
        with alone(path):  # one process downloads, the others wait for it
            file = _held(path) or self._download(url, path, kind, xxh3)
        self._evict()
        return file

    def forget(self, url: str, xxh3: str = "") -> None:
        """Remove a URL's file, so that it is downloaded anew."""
        if scheme(url, self.allow_pipe) not in ("", "file"):
            self.path(url, xxh3).unlink(missing_ok=True)

    def read(self, url: str) -> bytes:
        """Return what a URL holds now, kept nowhere: for small files that may change."""
        kind = scheme(url, self.allow_pipe)
        if kind in ("", "file"):
            return Path(url.removeprefix("file://")).expanduser().read_bytes()
        path = self.path(url)
        with replacing(path) as temporary:
            self._try(url, temporary, kind, "")
            data = temporary.read_bytes()
        path.unlink(missing_ok=True)
        return data

    def _download(self, url: str, path: Path, kind: str, xxh3: str) -> BinaryIO:
        with replacing(path) as temporary:
            self._try(url, temporary, kind, xxh3)
            file = temporary.open("rb")
            fcntl.flock(file, fcntl.LOCK_SH)  # before anyone could see and evict it
        return file

    def _try(self, url: str, path: Path, kind: str, xxh3: str) -> None:
        """Download, again and again where the network may be to blame."""
        for attempt in range(1, self.tries + 1):
            try:
                download(url, path, kind)
                if not xxh3 or checksum(path) == xxh3:
                    return
                raise ValueError("its checksum is not the manifest's; restore it or make the set again")
            except FINAL as error:
                what = "no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
                way = "; pip install 'rectify[remote]'" if isinstance(error, ImportError) else ""
                raise OSError(f"{url}: {what}{way}") from None
            except Exception as error:  # every library has its own kinds of failure
                if getattr(error, "errno", None) in FULL:
                    raise
                if attempt == self.tries:
                    raise OSError(f"{url}: not downloaded in {attempt} tries ({type(error).__name__}: {error})") from None
                time.sleep(self.wait * 2 ** (attempt - 1))

    def _evict(self) -> None:
        """Remove the least recently used files beyond the limit, and what killed processes left."""
        with alone(self.folder / "evict"):
            sweep(self.folder, "-")  # no final name: abandoned files alone
            found = []
            for path in self.folder.glob("*.part"):
                with suppress(FileNotFoundError):  # forgotten by another process just now
                    found.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            excess = sum(size for _, size, _ in found) - self.limit
            for _, size, path in sorted(found):
                if excess > 0 and _removed(path):
                    excess -= size


def _held(path: Path) -> BinaryIO | None:
    """Return a kept file, marked as in use now and as used last, or None if it is not there."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)  # lasts as long as any copy of the handle: a memory map holds one
    with suppress(FileNotFoundError):  # evicted since it was opened: its content stays readable
        os.utime(path)
    return file


def _removed(path: Path) -> bool:
    """Remove a kept file that nobody uses, and tell."""
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
def alone(path: Path) -> Iterator[None]:
    """Let one process after the other through, by PATH's .lock; a killed one's lock is released by the system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_suffix(".lock")
    with lock.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits for it still gets its turn; a newcomer at worst downloads too
