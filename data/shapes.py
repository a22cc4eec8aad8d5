"""Shapes: the sizes of packed images, the buckets they are sorted into, and how they are fitted."""

import math
import re
import struct
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from data.pixels import read_orientation

Crop = Literal["center", "random", "pad"]
SIZE = re.compile("([0-9]{1,5})(?:x([0-9]{1,5}))?")
FEW_IMAGES = 64  # a bucket with fewer is merged into another one
SMALL_PART = 0.05  # of a small set, it is one with a smaller part of the images
BAR_LENGTH = 40  # characters of the longest bar in a histogram
SWAPPING = range(5, 9)  # orientations that swap width and height
PNG_SIGNATURE = 8  # bytes
METADATA_CHUNKS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # of PNG, that may hold an orientation


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def log_aspect(self) -> float:
        """Logarithm of width / height; exactly the negative one for the transposed size."""
        return math.log(self.width) - math.log(self.height)


def parse_size(text: int | str) -> Size:
    """Return the size that `--size` means: 64 is a square, 64x96 is WIDTHxHEIGHT.

    Raises:
        ValueError: it is neither.
    """
    found = SIZE.fullmatch(str(text))
    size = Size(0, 0)
    if found:
        size = Size(int(found[1]), int(found[2] or found[1]))
    if min(size) < 1:
        raise ValueError(
            f"size is {text!r}; it must be a number of pixels such as 64, or WIDTHxHEIGHT such as "
            "64x96"
        )
    return size


def choose_buckets(size: Size, multiple: int, max_aspect: float) -> list[Size]:
    """Return the sizes of the buckets, from the tallest to the widest.

    For each width this is the largest height, and for each height the largest width, of at most
    the area of the square (NovelAI's aspect ratio bucketing; Podell et al. 2023, arXiv
    2307.01952, section 2.3).

    Args:
        size: the square, which is a bucket too.
        multiple: all widths and heights are multiples of it.
        max_aspect: largest ratio of the longer to the shorter side.

    Raises:
        ValueError: the size is not a square whose side is a multiple, or an option is impossible.
    """
    # Check the options.
    if multiple < 1:
        raise ValueError(f"buckets is {multiple}; it must be a positive multiple of pixels, or 0")
    if not 1 <= max_aspect < math.inf:
        raise ValueError(f"max_aspect is {max_aspect}; it must be a number of at least 1")
    if size.width != size.height:
        raise ValueError(
            f"size is {size}, but with buckets it is the side of a square, which all buckets have "
            "about the area of; give one number, or leave out --buckets"
        )
    if size.width % multiple:
        below = size.width // multiple * multiple
        nearest = f"{below} or {below + multiple}" if below else f"{multiple}"
        raise ValueError(
            f"size is {size.width}, but buckets is {multiple}; size must be a multiple of it, such "
            f"as {nearest}"
        )

    # For each width the largest height, and the transposed sizes.
    area = size.width * size.height
    sizes = set()
    for width in range(multiple, area // multiple + 1, multiple):
        height = area // width // multiple * multiple
        if max(width, height) <= max_aspect * min(width, height):
            sizes |= {Size(width, height), Size(height, width)}
    return sorted(sizes, key=lambda one: (one.log_aspect, one))


class AssignedBuckets(NamedTuple):
    """The bucket of each image."""

    sizes: list[Size]  # of the buckets that have images, from the tallest to the widest
    numbers: np.ndarray  # the bucket of each image, (n,) int64
    merged: int  # buckets that had too few images
    largest_loss: float  # of any image: the part of its area that a crop to its bucket removes


def assign_buckets(
    images: Sequence[Size | None], buckets: Sequence[Size], minimum: int | None = None
) -> AssignedBuckets:
    """Assign each image to the bucket of the nearest log aspect ratio.

    Buckets with too few images are merged, the smallest first: each of their images goes to the
    nearest bucket that is left. No image is dropped.

    Args:
        images: upright sizes; None is an unknown one, which counts as a square.
        buckets: sizes, from the tallest to the widest.
        minimum: images that a bucket must hold. By default 64, or 5 % of a small set.
    """
    if minimum is None:
        minimum = min(FEW_IMAGES, math.ceil(SMALL_PART * len(images)))
    aspects = np.array([image.log_aspect if image else 0.0 for image in images])

    # Leave out the buckets that are nearest to no image, then the smallest one while it is small.
    remaining = list(buckets)
    merged = 0
    while True:
        numbers = nearest_numbers(aspects, remaining)
        counts = np.bincount(numbers, minlength=len(remaining))
        if counts.min() == 0:
            remaining = [size for size, count in zip(remaining, counts) if count]
        elif counts.min() < minimum and len(remaining) > 1:
            remaining.pop(int(counts.argmin()))
            merged += 1
        else:
            break

    # How much the crops remove.
    largest = Fraction(0)
    for image, number in set(zip(images, numbers.tolist())):
        if image:
            largest = max(largest, crop_loss(image, remaining[number]))
    return AssignedBuckets(remaining, numbers, merged, round_up(largest))


def nearest_numbers(aspects: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Return the number of the nearest bucket of each log aspect ratio."""
    centres = np.array([bucket.log_aspect for bucket in buckets])
    return np.searchsorted((centres[1:] + centres[:-1]) / 2, aspects)


def crop_loss(image: Size, target: Size) -> Fraction:
    """Return the part of an image's area that is cut off when it fills a size.

    It is also the part of the result that is background when the image is padded.
    """
    areas = (image.width * target.height, image.height * target.width)
    return 1 - Fraction(min(areas), max(areas))


def round_up(fraction: Fraction) -> float:
    """Return a fraction with four digits, not below it."""
    return math.ceil(fraction * 10_000) / 10_000


def describe_buckets(assigned: AssignedBuckets, crop: Crop) -> list[str]:
    """Return lines: a histogram of the buckets, and how much of an image is lost at most."""
    counts = Counter(assigned.numbers.tolist())
    most = max(counts.values())
    lines = [f"{len(assigned.sizes)} buckets, WIDTHxHEIGHT and number of images:"]
    for number, size in enumerate(assigned.sizes):
        bar = "#" * math.ceil(BAR_LENGTH * counts[number] / most)
        lines.append(f"{str(size):>11} {counts[number]:>9} {bar}")
    merged = ""
    if assigned.merged:
        merged = f"{assigned.merged} buckets with too few images were merged into others; "
    percent = f"{100 * assigned.largest_loss:.4g} %"
    if crop == "pad":
        lines.append(f"{merged}at most {percent} of an image's area is background")
    else:
        lines.append(f"{merged}cropping removes at most {percent} of an image's area")
    return lines


class FittedImage(NamedTuple):
    """An image of a target size, and how it was made."""

    image: Image.Image
    original: Size
    crop: tuple[int, int]  # top and left of the crop, in pixels of the scaled image
    padding: tuple[int, int] | None  # top and left of the image on the background; None: cropped

    def describe(self) -> dict[str, Any]:
        """Return the entries of a sample's .json, with heights before widths as in SDXL."""
        entries: dict[str, Any] = {
            "original_size": [self.original.height, self.original.width],
            "crops_coords_top_left": list(self.crop),
            "target_size": [self.image.height, self.image.width],
        }
        if self.padding is not None:
            entries["padding"] = list(self.padding)
        return entries


def fill_size(image: Image.Image, target: Size, u: float | None = None) -> FittedImage:
    """Scale an image so that it covers a size, and crop it.

    Args:
        image: a converted image.
        target: size of the result.
        u: in [0, 1), chooses the position of the crop in whole pixels of the scaled image.
            None: the centre.
    """
    # One side is as long as the target's, of the other one there is an excess.
    scale = max(target.width / image.width, target.height / image.height)
    excess = (image.height * scale - target.height, image.width * scale - target.width)
    crop = (round(excess[0] / 2), round(excess[1] / 2))
    centering = [0.5, 0.5]
    if u is not None:
        crop = (int(u * (int(excess[0]) + 1)), int(u * (int(excess[1]) + 1)))
        for axis in (0, 1):
            if excess[axis] > 0:
                centering[axis] = crop[axis] / excess[axis]
    fitted = ImageOps.fit(
        image, target, Image.Resampling.BICUBIC, centering=(centering[1], centering[0])
    )
    return FittedImage(fitted, Size(*image.size), crop, padding=None)


def pad_to_size(image: Image.Image, target: Size, background: str) -> FittedImage:
    """Scale an image so that it fits into a size, and lay it on the middle of a background."""
    scaled = ImageOps.contain(image, target, Image.Resampling.BICUBIC)
    top = (target.height - scaled.height) // 2
    left = (target.width - scaled.width) // 2
    padded = Image.new(image.mode, target, background)
    padded.paste(scaled, (left, top))
    return FittedImage(padded, Size(*image.size), (0, 0), (top, left))


def mirror(fitted: FittedImage) -> FittedImage:
    """Return the mirrored image. Its crop and padding are those in the mirrored original."""
    width, height = fitted.image.size
    scale = max(width / fitted.original.width, height / fitted.original.height)
    top, left = fitted.crop
    padding = fitted.padding
    if padding is None:
        left = max(0, round(fitted.original.width * scale) - width - left)
    else:
        scale = min(width / fitted.original.width, height / fitted.original.height)
        inner = max(1, round(fitted.original.width * scale))
        padding = (padding[0], width - inner - padding[1])
    return FittedImage(ImageOps.mirror(fitted.image), fitted.original, (top, left), padding)


def read_upright_size(image: Image.Image, name: str) -> Size:
    """Return the size that an image has when it is turned upright. Its pixels are not decoded.

    Args:
        image: as it was opened.
        name: of the image, for the log.
    """
    size = Size(*image.size)
    if isinstance(image, TiffImageFile):  # its size is upright already
        return size
    if isinstance(image, PngImageFile) and image.fp and has_late_metadata(image.fp):
        image.load()
    if read_orientation(image, name) in SWAPPING:
        return Size(size.height, size.width)
    return size


def has_late_metadata(file: IO[bytes]) -> bool:
    """Whether metadata follow the pixels of a PNG, which Pillow reads only after them."""
    start = file.tell()
    file.seek(PNG_SIGNATURE)
    after_pixels = False
    found = False
    while not found:
        header = file.read(8)
        if len(header) < 8:
            break
        length, kind = struct.unpack(">I4s", header)
        after_pixels = after_pixels or kind == b"IDAT"
        found = after_pixels and kind in METADATA_CHUNKS
        file.seek(length + 4, 1)  # over the content and its checksum
    file.seek(start)
    return found
