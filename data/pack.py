"""Packing: a folder of images, or the bundled digits, is written into shards of PNG."""

import io
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from data.digits import DIGIT_CLASSES, digits
from data.files import canonical, digest
from data.images import IMAGE_FORMATS, LazyImage, fit_image
from data.noise import permutation
from data.progress import Meter
from data.schema import check_schema
from data.shards import ShardWriter

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FILE_FORMATS = (*IMAGE_FORMATS, "BMP", "GIF", "TIFF")  # that Pillow may detect in these files
HOLDOUT_SEED = 0
MAX_UNREADABLE = 0.01  # fraction of unreadable images above which packing fails


def pack(
    out: Path,
    images: Path | None = None,
    size: int = 32,
    grey: bool = False,
    holdout: float = 0.1,
    shard: int = 1024,
) -> None:
    """Pack images into webdataset shards of PNG: OUT/train and OUT/heldout.

    Args:
        out: folder for the two sets.
        images: folder of images; its subfolders are classes. By default scikit-learn's handwritten
            digits.
        size: height and width in pixels; images are scaled and centre-cropped.
        grey: one channel instead of three. The digits are always grey.
        holdout: fraction of the images that is held out from training. The choice is random, but
            the same every time.
        shard: images in one shard.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout is {holdout}; it must lie in [0, 1)")

    # Find the images, and split them.
    if images:
        items, classes = find_images(images)
    else:
        items = digits()
        classes = DIGIT_CLASSES
        grey = True
    splits = split_images(len(items), holdout)

    # Pack each split.
    provenance = {
        "source": str(images or "sklearn.datasets.load_digits"),
        "size": size,
        "grey": grey,
        "classes": classes,
        "holdout": holdout,
        "listing": checksum_listing(images, items),
    }
    unreadable = UnreadableImages(len(items))
    with Meter("pack", len(items), "images") as meter:
        for split, members in splits.items():
            if members:
                plan = {**provenance, "split": split}
                writer = ShardWriter(out / split, "images", plan, len(members), shard)
                pack_split(writer, [items[i] for i in members], meter, unreadable)
    for name in unreadable.names:
        print(f"pack: skipped unreadable {name}", file=sys.stderr)


class UnreadableImages:
    """Names of images that could not be read. Too many of them are an error.

    Args:
        total: number of all images.
    """

    def __init__(self, total: int):
        self.names: list[str] = []
        self.limit = MAX_UNREADABLE * total

    def add(self, name: str, error: Exception) -> None:
        """Add an image.

        Raises:
            ValueError: more than 1 % of all images are unreadable.
        """
        self.names.append(name)
        if len(self.names) > self.limit:
            raise ValueError(
                f"{name}: unreadable ({error}); with it more than 1 % of the images are "
                f"({len(self.names)} so far); repair or remove them"
            ) from None


def find_images(folder: Path) -> tuple[list[LazyImage], list[str] | None]:
    """Return every image below a folder, sorted by path, and the classes if there are subfolders.

    Raises:
        OSError: there is no such folder.
        ValueError: it has no images, or images both in subfolders and beside them.
    """
    # Find the files.
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = []
    for path in folder.rglob("*"):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            paths.append(path)
    paths.sort()
    if not paths:
        raise ValueError(f"{folder}: has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")

    # The classes are the subfolders.
    names = [path.relative_to(folder) for path in paths]
    is_loose = [len(name.parts) == 1 for name in names]
    if any(is_loose) and not all(is_loose):
        loose = paths[is_loose.index(True)]
        raise ValueError(
            f"{loose}: lies beside class folders; "
            "move it into one of them, or all images into one folder"
        )
    classes = None
    if not any(is_loose):
        classes = sorted({name.parts[0] for name in names})

    items = []
    for path, name in zip(paths, names):
        label = classes.index(name.parts[0]) if classes else None
        items.append(LazyImage(str(name), partial(Image.open, path, formats=FILE_FORMATS), label))
    return items, classes


def split_images(count: int, holdout: float) -> dict[str, list[int]]:
    """Return the ascending indices of the images in each split; at least one is in train."""
    heldout_count = min(round(holdout * count), count - 1)
    heldout = set(permutation(count, HOLDOUT_SEED)[:heldout_count].tolist())
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
    writer: ShardWriter, items: list[LazyImage], meter: Meter, unreadable: UnreadableImages
) -> None:
    """Pack one split. Unreadable images are skipped, and named in the record of their shard."""
    for number in writer.numbers():
        indices = writer.indices(number)
        record = writer.finished(number)
        if record:
            meter.add(len(indices))
            check_schema(record, {"skipped": [str]}, f"{writer.folder}: record of shard {number}")
            unreadable.names.extend(record["skipped"])
        else:
            # The samples are made while they are written; then this list is complete.
            skipped: list[str] = []
            samples = make_samples(writer.plan, indices, items, meter, unreadable, skipped)
            writer.write(number, samples, skipped=skipped)
    writer.finish()


def make_samples(
    plan: dict[str, Any],
    indices: range,
    items: list[LazyImage],
    meter: Meter,
    unreadable: UnreadableImages,
    skipped: list[str],
) -> Iterator[dict[str, Any]]:
    """Yield the samples of one shard.

    Args:
        plan: of the set; it has the size of its images, and whether they are grey.
        indices: of the shard's images.
        items: the images of the set.
        meter: counts the images.
        unreadable: receives the images of all shards that cannot be read.
        skipped: receives the names of those in this shard.
    """
    for i in indices:
        name, open_image, label = items[i]
        meter.add(1)
        try:
            png = image_to_png(fit_image(open_image(), plan["size"], plan["grey"]))
        except Exception as error:  # struct.error, DecompressionBombError and others of Pillow
            skipped.append(name)
            unreadable.add(name, error)
            continue
        sample: dict[str, Any] = {"__key__": f"{i:09d}", "png": png}
        if label is not None:
            sample["cls"] = str(label).encode()
        yield sample
