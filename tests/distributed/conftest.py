"""An uninterrupted run, to compare the others with; and a disk that can be full."""

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.runs import tiny_fit_words


@pytest.fixture(scope="session")
def uninterrupted_run(workspace, tmp_path_factory):
    """Return the folder of an uninterrupted tiny run of 40 steps."""
    out = tmp_path_factory.mktemp("fit") / "run"
    workspace.rectify(*tiny_fit_words(out))
    return out


class Tmpfs:
    """A file system in memory, resized as needed."""

    error = "No space left on device"

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def full(self, free: int, largest_file: int | None = None):
        """Leave `free` more bytes on the disk; `largest_file` is not used."""
        used = shutil.disk_usage(self.folder).used
        subprocess.run(["mount", "-o", f"remount,size={used + free}", self.folder], check=True)
        yield
        subprocess.run(["mount", "-o", "remount,size=64m", self.folder], check=True)


class FileSizeLimit:
    """A limit on the size of each file: the substitute for a full disk without root's mount.

    It applies to the commands that are started while it is set.
    """

    error = "File too large"

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def full(self, free: int, largest_file: int | None = None):
        """Limit each file to `largest_file` bytes, or to `free` if that is not given."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file or free, hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mount_tmpfs(folder: Path) -> bool:
    """Mount a file system of 64 MB on a folder, and return whether that was possible."""
    if os.geteuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    return subprocess.run(command).returncode == 0


@pytest.fixture
def tmpfs(tmp_path):
    """Return a folder on a small tmpfs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount_tmpfs(folder):
        pytest.skip("mounting a small tmpfs needs root")
    yield Tmpfs(folder)
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def file_size_limit(request, tmp_path):
    """Return a folder for files whose size can be limited."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() == 0 and not request.config.getoption("--long"):
        pytest.skip("only with --long, because root can mount a small disk instead")
    return FileSizeLimit(folder)


@pytest.fixture(params=["tmpfs", "file_size_limit"])
def small_disk(request):
    """Return a folder on a disk that can be full."""
    return request.getfixturevalue(request.param)
