"""A run that nobody disturbed, to compare the others with; a disk that can be full."""

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.runs import fit


@pytest.fixture(scope="session")
def undisturbed_run(workspace, tmp_path_factory):
    """Return the folder of an undisturbed tiny run of 40 steps."""
    out = tmp_path_factory.mktemp("fit") / "run"
    workspace.rectify(*fit(out))
    return out


class Tmpfs:
    """A file system in memory, whose size is set as needed."""

    says = "No space left on device"

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def full(self, room: int, largest: int | None = None):
        """Leave room for so many bytes more."""
        used = shutil.disk_usage(self.folder).used
        subprocess.run(["mount", "-o", f"remount,size={used + room}", self.folder], check=True)
        yield
        subprocess.run(["mount", "-o", "remount,size=64m", self.folder], check=True)


class Limited:
    """The best that can be had without the right to mount: files of commands started now may not grow past a size."""

    says = "File too large"

    def __init__(self, folder: Path):
        self.folder = folder

    @contextmanager
    def full(self, room: int, largest: int | None = None):
        """Leave room for so many bytes in each file."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest or room, before[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=[Tmpfs, Limited])
def small_disk(request, tmp_path):
    """Return a folder on a disk that can be full: a small tmpfs (as root), and a limit on the size of files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounts = request.param is Tmpfs
    if not mounts and os.geteuid() == 0 and not request.config.getoption("--long"):
        pytest.skip("only with --long, where a small disk can be mounted")
    if mounts and (os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]).returncode):
        pytest.skip("mounting a small tmpfs needs root")
    yield request.param(folder)
    if mounts:
        subprocess.run(["umount", folder], check=True)
