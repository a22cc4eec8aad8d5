"""Packing: images of any source, or the bundled digits, are written into shards of PNG."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.digits import DIGIT_CLASSES, digits
from data.files import canonical, digest, is_machine_fault, raise_named
from data.folders import describe_classes, describe_passed_over
from data.images import LazyImage
from data.listings import Listing, ListingOptions, list_images
from data.noise import permutation
from data.packed_shards import Member, Recipe, Split, UnreadableImages, pack_splits
from data.pixels import PixelOptions, check_pixel_options
from data.progress import Meter
from data.shapes import (
    AssignedBuckets,
    Crop,
    Size,
    assign_buckets,
    choose_buckets,
    describe_buckets,
    parse_size,
    read_upright_size,
)
from data.shards import ShardWriter

HOLDOUT_SEED = 0
CROPS = ("center", "random", "pad")
# What a mended source changes in a plan, or an option without which it was refused.
DERIVED = (
    *("source", "listing", "classes", "count", "size", "grey", "white", "background"),
    *("captions", "buckets", "largest_loss"),
)
# Entries of a sample's .json that are ours.
RESERVED = (
    *("captions", "original_size", "crops_coords_top_left", "target_size", "padding", "flipped"),
)


def pack(
    out: Path,
    images: Path | None = None,
    size: int | str = 32,
    buckets: int = 0,
    bucket_minimum: int | None = None,
    max_aspect: float = 4.0,
    crop: Crop = "center",
    flips: bool = False,
    minimum: int = 0,
    captions: str = "auto",
    lines: bool = False,
    uncaptioned: float = 0.1,
    image_column: str | None = None,
    class_field: str | None = None,
    keep: str | None = None,
    grey: bool = False,
    holdout: float = 0.1,
    shard: int = 1024,
    classes: str | None = None,
    natural: bool = False,
    background: str = "white",
    white: float | None = None,
    tolerance: float = 0.01,
    workers: int = 1,
) -> None:
    """Pack images into webdataset shards of PNG: OUT/train and OUT/heldout.

    Args:
        out: folder for the two sets.
        images: folder of images, whose subfolders are classes; a list of images (.csv, .tsv,
            .jsonl, .json or .parquet); a webdataset tar, or a folder of them. By default
            scikit-learn's handwritten digits.
        size: height and width in pixels, such as 64, or WIDTHxHEIGHT, such as 64x96. Images are
            scaled and cropped to it.
        buckets: sort the images by their aspect ratio into buckets, whose widths and heights are
            multiples of this number of pixels, and whose areas are about that of the square of
            --size. It must be a multiple of the codec's factor, such as 8. 0: all images have one
            size.
        bucket_minimum: images that a bucket must have; those of a smaller one go to the nearest
            other one. By default 64, or 5 % of the images if these are fewer.
        max_aspect: largest ratio of the longer to the shorter side of a bucket.
        crop: how a scaled image is cropped. With pad it is not, but laid on the background.
        flips: pack each training image once more, mirrored.
        minimum: images whose shorter side has fewer pixels are left out.
        captions: none, auto, or the columns, JSON keys or suffixes of files that have the
            captions, with weights if they differ, such as caption=3,alt. By default they are found
            by usual names.
        lines: each line of a .txt is a caption. By default the whole file is one.
        uncaptioned: fraction of the images that may have no caption, if others have one.
        image_column: column of a list that has the images' paths. By default it is found by usual
            names.
        class_field: column or JSON key whose values are the classes.
        keep: columns or JSON keys that are stored with each image, such as name,style.
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
        tolerance: fraction of the images that may be unreadable, and of the captions and listed
            images that may lack the other; they are skipped and named.
        workers: processes that share the work. The sets do not depend on it.
    """
    # Check the options before anything is written.
    for name, fraction in {"holdout": holdout, "tolerance": tolerance}.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"{name} is {fraction}; it must lie in [0, 1)")
    for name, value in {"shard": shard, "workers": workers}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    target = parse_size(size)
    bucket_sizes = []
    if buckets:
        bucket_sizes = choose_buckets(target, buckets, max_aspect)
    check_shape_options(crop, minimum, buckets, bucket_minimum)
    pixels = PixelOptions(grey or images is None, background, white)
    check_pixel_options(pixels)
    listing_options = ListingOptions(
        captions=captions,
        image_column=image_column,
        class_field=class_field,
        keep=split_names(keep),
        classes=classes,
        natural=natural,
        lines=lines,
        uncaptioned=uncaptioned,
        tolerance=tolerance,
    )

    # Find the images, without small ones, and the bucket of each.
    listing = list_source(images, listing_options, out)
    for line in listing.lines:
        print(f"pack: {line}", file=sys.stderr)
    items = listing.items
    sizes: list[Size | None] = []
    if buckets or minimum:
        sizes = read_sizes(items)
    if minimum:
        large = find_large(sizes, minimum)
        listing.passed_over[f"smaller than {minimum} pixels"] += len(items) - len(large)
        items = [items[i] for i in large]
        sizes = [sizes[i] for i in large]
    labels = [item.label for item in items]
    if listing.classes is not None:
        print(f"pack: {describe_classes(listing.classes, labels)}", file=sys.stderr)
    assigned = None
    if buckets:
        assigned = assign_buckets(sizes, bucket_sizes, bucket_minimum)
        for line in describe_buckets(assigned, crop):
            print(f"pack: {line}", file=sys.stderr)

    # Describe the sets.
    is_square = target.width == target.height
    provenance: dict[str, Any] = {
        "source": str(images or "sklearn.datasets.load_digits"),
        "size": target.width if is_square else list(target),
        "grey": pixels.grey,
        "classes": listing.classes,
        "holdout": holdout,
        "listing": listing.checksum,
    }
    others: dict[str, tuple[Any, Any]] = {  # that are entries only if they are not the default
        "background": (background, "white"),
        "white": (white, None),
        "captions": (listing.captions, None),
        "class_field": (class_field, None),
        "keep": (list(listing_options.keep), []),
        "crop": (crop, "center"),
        "flips": (flips, False),
        "minimum": (minimum, 0),
    }
    for key, (value, default) in others.items():
        if value != default:
            provenance[key] = value

    # Pack each split.
    splits = []
    for name, images_of_split in split_images(labels, holdout).items():
        if images_of_split:
            plan = plan_split(images_of_split, target, assigned, flips and name == "train")
            entries = {**provenance, **plan.entries, "split": name}
            writer = ShardWriter(
                out / name, "images", entries, len(plan.members), shard, DERIVED, plan.groups
            )
            splits.append(Split(writer, plan.members))
    has_json = not provenance.keys().isdisjoint({"captions", "keep", "crop", "flips"})
    recipe = Recipe(pixels, crop, has_json or not is_square or buckets > 0)
    unreadable = UnreadableImages(len(items), tolerance)
    pack_splits(splits, items, recipe, unreadable, workers)

    # Name what is not in the sets.
    for name, reason in unreadable.reasons.items():
        print(f"pack: skipped unreadable {name} ({reason})", file=sys.stderr)
    listing.passed_over["unreadable"] += len(unreadable.reasons)
    passed_over = +listing.passed_over  # without zeros
    if passed_over:
        count = len(items) - len(unreadable.reasons)
        print(f"pack: {count} images{describe_passed_over(passed_over)}", file=sys.stderr)


def check_shape_options(crop: str, minimum: int, buckets: int, bucket_minimum: int | None) -> None:
    """Check the options of shapes.

    Raises:
        ValueError: one is impossible.
    """
    if crop not in CROPS:
        raise ValueError(f"crop is {crop!r}; it must be one of {', '.join(CROPS)}")
    if minimum < 0:
        raise ValueError(f"minimum is {minimum}; it must be a number of pixels, or 0 for none")
    if bucket_minimum is not None and bucket_minimum < 1:
        raise ValueError(f"bucket_minimum is {bucket_minimum}; it must be at least 1")
    if bucket_minimum is not None and not buckets:
        raise ValueError(
            f"bucket_minimum is {bucket_minimum}, but there are no buckets; give --buckets too, or "
            "leave it out"
        )


def split_names(text: str | None) -> tuple[str, ...]:
    """Return the names in an option such as name,style.

    Raises:
        ValueError: one is empty, stands twice or is that of an entry of ours.
    """
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not name or names.count(name) > 1:
            raise ValueError(f"keep is {text!r}; it must be different names, such as name,style")
        if name in RESERVED:
            raise ValueError(
                f"keep has {name}, which is an entry of ours in each sample's .json; rename it"
            )
    return names


def list_source(images: Path | None, options: ListingOptions, out: Path) -> Listing:
    """Return the images of a source, or the digits.

    Raises:
        ValueError: an option of captions or columns is given for the digits.
    """
    if images:
        return list_images(images, options, out)
    for name in ("image_column", "class_field", "keep"):
        if getattr(options, name):
            raise ValueError(
                f"{name} is {getattr(options, name)}, but the digits have no columns; give --images"
            )
    if options.captions not in ("auto", "none"):
        raise ValueError(f"captions is {options.captions}, but the digits have none; give --images")
    items = digits()
    checksum = digest(canonical([[item.name for item in items], []]))
    return Listing(items, DIGIT_CLASSES, Counter(), checksum, captions=None, lines=[])


def read_sizes(items: Sequence[LazyImage]) -> list[Size | None]:
    """Return the upright size of each image, from its header; None if that cannot be read.

    Such an image is reported when it is packed.
    """
    sizes: list[Size | None] = []
    with Meter("pack", len(items), "headers") as meter:
        for item in items:
            meter.add(1)
            try:
                with item.open() as image:
                    sizes.append(read_upright_size(image, item.name))
            except Exception as error:  # struct.error, DecompressionBombError and others of Pillow
                if is_machine_fault(error):
                    raise_named(error, item.name)
                sizes.append(None)
    return sizes


def find_large(sizes: Sequence[Size | None], minimum: int) -> list[int]:
    """Return the numbers of the images whose shorter side is long enough, or unknown.

    Raises:
        ValueError: there are none.
    """
    sides = [minimum if size is None else min(size) for size in sizes]
    large = [i for i, side in enumerate(sides) if side >= minimum]
    if not large:
        raise ValueError(
            f"minimum is {minimum}, but the shorter sides of all {len(sides)} images are shorter, "
            f"at most {max(sides)} pixels; lower it"
        )
    return large


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


class SplitPlan(NamedTuple):
    """The samples of a split, bucket by bucket."""

    members: list[Member]
    groups: list[int]  # samples in each bucket; none without buckets
    entries: dict[str, Any]  # of the set's plan


def plan_split(
    images: Sequence[int], target: Size, assigned: AssignedBuckets | None, flips: bool
) -> SplitPlan:
    """Return the samples of a split.

    Args:
        images: numbers of its images.
        target: size of all samples without buckets.
        assigned: the bucket of each image.
        flips: each image is followed by its mirrored copy.
    """
    copies = (False, True) if flips else (False,)
    if assigned is None:
        members = [Member(i, target, flipped) for i in images for flipped in copies]
        return SplitPlan(members, [], {})

    members = []
    groups = []
    buckets = []
    indices = np.array(images)
    for number, size in enumerate(assigned.sizes):
        inside = indices[assigned.numbers[indices] == number].tolist()
        members += [Member(i, size, flipped) for i in inside for flipped in copies]
        groups.append(len(inside) * len(copies))
        buckets.append({"width": size.width, "height": size.height, "count": groups[-1]})
    return SplitPlan(members, groups, {"buckets": buckets, "largest_loss": assigned.largest_loss})
