"""Listing images: which kind of source they come from, and what is read with them."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.captions import checksum_captions
from data.files import canonical, check_folder, digest
from data.folders import scan_folder
from data.images import LazyImage
from data.listings.entries import TEXT_SOURCES, ImageSource, WrongEntries
from data.listings.fields import (
    COMMON_NAMES,
    FieldReader,
    Fields,
    describe_names,
    number_classes,
)
from data.listings.folder import FolderSource
from data.listings.listing import Listing, ListingOptions
from data.listings.lists import LIST_SUFFIXES, ListSource
from data.listings.tar_files import TarSource

CONTAINERS = (".tar", ".parquet")  # files that hold images


def list_images(images: Path, options: ListingOptions, out: Path) -> Listing:
    """Return the images of a source with their classes and captions.

    Args:
        images: a folder of images, a list of them (.csv, .tsv, .jsonl, .json or .parquet), a
            webdataset tar, or a folder of tars or of parquet files.
        options: what is read with the images.
        out: folder of the packed set, which is no part of the source.

    Raises:
        OSError: a file does not exist or cannot be read.
        ValueError: an option, a file or too many of the entries are wrong.
    """
    check_options(options)
    fields = FieldReader(options)
    wrong = WrongEntries(options.tolerance)
    source = open_source(images, options, fields, wrong, out)

    items, class_values, rejected = read_entries(source, fields, wrong)
    captioned = bool(fields.used)
    required = bool(fields.weights) or (source.captions_required and fields.automatic)
    total = len(items) - len(rejected) + wrong.count

    # Without captions or other fields, files beside the images mean nothing.
    if not (captioned or required or source.captions_required or fields.other_names):
        if rejected:
            wrong.check(total)
        check_lines(images, options, fields)
        lines = [*source.lines, *describe_numeric(fields)]
        return Listing(items, source.classes, source.passed_over, source.checksum, None, lines)

    # Leave out what is wrong.
    wrong.check(total)
    if rejected:
        items = [item for i, item in enumerate(items) if i not in rejected]
        class_values = [value for i, value in enumerate(class_values) if i not in rejected]
    if not items:
        raise ValueError(f"{images}: has no images")
    fields.check_names(images)
    classes = source.classes
    if options.class_field:
        items, classes = label_images(items, class_values, options)

    # Check the captions.
    captions = None
    if required and not captioned:
        raise ValueError(
            f"{images}: no image has a caption ({describe_names(fields.names)}); name columns, "
            "JSON keys or suffixes with --captions, or read no captions (--captions none)"
        )
    check_lines(images, options, fields)
    if captioned:
        check_uncaptioned(images, items, options.uncaptioned)
        captions = checksum_captions(item.captions for item in items)

    # Describe what was read.
    passed_over = source.passed_over - source.read_files
    lines = list(source.lines)
    if captioned:
        lines += describe_captions(items, fields)
    if wrong.count:
        lines.append(f"left out {wrong.count} wrong entries: {wrong.describe()}")
        passed_over["wrong entries"] = wrong.count
    identity = [source.checksum, captions, classes, checksum_facts(items)]
    return Listing(items, classes, passed_over, digest(canonical(identity)), captions, lines)


class ReadEntries(NamedTuple):
    """The images of a source with their fields."""

    items: list[LazyImage]
    class_values: list[str | None]  # of the images
    rejected: set[int]  # indices of the images that have wrong fields


def read_entries(source: ImageSource, fields: FieldReader, wrong: WrongEntries) -> ReadEntries:
    """Read all images of a source. Those with wrong fields are counted, and have no captions."""
    items: list[LazyImage] = []
    class_values: list[str | None] = []
    rejected: set[int] = set()
    for entry in source.entries():
        try:
            found = fields.read(entry.name, entry.records)
        except ValueError as error:
            wrong.add(error)
            rejected.add(len(items))
            found = Fields((), None, None)
        items.append(LazyImage(entry.name, entry.open, entry.label, found.captions, found.kept))
        class_values.append(found.class_value)
    return ReadEntries(items, class_values, rejected)


def check_lines(images: Path, options: ListingOptions, fields: FieldReader) -> None:
    """Check that the option `lines` changes something.

    Raises:
        ValueError: it is set, but no caption comes from a text file.
    """
    if options.lines and not any(kind in TEXT_SOURCES for kind, _ in fields.used):
        raise ValueError(f"{images}: lines is set, but no caption comes from a text file (.txt)")


def check_options(options: ListingOptions) -> None:
    """Check the options that are the same for all sources.

    Raises:
        ValueError: one is out of its range, or two contradict each other.
    """
    if not 0 <= options.uncaptioned <= 1:
        raise ValueError(f"uncaptioned is {options.uncaptioned}; it must lie in [0, 1]")
    if not 0 <= options.tolerance < 1:
        raise ValueError(f"tolerance is {options.tolerance}; it must lie in [0, 1)")
    if options.class_field and options.classes not in (None, "none"):
        raise ValueError(
            f"class_field is {options.class_field!r} and classes is {options.classes!r}; give one "
            "of them: classes come from values or from folders"
        )


def open_source(
    images: Path, options: ListingOptions, fields: FieldReader, wrong: WrongEntries, out: Path
) -> ImageSource:
    """Return the source of images that a path is.

    Raises:
        OSError: there is no such path.
        ValueError: it is a file of another kind, or an option is for another kind of source.
    """
    if images.is_file():
        suffix = images.suffix.lower()
        if suffix == ".tar":
            return TarSource([images], options, fields)
        if suffix in LIST_SUFFIXES:
            return ListSource([images], options, fields, wrong)
        raise ValueError(
            f"{images}: is no source of images; give a folder, a list of images "
            f"({', '.join(LIST_SUFFIXES)}) or a .tar (uncompressed)"
        )

    # A folder that has images is a folder of images, whatever else lies in it.
    check_folder(images)
    with os.scandir(images) as found:
        files = sorted(Path(entry.path) for entry in found if entry.name.endswith(CONTAINERS))
    files = [path for path in files if not path.name.startswith(".")]
    if files and not scan_folder(images, Counter())[0]:
        tars = [path for path in files if path.suffix == ".tar"]
        if not tars:
            return ListSource(files, options, fields, wrong)
        source = TarSource(tars, options, fields)
        source.count_others()
        return source
    return FolderSource(images, options, fields, wrong, out)


def label_images(
    items: list[LazyImage], values: list[str | None], options: ListingOptions
) -> tuple[list[LazyImage], list[str]]:
    """Return images with the classes that their values name, and the names of the classes.

    Raises:
        ValueError: an image has no class.
    """
    without = [item.name for item, value in zip(items, values) if value is None]
    if without:
        raise ValueError(
            f"{without[0]}: has no class in {options.class_field!r}, as {len(without)} of "
            f"{len(items)} images; give all images a class, or leave out --class_field"
        )
    classes, labels = number_classes([value for value in values if value], options.natural)
    return [item._replace(label=label) for item, label in zip(items, labels)], classes


def check_uncaptioned(images: Path, items: Sequence[LazyImage], allowed: float) -> None:
    """Check that no more images than allowed are without a caption.

    Raises:
        ValueError: there are more.
    """
    without = [item.name for item in items if not item.captions]
    if len(without) > allowed * len(items):
        raise ValueError(
            f"{images}: {len(without)} of {len(items)} images have no caption, such as "
            f"{without[0]}, more than {100 * allowed:g} %; add captions, allow this "
            f"(--uncaptioned {fraction_up(len(without), len(items)):g}), or read no captions "
            "(--captions none)"
        )


def fraction_up(part: int, total: int) -> float:
    """Return a fraction of two decimals that is at least part / total."""
    return -(-100 * part // total) / 100


def describe_captions(items: Sequence[LazyImage], fields: FieldReader) -> list[str]:
    """Return the lines that say where captions come from, and how many images have how many."""
    # Where they come from.
    parts = []
    for (kind, name), count in sorted(fields.used.items()):
        shown = kind if kind in TEXT_SOURCES else f"{name!r} of {kind}"
        parts.append(f"{shown} ({count} images)")
    lines = [f"captions: {', '.join(parts)}"]
    used = {name for _, name in fields.used}
    unused = [name for name in fields.names if name.lower() in COMMON_NAMES and name not in used]
    if fields.automatic and unused:
        names = ",".join([*sorted(used), *sorted(unused)])
        lines.append(
            f"captions: {', '.join(sorted(unused))} not read; --captions {names} reads all of them"
        )

    # How many there are.
    counts = Counter(len(item.captions) for item in items)
    parts = [f"{counts[number]} have {number}" for number in sorted(counts) if number]
    without = [item.name for item in items if not item.captions]
    if without:
        parts.append(f"{len(without)} have none, such as {without[0]}")
    lines.append(f"captions per image: {', '.join(parts)}")
    if fields.several_lines:
        lines.append(
            f"captions: {fields.several_lines} text files have several lines, which are one "
            "caption; with --lines each line is a caption"
        )
    return lines + describe_numeric(fields)


def describe_numeric(fields: FieldReader) -> list[str]:
    """Return the line that says how many text files hold numbers alone, if any does."""
    if not fields.numeric:
        return []
    return [
        f"captions: {fields.numeric} text files hold numbers alone and are not read; "
        "--captions txt reads them"
    ]


def checksum_facts(items: Sequence[LazyImage]) -> str:
    """Return the sha256 of the names of images, their classes and what is kept of them."""
    to_json = json.JSONEncoder(sort_keys=True).encode  # json.dumps would make one every time
    found = hashlib.sha256()
    for item in items:
        found.update(to_json([item.name, item.label, item.kept]).encode())
        found.update(b"\n")
    return found.hexdigest()
