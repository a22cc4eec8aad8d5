"""Leases: a run folder has one owner at a time, whose sign of life is the time of a file in it.

A command that finds another owner is refused. The lease of a dead owner is taken over: at once if
it ran on this machine, otherwise when it has given no sign of life for `EXPIRY_SECONDS`.
"""

import errno
import json
import os
import secrets
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from data.attempts import describe_job, exit_now
from data.files import canonical, process_space, process_start, read_clock, temporary_path

NAME = "lease.json"
RENEWAL_SECONDS = 15.0
EXPIRY_SECONDS = 90.0
WRITING_SECONDS = 2.0  # that a new lease may take to be written
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class Owner(NamedTuple):
    """The command that owns a folder."""

    space: str = "an unknown host"  # where the process's id is valid (data.files.process_space)
    host: str = "an unknown host"
    process: int = 0
    started: str = ""  # when the process began, in ticks of its machine: ids are used again
    job: str = ""  # of Slurm: ID, and ".N" after the Nth requeue
    world: int = 1  # processes
    since: str = ""
    token: str = ""  # tells leases apart
    inode: int = 0  # of the folder: a copied one has no owner

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"{self.host} (pid {self.process}{job}, {self.world} processes, since {self.since})"


UNKNOWN = Owner()


class Lease:
    """The lease of a folder, renewed by a thread until it is released.

    Args:
        folder: the folder; it is made if there is none.
        world: number of processes that work in it.

    Raises:
        ValueError: another command owns the folder; the message names it and its age.
    """

    def __init__(self, folder: Path, world: int):
        self.folder = folder
        self.path = folder / NAME
        self.is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.me = Owner(
            space=process_space(),
            host=os.uname().nodename,
            process=os.getpid(),
            started=process_start(os.getpid()),
            job=describe_job(),
            world=world,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=secrets.token_hex(8),
            inode=folder.stat().st_ino,
        )
        self.ended = threading.Event()
        while not self._create():
            self._remove_dead_owner()
        threading.Thread(target=self._renew, daemon=True).start()

    def release(self) -> None:
        """Give the folder free; remove it if it is new, and there is nothing in it."""
        self.ended.set()
        if read_owner(self.path) == self.me:
            self.path.unlink(missing_ok=True)
        if self.is_new:
            with suppress(OSError):  # it holds files
                self.folder.rmdir()

    def _create(self) -> bool:
        """Write the lease; return False if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("xb") as file:
                file.write(canonical(self.me._asdict()))
        except (FileExistsError, FileNotFoundError):  # a release has just removed the folder
            return False
        return True

    def _remove_dead_owner(self) -> None:
        """Remove the lease of an owner that is dead, after waiting for a sign of life if need be.

        Raises:
            ValueError: the owner is alive.
        """
        owner = read_owner(self.path)
        if owner is None:
            return
        age = self._age()
        if owner == UNKNOWN and age < WRITING_SECONDS:
            time.sleep(0.1)  # it is just being written
            return
        is_copied = owner.inode not in (0, self.me.inode)
        if is_copied or is_requeued(owner.job, self.me.job):
            is_dead = True
        elif owner.space == self.me.space:
            is_dead = process_start(owner.process) != owner.started
        else:
            is_dead = self._expires(owner, age)
        if read_owner(self.path) != owner:
            return  # meanwhile it has ended, or another command was faster
        if not is_dead:
            raise ValueError(
                f"{self.folder}: belongs to a command on {owner}, whose last sign of life was "
                f"{self._age():.0f} s ago; wait for its end or stop it, or choose another --out"
            )

        # Of several commands that find it dead, one succeeds in renaming it. One that is late has
        # renamed the new owner's lease, and puts it back.
        age = self._age()
        stale = temporary_path(self.path)
        try:
            self.path.rename(stale)
        except FileNotFoundError:
            return
        if read_owner(stale) == owner:
            end = "has ended" if owner.space == self.me.space else "seems to have ended"
            if is_copied:
                end = "works in the folder that this is a copy of"
            text = f"which {end}; its last sign of life was {age:.0f} s ago"
            print(f"rectify: {self.folder}: taken over from {owner}, {text}", file=sys.stderr)
        elif not self.path.exists():
            stale.rename(self.path)
            return
        stale.unlink()

    def _age(self) -> float:
        """Return the seconds since the last sign of life, by the clock of the file server."""
        with suppress(FileNotFoundError):
            return max(0.0, read_clock(self.folder) - self.path.stat().st_mtime)
        return 0.0

    def _expires(self, owner: Owner, age: float) -> bool:
        """Wait until an owner elsewhere gives a sign of life, or its lease has expired.

        Returns:
            Whether it expired.
        """
        if age < EXPIRY_SECONDS:
            wait = EXPIRY_SECONDS - age
            text = f"waiting up to {wait:.0f} s for a sign of life of its owner on {owner}"
            print(f"rectify: {self.folder}: {text}", file=sys.stderr, flush=True)
        last = age
        while last < EXPIRY_SECONDS:
            time.sleep(1)
            now = self._age()
            if now < last:
                return False
            last = now
        return True

    def _renew(self) -> None:
        """Renew the lease; end the process if another command has taken it over."""
        while not self.ended.wait(RENEWAL_SECONDS):
            with suppress(OSError):  # the file server may be away for a moment
                owner = read_owner(self.path)
                if owner == self.me:
                    os.utime(self.path)
                elif owner and not self.ended.is_set():
                    text = f"{self.folder}: was taken over by a command on {owner}; this one ends"
                    exit_now(2, text)


def is_requeued(earlier: str, job: str) -> bool:
    """Whether a job is another one that was queued again: the earlier one has ended.

    Args:
        earlier: job of an owner (`describe_job`): its id, and ".N" after the Nth requeue.
        job: of this command.
    """
    before, _, first = earlier.partition(".")
    now, _, second = job.partition(".")
    return before == now != "" and int(first or 0) < int(second or 0)


def read_owner(path: Path) -> Owner | None:
    """Return the owner in a lease; `UNKNOWN` if the file is damaged, None if there is none."""
    try:
        return Owner(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return UNKNOWN


_held: list[Lease] = []


def hold(folder: Path, world: int) -> None:
    """Own a folder until `release_all`; a folder that cannot be written has no owner.

    Args:
        folder: the folder.
        world: number of processes that work in it.

    Raises:
        ValueError: another command owns it; the message names it.
    """
    if any(lease.folder == folder for lease in _held):
        return
    try:
        _held.append(Lease(folder, world))
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise


def release_all() -> None:
    """Give all folders free that this command owns."""
    while _held:
        _held.pop().release()
