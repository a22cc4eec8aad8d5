"""Claims: processes that come, go and differ in speed share the shards of a set through files in its folder."""

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data.shards.write import ShardWriter


class Claims:
    """Claim files with leases: the owner renews its claim; one that was not renewed for `lease` seconds may be taken over.

    Two owners of one shard would do no harm, as both write the same bytes under a temporary name: claims only save work.

    Args:
        folder: of the set; the claims lie in a hidden folder in it.
        lease: seconds.
    """

    def __init__(self, folder: Path, lease: float):
        if lease < 0.1:
            raise ValueError(f"lease: {lease} seconds, it must be at least 0.1 (0 for none)")
        self.folder, self.lease = folder / ".claims", lease
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held: Path | None = None
        self.ended = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()

    def take(self, number: int) -> bool:
        """Claim a shard, and tell whether it worked."""
        path = self.folder / f"{number:06d}"
        if not self._create(path):
            with suppress(FileNotFoundError):  # dropped meanwhile
                if self._now() - path.stat().st_mtime < self.lease:
                    return False
                stale = path.rename(self.folder / f"stale-{secrets.token_hex(8)}")  # of several takers one succeeds
                stale.unlink()
            if not self._create(path):
                return False
        self.held = path
        return True

    def drop(self) -> None:
        """Give the claim back."""
        held, self.held = self.held, None
        if held:
            held.unlink(missing_ok=True)

    def end(self) -> None:
        """Stop renewing, and remove the folder if nobody else needs it."""
        self.ended.set()
        self.drop()
        with suppress(OSError):  # others' claims are in it
            self.folder.rmdir()

    def _create(self, path: Path) -> bool:
        try:
            self.folder.mkdir(exist_ok=True)  # the last but one may just have removed it
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except (FileExistsError, FileNotFoundError):  # somebody's; or the folder went just now, with the last of the work
            return False
        return True

    def _now(self) -> float:
        """Return the time by the clock that stamps the claims: the file server's."""
        probe = self.folder / f"now-{secrets.token_hex(8)}"
        probe.touch()
        stamp = probe.stat().st_mtime
        probe.unlink()
        return stamp

    def _renew(self) -> None:
        while not self.ended.wait(self.lease / 4):
            if held := self.held:
                with suppress(FileNotFoundError):  # dropped just now, or taken over while this process slept
                    os.utime(held)


def claimed(shards: ShardWriter, first: int, lease: float) -> Iterator[tuple[int, bool]]:
    """Yield (number, True) of each shard that this process is to make, and (number, False) as others finish theirs.

    It ends when all are finished: the shard of a process that died is made by one that is still there.

    Args:
        shards: the set.
        first: number to begin with, another one for each process, so that they seldom want the same.
        lease: seconds after which a claim that was not renewed is taken over.
    """
    claims, left = Claims(shards.folder, lease), list(shards.numbers())
    left = left[first % len(left) :] + left[: first % len(left)]
    try:
        while left:
            before = len(left)
            for number in list(left):
                if shards.finished(number):
                    left.remove(number)
                    yield number, False
                elif claims.take(number):
                    if not shards.finished(number):  # by its last owner, since the look above
                        yield number, True
                    claims.drop()
                    left.remove(number)
            if len(left) == before:
                time.sleep(min(1.0, lease / 4))  # all that is left is being made by others
    finally:
        claims.end()
