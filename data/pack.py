"""Packing: a folder of images, or the bundled digits, is written into shards of PNG."""

import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data.digits import DIGIT_CLASSES, digits
from data.files import canonical, describe_error, digest, is_machine_fault, raise_named
from data.folders import (
    ImageFolder,
    describe_classes,
    describe_passed_over,
    describe_twins,
    find_images,
)
from data.images import LazyImage, fit_image
from data.noise import permutation
from data.pixels import PixelOptions, check_pixel_options, open_image
from data.progress import Meter
from data.schema import check_schema
from data.shards import ShardWriter

HOLDOUT_SEED = 0
# What a mended folder changes in a plan, or an option without which it was refused.
DERIVED = ("source", "listing", "classes", "count", "size", "grey", "white", "background")
SHOWN_NAMES = 10  # unreadable images that an error names


def pack(
    out: Path,
    images: Path | None = None,
    size: int = 32,
    grey: bool = False,
    holdout: float = 0.1,
    shard: int = 1024,
    classes: str | None = None,
    natural: bool = False,
    background: str = "white",
    white: float | None = None,
    tolerance: float = 0.01,
) -> None:
    """Pack images into webdataset shards of PNG: OUT/train and OUT/heldout.

    Args:
        out: folder for the two sets.
        images: folder of images; its subfolders are classes. By default scikit-learn's handwritten
            digits.
        size: height and width in pixels; images are scaled and centre-cropped.
        grey: one channel instead of three. The digits are always grey.
        holdout: fraction of the images that is held out from training. The choice is random, but
            the same every time. No class loses more than half of its images, or twice its share.
        shard: images in one shard.
        classes: the class of an image is the first folder of its path (top), the folder that holds
            it (leaf), there are none (none), or they are listed in a file, one folder a line. By
            default top if there are subfolders.
        natural: number the classes by the numbers in their names, 2 before 10.
        background: colour on which transparent images are laid, such as white or #808080.
        white: value of white in images of 16 or 32 bits and floats. By default 65535 for 16 bits;
            others must declare it.
        tolerance: fraction of the images that may be unreadable; they are skipped and named.
    """
    # Check the options before anything is written.
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is {holdout}; it must lie in [0, 1)")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; it must lie in [0, 1)")
    for name, value in {"size": size, "shard": shard}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    options = PixelOptions(grey or images is None, background, white)
    check_pixel_options(options)

    # Find the images, and split them.
    if images:
        found = find_images(images, classes, natural, out)
        items = open_later(images, found)
        class_names = found.classes
        passed_over = found.passed_over
        twins = describe_twins(found.names)
        if twins:
            print(f"pack: {twins}", file=sys.stderr)
    else:
        items = digits()
        class_names = DIGIT_CLASSES
        passed_over = Counter[str]()
    labels = [item.label for item in items]
    splits = split_images(labels, holdout)
    if class_names is not None:
        print(f"pack: {describe_classes(class_names, labels)}", file=sys.stderr)

    # Pack each split.
    provenance: dict[str, Any] = {
        "source": str(images or "sklearn.datasets.load_digits"),
        "size": size,
        "grey": options.grey,
        "classes": class_names,
        "holdout": holdout,
        "listing": checksum_listing(images, items),
    }
    for key in ("background", "white"):  # only if they are not the default
        if getattr(options, key) != getattr(PixelOptions(), key):
            provenance[key] = getattr(options, key)
    unreadable = UnreadableImages(len(items), tolerance)
    writers = []
    with Meter("pack", len(items), "images") as meter:
        for split, members in splits.items():
            if members:
                plan = {**provenance, "split": split}
                writer = ShardWriter(out / split, "images", plan, len(members), shard, DERIVED)
                pack_split(writer, [items[i] for i in members], options, meter, unreadable)
                writers.append(writer)
    for writer in writers:  # no split is finished before all are readable
        writer.finish()

    # Name what is not in the sets.
    for name, reason in unreadable.reasons.items():
        print(f"pack: skipped unreadable {name} ({reason})", file=sys.stderr)
    if unreadable.reasons:
        passed_over["unreadable"] = len(unreadable.reasons)
    if passed_over:
        count = len(items) - len(unreadable.reasons)
        print(f"pack: {count} images{describe_passed_over(passed_over)}", file=sys.stderr)


class UnreadableImages:
    """Images that could not be read. Too many of them are an error.

    Args:
        total: number of all images.
        tolerance: fraction of them that may be unreadable.
    """

    def __init__(self, total: int, tolerance: float):
        self.reasons: dict[str, str] = {}  # by name
        self.total = total
        self.tolerance = tolerance

    def check(self, excess: int = 0) -> None:
        """Check that no more images are unreadable than tolerated.

        Args:
            excess: number of images more, that are collected so that one error names them.

        Raises:
            ValueError: there are more.
        """
        count = len(self.reasons)
        if count <= self.tolerance * self.total + excess:
            return
        parts = [f"{name} ({reason})" for name, reason in self.reasons.items()]
        more = ""
        if count > SHOWN_NAMES:
            more = f" and {count - SHOWN_NAMES} more"
        raise ValueError(
            f"unreadable: {', '.join(parts[:SHOWN_NAMES])}{more}; these are more than "
            f"{100 * self.tolerance:g} % of the {self.total} images; repair or remove them, or "
            "raise --tolerance"
        )


def open_later(folder: Path, found: ImageFolder) -> list[LazyImage]:
    """Return the images of a folder."""
    items = []
    for i, name in enumerate(found.names):
        label = found.labels[i] if found.labels else None
        items.append(LazyImage(str(name), partial(open_image, folder / name, name.suffix), label))
    return items


def split_images(labels: Sequence[int | None], holdout: float) -> dict[str, list[int]]:
    """Return the ascending indices of the images in each split.

    The choice is random, but at most half of a class, or twice its share, is held out, and never
    all of it.

    Args:
        labels: the class of each image, or None.
        holdout: fraction that is held out.
    """
    count = len(labels)
    heldout_count = min(round(holdout * count), count - 1)
    room: dict[int | None, int] = {}  # of each class: images that may still be held out
    for label, size in Counter(labels).items():
        room[label] = min(size - 1, max(size // 2, round(2 * holdout * size)))
    heldout: set[int] = set()
    for i in permutation(count, HOLDOUT_SEED).tolist():
        if len(heldout) < heldout_count and room[labels[i]] > 0:
            room[labels[i]] -= 1
            heldout.add(i)
    train = [i for i in range(count) if i not in heldout]
    return {"train": train, "heldout": sorted(heldout)}


def checksum_listing(folder: Path | None, items: list[LazyImage]) -> str:
    """Return a checksum of names, sizes and modification times, which identifies the images."""
    names = [item.name for item in items]
    stats = []
    if folder:
        for name in names:
            stat = (folder / name).stat()
            stats.append([stat.st_size, stat.st_mtime_ns])
    return digest(canonical([names, stats]))


def image_to_png(image: Image.Image) -> bytes:
    """Return an image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def pack_split(
    writer: ShardWriter,
    items: list[LazyImage],
    options: PixelOptions,
    meter: Meter,
    unreadable: UnreadableImages,
) -> None:
    """Pack one split. Unreadable images are skipped, and named in the record of their shard."""
    for number in writer.numbers():
        indices = writer.indices(number)
        record = writer.finished(number)
        if record:
            meter.add(len(indices))
            check_schema(record, {"skipped": [str]}, f"{writer.folder}: record of shard {number}")
            unreadable.reasons.update(dict.fromkeys(record["skipped"], "in an earlier run"))
        else:
            # The samples are made while they are written; then this list is complete.
            skipped: list[str] = []
            images = [(i, items[i]) for i in indices]
            samples = make_samples(images, writer.plan["size"], options, meter, unreadable, skipped)
            writer.write(number, samples, skipped=skipped)


def make_samples(
    images: list[tuple[int, LazyImage]],
    size: int,
    options: PixelOptions,
    meter: Meter,
    unreadable: UnreadableImages,
    skipped: list[str],
) -> Iterator[dict[str, Any]]:
    """Yield the samples of one shard.

    Args:
        images: of the shard, with their indices.
        size: height and width in pixels.
        options: how an image becomes pixels.
        meter: counts the images.
        unreadable: receives the images of all shards that cannot be read.
        skipped: receives the names of those in this shard.
    """
    for i, item in images:
        meter.add(1)
        try:
            png = image_to_png(fit_image(item.open(), size, options, item.name))
        except Exception as error:  # struct.error, DecompressionBombError and others of Pillow
            if is_machine_fault(error):
                raise_named(error, item.name)
            skipped.append(item.name)
            unreadable.reasons[item.name] = describe_error(error)
            unreadable.check(SHOWN_NAMES)
            continue
        sample: dict[str, Any] = {"__key__": f"{i:09d}", "png": png}
        if item.label is not None:
            sample["cls"] = str(item.label).encode()
        yield sample
    unreadable.check()
