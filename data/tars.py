"""Tars that nobody indexed, read as far as they are whole: what is torn or broken in them is counted."""

import logging
import math
import tarfile
from typing import BinaryIO

import numpy as np

from data.images import FIELDS
from data.shards.write import split_name

LATENT, LABEL = "npy", "cls"
BLOCK = 512  # bytes
log = logging.getLogger(__name__)
Spans = dict[str, tuple[int, int]]  # of a sample's fields: start and length


class Tar:
    """The samples of one tar, mapped into memory. Members of other fields than an image, npy and cls are ignored.

    Args:
        file: the tar, open.
        url: its name in messages.
        tolerance: fraction of its samples, rounded up, that may be unreadable.

    Raises:
        ValueError: not a tar, or no samples in it, or more than tolerated of it is lost.
    """

    def __init__(self, file: BinaryIO, url: str, tolerance: float):
        self.url, self.tolerance, self.skipped = url, tolerance, 0
        size = file.seek(0, 2)
        if not size:
            raise ValueError(f"{url}: empty; wanted a tar")
        self.data = np.memmap(file, np.uint8, "r")
        spans, end, seen = members(file, size)
        self.images = any(field in FIELDS for sample in spans.values() for field in sample)
        wanted = FIELDS if self.images else (LATENT,)
        self.samples = [(key, sample) for key, sample in spans.items() if any(field in sample for field in wanted)]
        if not self.samples:
            raise ValueError(f"{url}: no whole sample of {', '.join((*FIELDS, LATENT))} in a tar; it holds {sorted(seen)[:8]}")
        rest = self.data[end : end + BLOCK]
        broken = not len(rest) or bool(rest.any())  # a whole tar ends with zeros
        if broken and self.samples[-1][1].keys() != self.samples[0][1].keys():
            self.samples.pop()  # the rest of it is lost
        self.lost = max(1, (size - end) * len(self.samples) // end) if broken else 0  # as if the rest were like what is whole
        self.total = len(self.samples) + self.lost
        self.judge(f"the tar breaks off at byte {end:,} of {size:,}")

    def __len__(self) -> int:
        return len(self.samples)

    def skip(self, key: str, reason: object) -> None:
        """Count an unreadable sample."""
        self.skipped += 1
        self.judge(f"{key}: {reason}")

    def judge(self, reason: str) -> None:
        """Raise if more is lost than tolerated, or all; `reason` says what was lost last."""
        bad = self.lost + self.skipped
        if bad > math.ceil(self.tolerance * self.total) or self.skipped == len(self.samples):
            raise ValueError(
                f"{self.url}: {bad} of its {self.total} samples are unreadable ({reason}), more than a tolerance of "
                f"{self.tolerance:g} allows; repair or leave out that shard"
            )

    def report(self) -> None:
        """Log the counts, at the end of a shard."""
        bad = self.lost + self.skipped
        log.log(logging.WARNING if bad else logging.DEBUG, "%s: %d samples, %d of them skipped", self.url, self.total, bad)


def members(file: BinaryIO, size: int) -> tuple[dict[str, Spans], int, set[str]]:
    """Return the fields of each sample in an uncompressed tar of a size, where what is whole ends, and all fields seen."""
    samples: dict[str, Spans] = {}
    end, seen = 0, set()
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while member := tar.next():
                after = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.size < 0 or member.offset < end or member.offset_data + member.size > size:
                    break  # torn, or a forged header that leads back
                end = after
                tar.members.clear()  # type: ignore[attr-defined]  # which would grow with the tar
                if member.isreg() and not member.issparse() and (name := split_name(member.name)):
                    samples.setdefault(name[0], {})[name[1].lower()] = (member.offset_data, member.size)
                    seen.add(name[1].lower())
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, OSError):
        pass  # `end` tells how far it was whole
    return samples, min(end, size), seen
