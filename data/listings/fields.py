"""The fields of an image: its captions, the value of its class, and what is kept of it."""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from data.captions import Caption, clean_captions
from data.folders import natural_key
from data.listings.entries import Record
from data.listings.listing import ListingOptions
from data.schema import shorten

# Names under which captions are found, in any case. The first one with a text is read.
COMMON_NAMES = ("captions", "caption", "text", "txt", "prompt", "description", "alt_text", "alt")
RANKS = {name: rank for rank, name in enumerate(COMMON_NAMES)}
RESERVED = (  # entries of a sample's .json that `rectify pack` writes
    *("captions", "original_size", "crops_coords_top_left", "target_size", "padding", "flipped"),
)
# Characters of numbers, of which the .txt of object detectors consist.
NUMERIC = set("0123456789+-.,;:eE \t\r\n")
MAX_NAMES = 1000  # of columns and keys that are remembered for messages
SHOWN_COLUMNS = 20  # that a message names


class Fields(NamedTuple):
    """What is read of an image, beside its pixels."""

    captions: tuple[Caption, ...]
    class_value: str | None  # name of its class
    kept: dict[str, Any] | None


def parse_names(text: str) -> dict[str, float]:
    """Return the weights of the names in a text such as "caption=3,alt".

    Raises:
        ValueError: a name is empty or occurs twice, or a weight is not positive.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition("=")
        name = name.strip().removeprefix(".")
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        if not name or name in weights or not 0 < value < math.inf:
            raise ValueError(
                f"captions is {text!r}; it must be auto, none, or different names with positive "
                "weights, such as caption=3,alt"
            )
        weights[name] = value
    return weights


def describe_names(names: Iterable[str]) -> str:
    """Return the names of columns or keys in a file, for an error."""
    ordered = sorted(names)
    if not ordered:
        return "it has none"
    more = f" and {len(ordered) - SHOWN_COLUMNS} more" if len(ordered) > SHOWN_COLUMNS else ""
    return f"it has {', '.join(ordered[:SHOWN_COLUMNS])}{more}"


class FieldReader:
    """Reads the captions, classes and further values of images, and counts where they are from.

    Args:
        options: which are read.

    Raises:
        ValueError: the options are no names.

    Attributes:
        automatic: whether captions are found by the common names.
        used: number of images that have captions of a (source, name).
        several_lines: number of text files with several lines that are read as one caption.
        numeric: number of text files that have only numbers.
        names: of all columns and keys so far.
    """

    def __init__(self, options: ListingOptions):
        self.options = options
        self.automatic = options.captions == "auto"
        self.weights: dict[str, float] = {}
        if options.captions not in ("auto", "none"):
            self.weights = parse_names(options.captions)
        self.other_names = tuple(dict.fromkeys(options.keep))
        for name in self.other_names:
            if name in RESERVED:
                raise ValueError(f"keep is {name}, an entry that every sample of a set has")
        if options.class_field:
            self.other_names = (*self.other_names, options.class_field)
        self.used: Counter[tuple[str, str]] = Counter()
        self.several_lines = 0
        self.numeric = 0
        self.names: set[str] = set()

    @property
    def reads_captions(self) -> bool:
        """Whether captions are read, if there are any."""
        return self.automatic or bool(self.weights)

    @property
    def reads_nothing(self) -> bool:
        """Whether images alone are read."""
        return not self.reads_captions and not self.other_names

    def is_needed(self, name: str) -> bool:
        """Whether the value of a column or key is read."""
        if name in self.weights or name in self.other_names:
            return True
        return self.automatic and name.lower() in RANKS

    def needs_more(self, found: Collection[str]) -> bool:
        """Whether further records of an image are read.

        Args:
            found: names of the captions that it has already.
        """
        if self.other_names or (self.automatic and not found):
            return True
        return not self.weights.keys() <= set(found)

    def add_names(self, names: Iterable[str]) -> None:
        """Remember names of columns or keys; of very many, those alone that are read."""
        if len(self.names) < MAX_NAMES:
            self.names.update(names)
        else:
            self.names.update(filter(self.is_needed, names))

    def check_columns(self, columns: Iterable[str], file: object) -> None:
        """Check that a list has the columns that the options name.

        Raises:
            ValueError: it has not.
        """
        present = list(columns)
        for option, names in self._named().items():
            for name in names:
                if name not in present:
                    raise ValueError(
                        f"{file}: has no column {name!r} (--{option}); {describe_names(present)}"
                    )

    def check_names(self, source: object) -> None:
        """Check that at least one image had a value for each name in the options.

        Raises:
            ValueError: no image had it.
        """
        for option, names in self._named().items():
            for name in names:
                if name not in self.names:
                    raise ValueError(
                        f"{source}: no image has {name!r} (--{option}), neither as a column, a "
                        f"JSON key nor a suffix; {describe_names(self.names)}"
                    )

    def _named(self) -> dict[str, tuple[str, ...]]:
        """Return the names in the options, by option."""
        class_field = self.options.class_field
        return {
            "captions": tuple(self.weights),
            "class_field": (class_field,) if class_field else (),
            "keep": self.options.keep,
        }

    def read(self, name: str, records: Iterable[Record]) -> Fields:
        """Return the fields of an image.

        Args:
            name: of the image.
            records: in which they are looked up, in this order.

        Raises:
            ValueError: a value has the wrong type, or a caption is too long.
        """
        # Read the records, as far as they are needed.
        by_name: dict[str, tuple[Caption, ...]] = {}
        values: dict[str, Any] = {}
        where = name
        for record in records:
            where = record.where
            self.add_names(record.values)
            self._read_captions(record, by_name)
            for key in self.other_names:
                if key in record.values:
                    values.setdefault(key, record.values[key])
            if not self.needs_more(by_name):
                break

        # Put them in the order of the options.
        chosen: list[Caption] = []
        for key in self.weights or by_name:
            chosen += by_name.get(key, ())
        captions = clean_captions(chosen, where) if len(chosen) > 1 else tuple(chosen)
        class_value = None
        if self.options.class_field:
            class_value = read_class(values, self.options.class_field, where)
        kept = {}
        for key in self.options.keep:
            if key in values:
                kept[key] = check_plain(values[key], f"{where}: {key}")
        return Fields(captions, class_value, kept or None)

    def _read_captions(self, record: Record, by_name: dict[str, tuple[Caption, ...]]) -> None:
        """Read the captions in a record, except those that an image has already.

        Args:
            record: the values.
            by_name: the captions of the image so far, to which those of the record are added.
        """
        if self.automatic and by_name:
            return
        for name in self._caption_names(record.values):
            if name in by_name:
                continue
            value = record.values[name]
            if record.is_text:
                value = self._read_text(value)
            where = f"{record.where}: {name}"
            parsed = parse_captions(value, self.weights.get(name, 1.0), where)
            captions = clean_captions(parsed, where)
            if captions:
                by_name[name] = captions
                self.used[record.source, name] += 1
                if self.automatic:
                    return

    def _caption_names(self, values: Mapping[str, Any]) -> Iterator[str]:
        """Yield the names in a record that are captions."""
        if not self.automatic:
            yield from (name for name in self.weights if name in values)
            return
        ranked = [(RANKS[name.lower()], name) for name in values if name.lower() in RANKS]
        for _, name in sorted(ranked):
            yield name

    def _read_text(self, text: str) -> list[str]:
        """Return the captions in a text file: its lines or, by default, all of it as one.

        The common names do not stand for numbers alone: they are what a detector is trained on.
        """
        if self.automatic and text.strip() and NUMERIC.issuperset(text):
            self.numeric += 1
            return []
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
        if self.options.lines:
            return text.split("\n")
        self.several_lines += "\n" in text
        return [text]


def parse_captions(value: Any, weight: float, where: str) -> list[Caption]:
    """Return the captions in a value: a text, an object with text and weight, a list, or null.

    Args:
        value: as it was read.
        weight: factor of their weights.
        where: the file, and the entry in it, for errors.

    Raises:
        ValueError: it is something else.
    """
    if value is None:
        return []
    captions = []
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str):
            captions.append(Caption(part, weight))
            continue
        entries = part if isinstance(part, dict) else {}
        text = entries.get("text")
        factor = entries.get("weight", 1.0)
        if not isinstance(text, str) or type(factor) not in (int, float):
            raise ValueError(
                f"{where}: is {shorten(value)}; a caption must be text, an object "
                '{"text": ..., "weight": ...}, or a list of them; --captions names another column'
            )
        captions.append(Caption(text, weight * factor))
    return captions


def read_class(values: Mapping[str, Any], name: str, where: str) -> str | None:
    """Return the name of an image's class; None if it has none.

    Raises:
        ValueError: the value is neither text nor a whole number.
    """
    value = values.get(name)
    if value is None:
        return None
    if type(value) not in (str, int):
        raise ValueError(
            f"{where}: {name} is {shorten(value)}; a class (--class_field) must be text or a "
            "whole number"
        )
    return str(value).strip() or None


def check_plain(value: Any, where: str) -> Any:
    """Check that a value can be stored as JSON, and return it.

    Raises:
        ValueError: it cannot.
    """
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: is {shorten(value)}, of {type(value).__name__}, which JSON cannot store; "
            "convert it to text, or leave it out of --keep"
        ) from None
    return value


def number_classes(values: list[str], natural: bool) -> tuple[list[str], list[int]]:
    """Return the names of the classes, and the class of each image.

    Whole numbers are ordered by value, other names by the alphabet or, if `natural`, by the
    numbers in them.
    """
    names = sorted(set(values))
    if natural or all(name.isascii() and name.isdecimal() for name in names):
        names.sort(key=natural_key)
    numbers = {name: number for number, name in enumerate(names)}
    return names, [numbers[value] for value in values]
