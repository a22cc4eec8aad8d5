"""Lists of images: CSV, TSV, JSON lines, JSON and parquet, one row an image."""

import csv
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from data.listings.entries import Entry, ImageSource, Record, WrongEntries
from data.listings.fields import COMMON_NAMES, FieldReader, describe_names
from data.listings.listing import ListingOptions
from data.listings.text import parse_json, read_text
from data.pixels import open_image
from data.schema import shorten

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LIST_SUFFIXES = (*DELIMITERS, ".jsonl", ".json", ".parquet")
# Names under which images are found, in any case; the first one that a list has is read.
IMAGE_COLUMNS = (
    *("file_name", "filename", "file_path", "filepath", "image_path", "image_file", "image"),
    *("img_path", "img", "path", "file", "jpg", "jpeg", "png", "webp"),
)
STATUS = "status"  # column of img2dataset; other values than SUCCESS say why there is no image
SUCCESS = "success"
Chooser = Callable[[str], bool]  # whether a column is read


class Table(NamedTuple):
    """A list that was opened."""

    columns: list[str]
    fixed: bool  # whether all rows have the same columns; those of JSON are the keys of the first
    stored: tuple[str, ...]  # columns that hold images themselves, not paths
    rows: Callable[[Chooser], Iterator[Record]]


def open_list(file: Path, wrong: WrongEntries) -> Table:
    """Open a list.

    Args:
        file: the list, of one of LIST_SUFFIXES.
        wrong: receives rows that cannot be read.

    Raises:
        ValueError: it is empty, or not a list of this kind.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        from data.listings.parquet import open_parquet  # slow to import

        columns, stored, rows = open_parquet(file)
        return Table(columns, True, stored, rows)
    if suffix in DELIMITERS:
        columns = next(read_csv(file, DELIMITERS[suffix]))[1]
        return Table(columns, True, (), partial(csv_rows, file, columns, wrong))
    objects = json_objects if suffix == ".json" else json_lines
    first = next(objects(file, WrongEntries(1)), None)
    if first is None:
        raise ValueError(f"{file}: has no JSON object; it must have one of each image")
    return Table(list(first.values), False, (), partial(chosen_rows, objects, file, wrong))


def read_csv(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV, first its header, and the number of the line where each begins.

    Raises:
        ValueError: it is not UTF-8, its quotes do not match, or its header is empty or has a name
            twice.
    """
    with file.open("rb") as binary:
        lines = decode_lines(binary, str(file))
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        start = 1
        try:
            for number, row in enumerate(reader):
                if number == 0:
                    check_header(row, file)
                if row:  # a blank line has none
                    yield start, row
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(f"{file}: line {start}: {error}; correct the quotes") from None
    if start == 1:
        raise ValueError(f"{file}: is empty; its first line must name the columns")


def decode_lines(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """Yield the lines of a text file.

    Raises:
        ValueError: one is not UTF-8.
    """
    for number, line in enumerate(lines, 1):
        yield read_text(line, f"{name}: line {number}")


def check_header(header: list[str], file: Path) -> None:
    """Check the names of the columns of a CSV.

    Raises:
        ValueError: there is none, or one occurs twice.
    """
    for name in header:
        if name and header.count(name) > 1:
            raise ValueError(f"{file}: has two columns {name!r}; rename one")
    if not any(header):
        raise ValueError(f"{file}: its first line must name the columns")


def csv_rows(
    file: Path, columns: list[str], wrong: WrongEntries, is_read: Chooser
) -> Iterator[Record]:
    """Yield the rows of a CSV."""
    rows = read_csv(file, DELIMITERS[file.suffix.lower()])
    next(rows)
    chosen = [(i, name) for i, name in enumerate(columns) if is_read(name)]
    for number, row in rows:
        where = f"{file}: line {number}"
        if len(row) != len(columns):
            wrong.add(f"{where}: has {len(row)} fields, the header has {len(columns)}")
            continue
        yield Record(where, file.name, {name: row[i] for i, name in chosen})


def json_lines(file: Path, wrong: WrongEntries) -> Iterator[Record]:
    """Yield the objects in JSON lines; blank lines are passed over."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}: line {number}"
            try:
                values = parse_json(line, where)
            except ValueError as error:
                wrong.add(error)
                continue
            if isinstance(values, dict):
                yield Record(where, file.name, values)
            else:
                wrong.add(f"{where}: is {shorten(values)}; it must be an object")


def json_objects(file: Path, wrong: WrongEntries) -> Iterator[Record]:
    """Yield the objects in a JSON list.

    Raises:
        ValueError: the file is no JSON list.
    """
    objects = parse_json(file.read_bytes(), str(file))
    if not isinstance(objects, list):
        raise ValueError(
            f"{file}: is a JSON {type(objects).__name__}; it must be a list of objects, one of "
            "each image"
        )
    for number, values in enumerate(objects):
        where = f"{file}: entry {number}"
        if isinstance(values, dict):
            yield Record(where, file.name, values)
        else:
            wrong.add(f"{where}: is {shorten(values)}; it must be an object")


def chosen_rows(
    objects: Callable[[Path, WrongEntries], Iterator[Record]],
    file: Path,
    wrong: WrongEntries,
    is_read: Chooser,
) -> Iterator[Record]:
    """Yield the objects in a file with those of their values that are read."""
    for record in objects(file, wrong):
        chosen = {name: value for name, value in record.values.items() if is_read(name)}
        yield record._replace(values=chosen)


class StoredImage(NamedTuple):
    """An image that a list holds itself."""

    open: Callable[[], Image.Image]
    name: str


class ListSource(ImageSource):
    """Images in the order of lists, by paths relative to the list, or stored in it.

    Args:
        files: the lists, which lie in one folder.
        options: the image column.
        fields: what is read beside images.
        wrong: receives rows without an image, and images that are listed twice.
    """

    captions_required = True

    def __init__(
        self, files: list[Path], options: ListingOptions, fields: FieldReader, wrong: WrongEntries
    ):
        super().__init__()
        if options.classes not in (None, "none"):
            raise ValueError(
                f"classes is {options.classes!r}, which is for folders; name the column of the "
                "classes (--class_field) instead"
            )
        self.files = files
        self.options = options
        self.fields = fields
        self.wrong = wrong
        self._listed: set[str] = set()
        self._identity = hashlib.sha256()

    def entries(self) -> Iterator[Entry]:
        shown = f"{len(self.files)} files"  # in lines
        if len(self.files) == 1:
            shown = self.files[0].name
        used: Counter[str] = Counter()
        for file in self.files:
            # Choose the columns.
            table = open_list(file, self.wrong)
            self.fields.add_names(table.columns)
            column = self.choose_image_column(table, file)
            if table.fixed:
                self.check_columns(table, file)
            if not used[column]:
                self.lines.append(f"images: column {column!r} of {shown}")
            used[column] += 1

            # Read the rows.
            if column in table.stored:
                self.identify(file.name, file.stat())
            folder = os.path.abspath(file.parent)
            for record in table.rows(partial(self.is_read, column)):
                yield from self.read_row(record._replace(source=shown), column, folder)
        self.checksum = self._identity.hexdigest()

    def is_read(self, image_column: str, name: str) -> bool:
        """Whether a column is read."""
        return name in (image_column, STATUS) or self.fields.is_needed(name)

    def choose_image_column(self, table: Table, file: Path) -> str:
        """Return the column of the images.

        Raises:
            ValueError: there is none.
        """
        named = self.options.image_column
        if named:
            if named not in table.columns:
                raise ValueError(
                    f"{file}: has no column {named!r} (--image_column); "
                    f"{describe_names(table.columns)}"
                )
            return named
        common = {name.lower(): name for name in reversed(table.columns)}
        for name in IMAGE_COLUMNS:
            if common.get(name) in table.stored:
                return common[name]
        for name in IMAGE_COLUMNS:
            if name in common:
                return common[name]
        raise ValueError(
            f"{file}: has no column of images, such as file_name or image; "
            f"{describe_names(table.columns)}; name it with --image_column"
        )

    def check_columns(self, table: Table, file: Path) -> None:
        """Check that a list has the columns that are read.

        Raises:
            ValueError: it has not.
        """
        self.fields.check_columns(table.columns, file)
        names = {name.lower() for name in table.columns}
        if self.fields.automatic and not names.intersection(COMMON_NAMES):
            raise ValueError(
                f"{file}: has no column of captions, such as caption or text; "
                f"{describe_names(table.columns)}; name it with --captions, or read no captions "
                "(--captions none)"
            )

    def read_row(self, record: Record, column: str, folder: str) -> Iterator[Entry]:
        """Yield the image of a row, if it has one."""
        image = record.values.get(column)
        if isinstance(image, StoredImage):
            self._identity.update(f"{image.name}\n".encode())
            yield Entry(image.name, image.open, None, (record,))
            return
        status = record.values.get(STATUS)
        if not image and isinstance(status, str) and status != SUCCESS:
            self.passed_over[f"rows without an image ({status})"] += 1
            return
        if not isinstance(image, str) or not image or "\0" in image:
            self.wrong.add(f"{record.where}: {column} is {shorten(image)}; it must be a path")
            return
        yield from self.read_path(record, image, folder)

    def read_path(self, record: Record, path: str, folder: str) -> Iterator[Entry]:
        """Yield the image at a path of a list, if it exists and is the first with this path."""
        name = os.path.normpath(path).removeprefix(f"{folder}{os.sep}")
        if name in self._listed:
            self.wrong.add(f"{record.where}: {path} is listed a second time")
            return
        try:
            status = os.stat(os.path.join(folder, name))
        except (FileNotFoundError, NotADirectoryError):
            url = " (it is a URL; download it, for example with img2dataset)"
            self.wrong.add(f"{record.where}: {path} does not exist{url if '://' in path else ''}")
            return
        if not stat.S_ISREG(status.st_mode):
            self.wrong.add(f"{record.where}: {path} is no file")
            return
        self._listed.add(name)
        self.identify(name, status)
        yield Entry(name, partial(open_file, folder, name), None, (record,))

    def identify(self, name: str, status: os.stat_result) -> None:
        """Add a file to the checksum."""
        text = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
        self._identity.update(text.encode("utf-8", "surrogateescape"))


def open_file(folder: str, name: str) -> Image.Image:
    """Open an image by its path relative to a folder; `name` may be absolute."""
    path = Path(folder, name)
    return open_image(path, path.suffix)
