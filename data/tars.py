"""What tars of other programs hold: their samples, chosen and checked alike by all readers."""

import logging
import math
import re
from typing import BinaryIO, NamedTuple

import numpy as np

from data.files import describe_error
from data.latents import FIELD as LATENT_FIELD
from data.pixels import COMMON_FIELDS, IMAGE_FIELDS, PixelOptions, check_pixel_options
from data.schema import shorten
from data.shards.scan import PassedOver, Spans, TarContents, describe_passed_over, scan_tar

LABEL_FIELD = "cls"
NAMED_FIELDS = (*COMMON_FIELDS, LATENT_FIELD)  # of those that are read, in messages
MAX_CLASSES = 10**6  # more are taken for ids
FIRST_DOT = "the field is all that follows the first dot of a name"
NAME_FIELD = "name the one to read with the option"
log = logging.getLogger(__name__)


def check_options(
    tolerance: float, classes: int, scale: float | None, pixels: PixelOptions
) -> None:
    """Check the options with which tars of other programs are read.

    Raises:
        ValueError: one is out of its range.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it must be in [0, 1)")
    if not 0 <= classes <= MAX_CLASSES:
        raise ValueError(
            f"classes is {classes}; it must be a number from 0 to {MAX_CLASSES} (.{LABEL_FIELD} is "
            "the number of a class, no id)"
        )
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; it must be positive")
    check_pixel_options(pixels)


def check_used(
    url: str, kind: str, scale: float | None, pixels: PixelOptions, size: int | None = None
) -> None:
    """Check that no option is given that changes nothing, because it is for the other kind.

    Args:
        url: the tars, for the message.
        kind: what they hold, images or latents.
        scale: factor of latents.
        pixels: how images become pixels.
        size: of images.
    """
    given = []
    if kind == "images" and scale is not None:
        given.append("scale")
    if kind == "latents":
        options = {"size": size, **pixels._asdict()}
        unset = {"size": None, **PixelOptions()._asdict()}
        given = [name for name, value in options.items() if value != unset[name]]
    if given:
        raise ValueError(f"{url}: holds {kind}, for which there is no option {', '.join(given)}")


class ChosenSamples(NamedTuple):
    """The samples of a tar that hold what is read, and how many do not."""

    kind: str | None  # images or latents; None without samples
    samples: list[tuple[str, Spans]]  # key and spans; an image is under its last suffix
    missing: int  # samples that lack it
    reason: str  # what the first of them lacks
    extras: dict[str, PassedOver]  # fields such as seg.png that only some samples have


def field_kind(field: str) -> str:
    """Return what a field holds: images or latents.

    Raises:
        ValueError: neither.
    """
    suffix = field.rpartition(".")[2]
    if suffix in IMAGE_FIELDS:
        return "images"
    if suffix == LATENT_FIELD:
        return "latents"
    raise ValueError(f"field is {field!r}; it must end in one of {', '.join(NAMED_FIELDS)}")


def choose_samples(
    contents: TarContents, url: str, field: str | None, option: str = "field"
) -> ChosenSamples:
    """Choose the samples with an image, or with a latent if no sample has an image.

    Args:
        contents: of the tar.
        url: its name in messages.
        field: the only field that is read, instead of any image or latent.
        option: the user's option that names it, for messages.

    Raises:
        ValueError: a sample has several images, and no field is named.
    """
    # What is read.
    present = {name for _, spans in contents.samples for name in spans}
    wanted: tuple[str, ...] = (LATENT_FIELD,)
    expected = wanted
    if field:
        wanted = expected = (field.lower(),)
    elif present.intersection(IMAGE_FIELDS):
        wanted = IMAGE_FIELDS
        expected = COMMON_FIELDS
    elif LATENT_FIELD not in present:
        expected = NAMED_FIELDS
    if not present and contents.passed_over:
        raise ValueError(
            f"{url}: has no samples, only {describe_passed_over(contents.passed_over)}"
        )

    # The samples that have it.
    names = set(wanted)
    samples: list[tuple[str, Spans]] = []
    dotted_fields: dict[str, PassedOver] = {}  # such as v2.jpg, with the key of the first
    missing = 0
    reason = ""
    for key, spans in contents.samples:
        found = [name for name, (_, size) in spans.items() if name in names and size > 0]
        dotted = [name for name in spans if is_dotted(name, wanted)]
        if len(found) > 1:
            raise ValueError(
                f"{url}: {key} has several images (.{', .'.join(found)}); {NAME_FIELD} `{option}`"
            )
        if not found:
            missing += max(1, len(dotted))
            reason = reason or f"{key}: {_explain_missing(spans, expected)}"
            continue
        samples.append((key, _keep_chosen(spans, found[0])))
        for name in dotted:
            first, count = dotted_fields.get(name, (key, 0))
            dotted_fields[name] = PassedOver(first, count + 1)

    # A field such as seg.png belongs to several samples. A single one is an image with a dot in
    # its name.
    extras: dict[str, PassedOver] = {}
    for name, (key, count) in dotted_fields.items():
        if count == len(samples) or field:
            continue
        if count > 1:
            extras[name] = PassedOver(f"{key}.{name}", count)
        else:
            missing += 1
            reason = reason or f"{key}.{name}: {FIRST_DOT}; rename it, or {NAME_FIELD} `{option}`"
    kind = field_kind(wanted[0]) if samples else None
    return ChosenSamples(kind, samples, missing, reason, extras)


def is_dotted(field: str, wanted: tuple[str, ...]) -> bool:
    """Whether a field is a wanted one after another part, such as v2.jpg."""
    start, _, suffix = field.rpartition(".")
    return bool(start) and suffix in wanted


def _keep_chosen(spans: Spans, field: str) -> Spans:
    """Return the spans of a sample without other images than the chosen one."""
    kept = {field.rpartition(".")[2]: spans[field]}
    for name, span in spans.items():
        if name not in kept and name not in IMAGE_FIELDS:
            kept[name] = span
    return kept


def _explain_missing(spans: Spans, expected: tuple[str, ...]) -> str:
    """Return what a sample lacks."""
    text = f"it has no .{' or .'.join(expected)}"
    if not spans:
        return f"{text}, and nothing else that can be read"
    return f"{text}, but {shorten(sorted(spans))} ({FIRST_DOT}; empty members do not count)"


def parse_label(data: np.ndarray) -> int:
    """Return the number of a class in the bytes of a .cls; blanks around it are ignored.

    Raises:
        ValueError: it is no class number.
    """
    text = data.tobytes()
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text):
        raise ValueError(
            f".{LABEL_FIELD} is {shorten(text)}; it must be a class number (`classes` 0 reads none)"
        )
    return int(text)


def check_tolerance(url: str, bad: int, total: int, tolerance: float, reason: str) -> None:
    """Check that no more samples are lost than tolerated, and not all.

    Args:
        url: the tar.
        bad: samples that are lost.
        total: all samples of the tar.
        tolerance: fraction of them, rounded up, that may be lost.
        reason: why one of them is lost.
    """
    if bad > math.ceil(tolerance * total) or 0 < total <= bad:
        raise ValueError(
            f"{url}: {bad} of its {total} samples are unreadable ({reason}), more "
            f"than a tolerance of {tolerance:g} allows; repair or leave out that shard"
        )


class Tar:
    """The samples of one tar, read as far as it is intact and mapped into memory.

    Members with other fields than an image, npy and cls are ignored.

    Args:
        file: the tar, open.
        url: its name in messages.
        tolerance: fraction of its samples, rounded up, that may be unreadable.
        field: the only field that is read, instead of any image or latent.
        labelled: every sample must have a class.
        option: the user's option that names the field, for messages.

    Raises:
        ValueError: it is no tar, lost more samples than the tolerance, or its samples are
            ambiguous or lack a class.
    """

    def __init__(
        self,
        file: BinaryIO,
        url: str,
        tolerance: float,
        field: str | None = None,
        labelled: bool = False,
        option: str = "field",
    ):
        self.url = url
        self.tolerance = tolerance
        self.skipped = 0
        size = file.seek(0, 2)
        if not size:
            raise ValueError(f"{url}: the file is empty; it must be a tar")
        self.data = np.memmap(file, np.uint8, "r")
        contents = scan_tar(file, size, url)
        self.passed_over = contents.passed_over

        # Leave out the last sample if some of its fields are lost with the end of the tar.
        found = contents.samples
        if not contents.complete and found and found[-1][1].keys() != found[0][1].keys():
            found.pop()

        # Keep the samples that hold what is read.
        chosen = choose_samples(contents, url, field, option)
        self.samples = chosen.samples
        self.images = chosen.kind == "images"
        for name, extra in chosen.extras.items():
            self.passed_over[f".{name} is a field of some samples alone"] = extra
        if not self.samples and not (contents.complete and not contents.samples):
            present = sorted({name for _, spans in found for name in spans})
            raise ValueError(
                f"{url}: no complete sample of {field or ', '.join(NAMED_FIELDS)} "
                f"in a tar; it holds {shorten(present)}. {chosen.reason}"
            )
        if labelled:
            self._check_labels()

        # Count what is lost; of a damaged end it is an estimate.
        self.lost = chosen.missing
        self.reason = chosen.reason
        if not contents.complete:
            absent = size - contents.end
            self.lost += max(1, absent * len(self.samples) // contents.end)
            self.reason = f"the tar breaks off at byte {contents.end:,} of {size:,}"
        self.total = len(self.samples) + self.lost
        check_tolerance(url, self.lost, self.total, tolerance, self.reason)

    def __len__(self) -> int:
        return len(self.samples)

    def _check_labels(self) -> None:
        for key, spans in self.samples:
            if LABEL_FIELD not in spans:
                raise ValueError(
                    f"{self.url}: {key} has no .{LABEL_FIELD}; set data.source.classes to 0 to "
                    "read no classes"
                )

    def skip(self, key: str, error: Exception) -> None:
        """Count an unreadable sample."""
        self.skipped += 1
        self.reason = self.reason or f"{key}: {describe_error(error)}"
        bad = self.lost + self.skipped
        check_tolerance(self.url, bad, self.total, self.tolerance, self.reason)

    def report(self) -> None:
        """Log the counts, at the end of a shard."""
        bad = self.lost + self.skipped
        level = logging.WARNING if bad or not self.total else logging.DEBUG
        reason = f" ({self.reason})" if bad else ""
        log.log(level, "%s: %d samples, %d of them skipped%s", self.url, self.total, bad, reason)
