"""What each kind of source contributes to a listing: its images, and the values beside them."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from PIL import Image

from data.listings.text import parse_json, read_text

TEXT_FIELDS = ("txt", "caption")  # suffixes of files that are a caption
TEXT_SOURCES = tuple(f".{field}" for field in TEXT_FIELDS)
JSON_FIELD = "json"
SHOWN_ENTRIES = 10  # wrong entries that a line names


class Record(NamedTuple):
    """Named values of an image, of one file."""

    where: str  # the file, and the line or row in it, for errors
    source: str  # what is printed of it: .txt, .json or the name of a list
    values: dict[str, Any]

    @property
    def is_text(self) -> bool:
        """Whether it is a text file, each line of which may be a caption."""
        return self.source in TEXT_SOURCES


def read_field(data: bytes, field: str, where: str) -> Record:
    """Return the values in a file beside an image, or in a field of a tar's sample.

    A JSON list has none: it is taken for annotations.

    Args:
        data: its bytes.
        field: its suffix: txt, caption or json.
        where: its name, for errors.

    Raises:
        ValueError: it is not UTF-8, or no JSON.
    """
    if field != JSON_FIELD:
        return Record(where, f".{field}", {field: read_text(data, where)})
    value = parse_json(data, where)
    return Record(where, f".{field}", value if isinstance(value, dict) else {})


class Entry(NamedTuple):
    """An image of a source, before its fields are read."""

    name: str
    open: Callable[[], Image.Image]
    label: int | None
    records: Iterable[Record]  # read only if their values are needed


class WrongEntries:
    """Entries that cannot be read or have no image. Too many of them are an error.

    Args:
        tolerance: fraction of all entries that may be wrong.
    """

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.count = 0
        self.shown: list[str] = []  # the first ones, with the reason

    def add(self, reason: object) -> None:
        """Count an entry.

        Args:
            reason: its name, and what is wrong with it.
        """
        self.count += 1
        if len(self.shown) < SHOWN_ENTRIES:
            self.shown.append(str(reason))

    def describe(self) -> str:
        """Return the first entries and their reasons, in one line."""
        more = f"; and {self.count - len(self.shown)} more" if self.count > len(self.shown) else ""
        return "; ".join(self.shown) + more

    def check(self, total: int) -> None:
        """Check that no more entries are wrong than tolerated.

        Args:
            total: number of all entries.

        Raises:
            ValueError: there are more.
        """
        if self.count > self.tolerance * total:
            raise ValueError(
                f"{self.describe()}: {self.count} of {total} entries are wrong, more than a "
                f"tolerance of {self.tolerance:g} allows; correct or remove them, raise "
                "--tolerance, or read no captions (--captions none)"
            )


class ImageSource(ABC):
    """A source of images.

    Attributes:
        captions_required: whether it is an error that no image has a caption.
        passed_over: what is not read, by kind.
        read_files: number of files beside the images that are read, by suffix; `passed_over`
            counts them, too.
        lines: to print.
        classes: names of the classes of the entries' labels; None without labels.
        checksum: identifies the images. Like the others it is complete after `entries`.
    """

    captions_required = False
    checksum = ""
    classes: list[str] | None = None

    def __init__(self) -> None:
        self.passed_over: Counter[str] = Counter()
        self.read_files: Counter[str] = Counter()
        self.lines: list[str] = []

    @abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Yield the images, in order."""
