"""Claims: processes that come, go and differ in speed share units of work by claim files."""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from data.files import read_clock

MAX_LEASE = 1e6  # seconds


def check_lease(lease: float) -> None:
    """Check that a lease is 0, for none, or a duration that makes sense.

    Raises:
        ValueError: it is neither.
    """
    if lease and not 0.1 <= lease <= MAX_LEASE:
        raise ValueError(
            f"lease is {lease} seconds; it must be at least 0.1 (0 for none), "
            f"and at most {MAX_LEASE:.0f}"
        )


class Claims:
    """Claim files with a lease, in the folder of what is made.

    A process renews its claim; another one may take over a claim that was not renewed for `lease`
    seconds. Claims only save work: if two processes make the same unit, both write the same bytes
    under a temporary name.

    Args:
        folder: where the work is. The claims are in a hidden folder in it.
        lease: seconds, at least 0.1.
    """

    def __init__(self, folder: Path, lease: float):
        check_lease(lease)
        self.folder = folder / ".claims"
        self.lease = lease
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held: Path | None = None
        self.ended = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()

    def take(self, number: int) -> bool:
        """Claim a unit; return whether it worked."""
        path = self.folder / f"{number:06d}"
        if not self._create(path):
            # Remove a stale claim. Of several processes that try it, one succeeds.
            with suppress(FileNotFoundError):  # the claim was dropped meanwhile
                if read_clock(self.folder) - path.stat().st_mtime < self.lease:
                    return False
                stale = path.rename(self.folder / f"stale-{secrets.token_hex(8)}")
                stale.unlink()
            if not self._create(path):
                return False
        self.held = path
        return True

    def drop(self) -> None:
        """Give up the claim that is held."""
        held = self.held
        self.held = None
        if held:
            held.unlink(missing_ok=True)

    def end(self) -> None:
        """Stop renewing, and remove the folder if no other process uses it."""
        self.ended.set()
        self.drop()
        with suppress(OSError):  # it holds claims of others
            self.folder.rmdir()

    def _create(self, path: Path) -> bool:
        """Create a claim; return False if another process holds it."""
        try:
            self.folder.mkdir(exist_ok=True)  # another process may just have removed it
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except (FileExistsError, FileNotFoundError):
            # The claim exists, or the folder was removed with the last of the work.
            return False
        return True

    def _renew(self) -> None:
        while not self.ended.wait(self.lease / 4):
            held = self.held
            if held:
                # The claim may be dropped just now, or taken over while this process slept.
                with suppress(FileNotFoundError):
                    os.utime(held)


def claim_units(
    folder: Path,
    numbers: Iterable[int],
    is_finished: Callable[[int], object],
    lease: float,
) -> Iterator[tuple[int, bool]]:
    """Yield (number, True) for each unit to make, and (number, False) as others finish theirs.

    It ends when all units are finished. The unit of a process that died is made by another one.

    Args:
        folder: where the work is.
        numbers: of the units, in the order in which this process tries to claim them. Processes
            seldom collide if each begins with another one.
        is_finished: whether the unit of a number is finished.
        lease: seconds after which a claim that was not renewed may be taken over.
    """
    claims = Claims(folder, lease)
    left = list(numbers)
    try:
        while left:
            before = len(left)
            for number in list(left):
                if is_finished(number):
                    left.remove(number)
                    yield number, False
                elif claims.take(number):
                    # Its previous owner may have finished it since it was tested above.
                    if not is_finished(number):
                        yield number, True
                    claims.drop()
                    left.remove(number)
            if len(left) == before:
                time.sleep(min(1.0, lease / 4))  # others are making all that is left
    finally:
        claims.end()
