"""The result of listing images, and its options."""

from collections import Counter
from typing import NamedTuple

from data.images import LazyImage


class ListingOptions(NamedTuple):
    """What is read with the images, and how much of it may be wrong."""

    captions: str = "auto"  # auto, none, or names with weights, such as "caption=3,alt"
    image_column: str | None = None  # of a list; None: one of the common names
    class_field: str | None = None  # column or JSON key whose values are the classes
    keep: tuple[str, ...] = ()  # columns or JSON keys stored with each image
    classes: str | None = None  # of folders: top, leaf, none or a file
    natural: bool = False  # number the classes by the numbers in their names
    lines: bool = False  # each line of a .txt is a caption
    uncaptioned: float = 0.1  # fraction of the images that may have no caption
    tolerance: float = 0.01  # fraction of the entries that may be wrong


class Listing(NamedTuple):
    """The images that are packed, in order."""

    items: list[LazyImage]
    classes: list[str] | None  # names of the classes, by number
    passed_over: Counter[str]  # what is not packed, by kind
    checksum: str  # identifies the images, and what is read with them
    captions: str | None  # sha256 of all captions in order; None: no captions are read
    lines: list[str]  # to print: where captions come from, and how many images have how many
