"""The shards of packed images: from files to samples, by one process or several."""

import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

from PIL import Image

from data.captions import captions_to_json
from data.files import describe_error, is_machine_fault, raise_named, remove_leftovers
from data.images import LazyImage
from data.noise import CROP_STREAM, generator
from data.pixels import PixelOptions, convert_image
from data.progress import Meter
from data.schema import check_schema
from data.shapes import Crop, FittedImage, Size, fill_size, mirror, pad_to_size
from data.shards import ShardWriter
from data.workers import Progress, run_tasks, start_workers

CROP_SEED = 0
SHOWN_NAMES = 10  # unreadable images that an error names


class Recipe(NamedTuple):
    """How images become samples."""

    pixels: PixelOptions
    crop: Crop
    has_json: bool  # whether each sample has a .json: captions, sizes, and what is kept


class Member(NamedTuple):
    """A sample of a split: an image, or its mirrored copy."""

    image: int  # its number among all images, which keys its random crop
    size: Size
    flipped: bool


class Split(NamedTuple):
    """A set that is packed, and its samples by index."""

    writer: ShardWriter
    members: list[Member]


class ShardTask(NamedTuple):
    """A shard that is to be made."""

    split: int
    number: int


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


def pack_splits(
    splits: Sequence[Split],
    items: Sequence[LazyImage],
    recipe: Recipe,
    unreadable: UnreadableImages,
    workers: int,
) -> None:
    """Make all shards that are missing, and finish the sets.

    Args:
        splits: the sets.
        items: all images.
        recipe: how they become samples.
        unreadable: receives the images that cannot be read, which are skipped.
        workers: number of processes. The bytes do not depend on it.
    """
    total = sum(len(split.members) for split in splits)
    work = partial(pack_shard, splits, items, recipe, unreadable)
    with Meter("pack", total, "images") as meter:
        tasks = find_missing(splits, meter, unreadable)
        if workers == 1 or len(tasks) < 2:
            for task in tasks:
                work(task, meter)
        else:
            try:
                with start_workers(work, min(workers, len(tasks))) as pool:
                    for reasons in run_tasks(pool, tasks, meter):
                        unreadable.reasons.update(reasons)
                        unreadable.check()
            finally:
                for split in splits:  # what workers were writing when they were killed
                    remove_leftovers(split.writer.folder)
    for split in splits:  # none is finished before all are readable
        split.writer.finish()


def find_missing(
    splits: Sequence[Split], meter: Meter, unreadable: UnreadableImages
) -> list[ShardTask]:
    """Return the shards that are not finished yet; count the images of the others.

    Args:
        splits: the sets.
        meter: counts images.
        unreadable: receives the images that were skipped in an earlier run.
    """
    tasks = []
    for position, (writer, _) in enumerate(splits):
        for number in writer.numbers():
            record = writer.finished(number)
            if record is None:
                tasks.append(ShardTask(position, number))
                continue
            meter.add(len(writer.indices(number)))
            check_schema(record, {"skipped": [str]}, f"{writer.folder}: record of shard {number}")
            unreadable.reasons.update(dict.fromkeys(record["skipped"], "in an earlier run"))
    return tasks


def pack_shard(
    splits: Sequence[Split],
    items: Sequence[LazyImage],
    recipe: Recipe,
    unreadable: UnreadableImages,
    task: ShardTask,
    progress: Progress,
) -> dict[str, str]:
    """Make one shard. Unreadable images are skipped, and named in its record.

    Args:
        splits: the sets.
        items: all images.
        recipe: how they become samples.
        unreadable: receives the images of all shards of this process that cannot be read.
        task: which shard.
        progress: counts the images.

    Returns:
        Why images of this shard cannot be read, by their names.
    """
    # The samples are made while they are written; then this list is complete.
    writer, members = splits[task.split]
    skipped: list[str] = []
    indices = writer.indices(task.number)
    samples = make_samples(indices, members, items, recipe, unreadable, skipped, progress)
    writer.write(task.number, samples, skipped=skipped)
    return {name: unreadable.reasons[name] for name in skipped}


def make_samples(
    indices: range,
    members: Sequence[Member],
    items: Sequence[LazyImage],
    recipe: Recipe,
    unreadable: UnreadableImages,
    skipped: list[str],
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Yield the samples of one shard. Copies of an image that follow each other are read once.

    Args:
        indices: of the samples.
        members: of the split.
        items: all images.
        recipe: how they become samples.
        unreadable: receives the images of all shards that cannot be read.
        skipped: receives the names of those in this shard.
        progress: counts the images.
    """
    for image, group in groupby(indices, key=lambda i: members[i].image):
        copies = {i: members[i] for i in group}
        progress.add(len(copies))
        item = items[image]
        try:
            samples = [*make_copies(item, copies, recipe)]
        except Exception as error:  # struct.error, DecompressionBombError and others of Pillow
            if is_machine_fault(error):
                raise_named(error, item.name)
            skipped.append(item.name)
            unreadable.reasons[item.name] = describe_error(error)
            unreadable.check(SHOWN_NAMES)
            continue
        yield from samples
    unreadable.check()


def make_copies(
    item: LazyImage, copies: dict[int, Member], recipe: Recipe
) -> Iterator[dict[str, Any]]:
    """Yield the samples of one image.

    Args:
        item: the image.
        copies: the samples, by index.
        recipe: how it becomes samples.
    """
    image = convert_image(item.open(), recipe.pixels, item.name)
    for i, member in copies.items():
        fitted = fit_to_size(image, member, recipe)
        if member.flipped:
            fitted = mirror(fitted)
        sample: dict[str, Any] = {"__key__": f"{i:09d}", "png": image_to_png(fitted.image)}
        if item.label is not None:
            sample["cls"] = str(item.label).encode()
        if recipe.has_json:
            sample["json"] = describe_sample(item, fitted, member.flipped)
        yield sample


def fit_to_size(image: Image.Image, member: Member, recipe: Recipe) -> FittedImage:
    """Return a converted image in the size of its sample."""
    if recipe.crop == "pad":
        return pad_to_size(image, member.size, recipe.pixels.background)
    if recipe.crop == "random":
        u = generator(CROP_SEED, member.image, stream=CROP_STREAM).random()
        return fill_size(image, member.size, u)
    return fill_size(image, member.size)


def describe_sample(item: LazyImage, fitted: FittedImage, flipped: bool) -> bytes:
    """Return the .json of a sample."""
    facts = {**(item.kept or {}), "captions": captions_to_json(item.captions), **fitted.describe()}
    if flipped:
        facts["flipped"] = True
    return json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()


def image_to_png(image: Image.Image) -> bytes:
    """Return an image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()
