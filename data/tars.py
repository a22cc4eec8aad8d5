"""Tars without an index, read as far as they are intact; damaged samples are counted."""

import logging
import math
import tarfile
from typing import BinaryIO, NamedTuple

import numpy as np

from data.images import IMAGE_FIELDS
from data.shards.write import TAR_BLOCK, split_name

LATENT_FIELD = "npy"
LABEL_FIELD = "cls"
log = logging.getLogger(__name__)
Spans = dict[str, tuple[int, int]]  # of a sample, by field: start and length in the tar


class Tar:
    """The samples of one tar, mapped into memory.

    Members with other fields than an image, npy and cls are ignored.

    Args:
        file: the tar, open.
        url: its name in messages.
        tolerance: fraction of its samples, rounded up, that may be unreadable.

    Raises:
        ValueError: it is no tar, has no samples, or lost more than the tolerance.
    """

    def __init__(self, file: BinaryIO, url: str, tolerance: float):
        self.url = url
        self.tolerance = tolerance
        self.skipped = 0
        size = file.seek(0, 2)
        if not size:
            raise ValueError(f"{url}: the file is empty; it must be a tar")
        self.data = np.memmap(file, np.uint8, "r")
        contents = scan_tar(file, size)

        # Keep the samples with an image, or with a latent if no sample has an image.
        self.images = any(field in IMAGE_FIELDS for field in contents.fields)
        wanted = IMAGE_FIELDS if self.images else (LATENT_FIELD,)
        self.samples: list[tuple[str, Spans]] = []
        for key, spans in contents.samples.items():
            if any(field in spans for field in wanted):
                self.samples.append((key, spans))
        if not self.samples:
            raise ValueError(
                f"{url}: no complete sample of {', '.join((*IMAGE_FIELDS, LATENT_FIELD))} "
                f"in a tar; it holds {sorted(contents.fields)[:8]}"
            )

        # A complete tar ends with zeros. Otherwise estimate how many samples are lost.
        self.lost = 0
        following = self.data[contents.end : contents.end + TAR_BLOCK]
        if not len(following) or following.any():
            if self.samples[-1][1].keys() != self.samples[0][1].keys():
                self.samples.pop()  # some of its fields are lost
            missing = size - contents.end
            self.lost = max(1, missing * len(self.samples) // contents.end)
        self.total = len(self.samples) + self.lost
        self.check_tolerance(f"the tar breaks off at byte {contents.end:,} of {size:,}")

    def __len__(self) -> int:
        return len(self.samples)

    def skip(self, key: str, reason: object) -> None:
        """Count an unreadable sample."""
        self.skipped += 1
        self.check_tolerance(f"{key}: {reason}")

    def check_tolerance(self, reason: str) -> None:
        """Check that no more samples are lost than tolerated, and not all.

        Args:
            reason: why the last sample was lost.
        """
        bad = self.lost + self.skipped
        tolerated = math.ceil(self.tolerance * self.total)
        if bad > tolerated or self.skipped == len(self.samples):
            raise ValueError(
                f"{self.url}: {bad} of its {self.total} samples are unreadable ({reason}), more "
                f"than a tolerance of {self.tolerance:g} allows; repair or leave out that shard"
            )

    def report(self) -> None:
        """Log the counts, at the end of a shard."""
        bad = self.lost + self.skipped
        level = logging.WARNING if bad else logging.DEBUG
        log.log(level, "%s: %d samples, %d of them skipped", self.url, self.total, bad)


class TarContents(NamedTuple):
    """What is intact in a tar."""

    samples: dict[str, Spans]  # by key
    end: int  # byte at which the intact part ends
    fields: set[str]  # of all samples


def scan_tar(file: BinaryIO, size: int) -> TarContents:
    """Find the samples in the intact part of an uncompressed tar of `size` bytes."""
    samples: dict[str, Spans] = {}
    fields: set[str] = set()
    end = 0
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            member = tar.next()
            while member:
                # Stop where a member is torn, or where a forged header leads back.
                blocks = -(-member.size // TAR_BLOCK)
                backward = member.size < 0 or member.offset < end
                if backward or member.offset_data + member.size > size:
                    break
                end = member.offset_data + blocks * TAR_BLOCK

                # Forget the members so far: the list would grow with the tar.
                tar.members.clear()  # type: ignore[attr-defined]

                # Note the field of a sample.
                plain = member.isreg() and not member.issparse()
                name = split_name(member.name) if plain else None
                if name:
                    key, field = name
                    samples.setdefault(key, {})[field.lower()] = (member.offset_data, member.size)
                    fields.add(field.lower())
                member = tar.next()
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, OSError):
        pass  # the tar is damaged from `end` on, which the caller handles
    return TarContents(samples, min(end, size), fields)
