"""Folders of images, with text and JSON files beside them or lists of metadata in them."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePath

from PIL import Image

from data.files import canonical, digest
from data.folders import describe_twins, find_images
from data.listings.entries import TEXT_SOURCES, Entry, ImageSource, Record, WrongEntries, read_field
from data.listings.fields import FieldReader, describe_names
from data.listings.listing import ListingOptions
from data.listings.lists import open_list
from data.pixels import open_image

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of Hugging Face's imagefolder
FILE_NAME = "file_name"  # their column
SIDECARS = (*TEXT_SOURCES, ".json")  # files beside an image, of its name, in the order of reading
# Text files without an image, by the beginning of their names, that are no captions.
DOCUMENTS = ("readme", "license", "licence", "notice", "copying", "attribution", "classes")


class FolderSource(ImageSource):
    """A folder of images, sorted by name, with the classes that its subfolders are.

    Captions are in metadata.csv, .jsonl or .parquet, and in files beside an image: for 1.png
    these are 1.txt, 1.caption and 1.json.

    Args:
        folder: the folder.
        options: which classes it has.
        fields: what is read beside images.
        wrong: receives captions without an image.
        out: folder of the packed set, which is no class.
    """

    def __init__(
        self,
        folder: Path,
        options: ListingOptions,
        fields: FieldReader,
        wrong: WrongEntries,
        out: Path,
    ):
        super().__init__()
        self.folder = folder
        self.fields = fields
        self.wrong = wrong

        # Find the images and their classes.
        mode = options.classes
        if options.class_field:
            mode = "none"
        elif mode is None and is_img2dataset(folder):
            mode = "none"
            self.lines.append("the folders are shards of img2dataset, and no classes")
        found = find_images(folder, mode, options.natural, out)
        self.names = found.names
        self.labels = found.labels
        self.classes = found.classes
        self.passed_over = found.passed_over
        self.checksum = checksum_files(folder, [str(name) for name in found.names])
        twins = describe_twins(found.names)
        if twins:
            self.lines.append(twins)

    def entries(self) -> Iterator[Entry]:
        # Read the lists of metadata, and find the files beside images.
        metadata: dict[str, Record] = {}
        sidecars: dict[str, tuple[str, ...]] = {}
        if not self.fields.reads_nothing:
            folders = {parent for name in self.names for parent in name.parents}
            metadata = self.read_metadata(folders)
            sidecars = find_sidecars(self.folder, {name.parent for name in self.names})

        # Yield the images.
        for i, name in enumerate(self.names):
            text = str(name)
            label = self.labels[i] if self.labels else None
            suffixes = sidecars.get(stem_of(text), ())
            records = self.records(text, metadata.get(text), suffixes)
            yield Entry(text, partial(open_listed, str(self.folder), text), label, records)
        self.check_sidecars(sidecars)

    def records(self, name: str, row: Record | None, suffixes: Sequence[str]) -> Iterator[Record]:
        """Yield what is known of an image: its row of metadata, then the files beside it."""
        if row:
            yield row
        for suffix in suffixes:
            self.read_files[suffix.lower()] += 1
            yield read_sidecar(self.folder / f"{stem_of(name)}{suffix}")

    def read_metadata(self, folders: Iterable[PurePath]) -> dict[str, Record]:
        """Return the rows of all lists of metadata, by the name of the image.

        Raises:
            ValueError: a list has no column of file names, or cannot be read.
        """
        rows: dict[str, Record] = {}
        names = {str(name) for name in self.names}
        for folder in sorted(folders):
            for file in METADATA:
                path = self.folder / folder / file
                if path.is_file():
                    for name, row in self.read_rows(path, folder):
                        if name not in names:
                            self.wrong.add(f"{row.where}: {name} is no image of {self.folder}")
                        elif name in rows:
                            self.wrong.add(f"{row.where}: {name} is listed a second time")
                        else:
                            rows[name] = row
        return rows

    def read_rows(self, path: Path, folder: PurePath) -> Iterator[tuple[str, Record]]:
        """Yield the name of an image, relative to the whole folder, and its values."""
        table = open_list(path, self.wrong)
        if FILE_NAME not in table.columns:
            if not self.fields.automatic:
                raise ValueError(
                    f"{path}: has no column {FILE_NAME!r}, which names the images; "
                    f"{describe_names(table.columns)}; add it, or rename the file"
                )
            return
        self.read_files[path.suffix] += 1
        self.fields.add_names(table.columns)
        for row in table.rows(lambda name: name == FILE_NAME or self.fields.is_needed(name)):
            name = row.values.get(FILE_NAME)
            if isinstance(name, str) and name:
                yield os.path.normpath(folder / name), row
            else:
                self.wrong.add(f"{row.where}: {FILE_NAME} is {name!r}; it must be the name of one")

    def check_sidecars(self, sidecars: dict[str, tuple[str, ...]]) -> None:
        """Count the files with a caption that have no image, if such files have captions."""
        kinds = {kind for kind, _ in self.fields.used}.intersection(SIDECARS)
        stems = {stem_of(str(name)) for name in self.names} if kinds else set()
        for stem, suffixes in sidecars.items():
            for suffix in suffixes:
                if suffix.lower() not in kinds or stem in stems:
                    continue
                path = self.folder / f"{stem}{suffix}"
                if path.name.lower().startswith(DOCUMENTS):
                    continue
                if suffix.lower() == ".json" and not self.has_captions(path):
                    continue
                self.wrong.add(f"{path}: has captions, but no image lies beside it")

    def has_captions(self, path: Path) -> bool:
        """Whether a JSON file has a key of captions."""
        try:
            values = read_sidecar(path).values
        except ValueError:
            return False
        return any(self.fields.is_needed(name) for name in values)


def checksum_files(folder: Path, names: Sequence[str]) -> str:
    """Return a checksum of names, sizes and modification times, which identifies images."""
    stats = []
    for name in names:
        stat = os.stat(os.path.join(folder, name))
        stats.append([stat.st_size, stat.st_mtime_ns])
    return digest(canonical([names, stats]))


def open_listed(folder: str, name: str) -> Image.Image:
    """Open an image of a folder; `name` may be absolute."""
    path = Path(folder, name)
    return open_image(path, path.suffix)


def is_img2dataset(folder: Path) -> bool:
    """Whether all subfolders are shards that img2dataset wrote, each with its statistics."""
    if not folder.is_dir():
        return False
    with os.scandir(folder) as found:
        names = [entry.name for entry in found if entry.is_dir() and entry.name[0] != "."]
    if not names:
        return False
    return all(name.isdecimal() and (folder / f"{name}_stats.json").exists() for name in names)


def stem_of(name: str) -> str:
    """Return the path of a file without its suffix."""
    return os.path.splitext(name)[0]


def find_sidecars(folder: Path, subfolders: Iterable[PurePath]) -> dict[str, tuple[str, ...]]:
    """Return the suffixes of text and JSON files in folders, by their path without the suffix.

    Args:
        folder: the folder of images.
        subfolders: those in it that have images.
    """
    found: dict[str, tuple[str, ...]] = {}
    for subfolder in subfolders:
        for name in os.listdir(folder / subfolder):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SIDECARS and not name.startswith("."):
                key = str(subfolder / stem)
                both = (*found.get(key, ()), sys.intern(suffix))
                found[key] = tuple(sorted(both, key=lambda kind: SIDECARS.index(kind.lower())))
    return found


def read_sidecar(path: Path) -> Record:
    """Return the values in a file beside an image.

    Raises:
        ValueError: it is not UTF-8, or no JSON.
    """
    return read_field(path.read_bytes(), path.suffix.lower()[1:], str(path))
