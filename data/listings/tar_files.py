"""Webdataset tars of images, with text, JSON and classes: others' and those of `rectify pack`."""

import hashlib
import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from data.files import parse_checksummed_json
from data.index import COMPRESSED
from data.listings.entries import (
    JSON_FIELD,
    TEXT_FIELDS,
    Entry,
    ImageSource,
    Record,
    read_field,
)
from data.listings.fields import FieldReader
from data.listings.listing import ListingOptions
from data.pixels import IMAGE_FIELDS, open_image
from data.schema import check_schema
from data.shards.scan import Spans, describe_passed_over
from data.tars import LABEL_FIELD, MAX_CLASSES, Tar, parse_label

SET_SUFFIXES = (".json", ".npy")  # of the files beside the tars of our sets


class TarSource(ImageSource):
    """The images of webdataset tars, in the order of their names and of the samples in them.

    Args:
        tars: the files, which lie in one folder.
        options: `image_column`, the field of the images; `classes`; `tolerance` of each tar.
        fields: what is read beside images.

    Raises:
        ValueError: the tars are an unfinished set.
    """

    def __init__(self, tars: list[Path], options: ListingOptions, fields: FieldReader):
        super().__init__()
        if options.classes not in (None, "none"):
            raise ValueError(
                f"classes is {options.classes!r}, which is for folders; the classes of a tar are "
                f"its .{LABEL_FIELD} or a JSON key (--class_field)"
            )
        self.tars = tars
        self.options = options
        self.fields = fields
        self.folder = tars[0].parent
        self.reads_labels = options.classes is None and options.class_field is None
        self.manifest = self._read_manifest()
        self.labelled = ""  # the first image with a class
        self.unlabelled = ""  # and without
        self.largest = -1

    def _read_manifest(self) -> dict[str, object] | None:
        """Return the manifest of our set that the tars are; None if they are not.

        Raises:
            ValueError: the set is unfinished.
        """
        path = self.folder / "manifest.json"
        if not path.exists():
            if (self.folder / "plan.json").exists():
                raise ValueError(
                    f"{self.folder}: is an unfinished set; finish it with the command that makes it"
                )
            return None
        try:
            return parse_checksummed_json(path.read_bytes(), path)
        except ValueError:  # of another program
            return None

    def count_others(self) -> None:
        """Count the other files of the folder, such as those of img2dataset.

        Raises:
            ValueError: one is a compressed tar, which would be left out.
        """
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(COMPRESSED):
                raise ValueError(f"{path}: is compressed; decompress it, or move it elsewhere")
            is_ours = self.manifest is not None and path.suffix in SET_SUFFIXES
            if path not in self.tars and not is_ours and not path.name.startswith("."):
                self.passed_over[path.suffix.lower() or "without a suffix"] += 1

    def entries(self) -> Iterator[Entry]:
        identity = hashlib.sha256()
        count = 0
        for path in self.tars:
            status = path.stat()
            identity.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
            tar = self.open_tar(path)
            count += len(tar)
            for key, spans in tar.samples:
                yield self.read_sample(tar, f"{path.name}: {key}", spans)
        self.checksum = identity.hexdigest()
        self.classes = self.name_classes(count)

    def open_tar(self, path: Path) -> Tar:
        """Open a tar, and count what is not read of it.

        Raises:
            ValueError: it has no images, or lost more samples than tolerated.
        """
        with path.open("rb") as file:
            tar = Tar(
                file,
                str(path),
                self.options.tolerance,
                self.options.image_column,
                option="image_column",
            )
        if tar.samples and not tar.images:
            raise ValueError(f"{path}: has latents, not images; train on it after `rectify index`")
        if tar.lost:
            self.passed_over["samples without an image"] += tar.lost
            self.lines.append(f"{path}: left out {tar.lost} samples ({tar.reason})")
        if tar.passed_over:
            self.lines.append(f"{path}: passed over {describe_passed_over(tar.passed_over)}")
        return tar

    def read_sample(self, tar: Tar, name: str, spans: Spans) -> Entry:
        """Return the image of a sample, and its class."""
        # Its class.
        label = None
        if self.reads_labels and LABEL_FIELD in spans:
            start, length = spans[LABEL_FIELD]
            try:
                label = parse_label(tar.data[start : start + length])
            except ValueError as error:
                raise ValueError(f"{tar.url}: {name}: {error}") from None
            self.largest = max(self.largest, label)
            self.labelled = self.labelled or name
        else:
            self.unlabelled = self.unlabelled or name

        # Its image.
        field = next(field for field in spans if field in IMAGE_FIELDS)
        start, length = spans[field]
        opener = partial(open_member, tar.url, start, length, f".{field}")
        return Entry(name, opener, label, self.records(tar, name, spans))

    def records(self, tar: Tar, name: str, spans: Spans) -> Iterator[Record]:
        """Yield what the other fields of a sample hold."""
        if self.fields.reads_nothing:
            return
        for field in (*TEXT_FIELDS, JSON_FIELD):
            if field in spans:
                start, length = spans[field]
                data = tar.data[start : start + length].tobytes()
                yield read_field(data, field, f"{tar.url}: {name}.{field}")

    def name_classes(self, count: int) -> list[str] | None:
        """Return the names of the classes, from the set's manifest or by number.

        Args:
            count: number of all samples.

        Raises:
            ValueError: only some samples have a class, or there are more classes than names or
                samples.
        """
        if not self.labelled:
            return None
        if self.unlabelled:
            raise ValueError(
                f"{self.unlabelled}: has no .{LABEL_FIELD}, but {self.labelled} has one; add it, "
                "or read no classes (--classes none)"
            )
        names = None
        if self.manifest:
            path = str(self.folder / "manifest.json")
            check_schema(self.manifest, {"classes": (None, [str])}, path)
            names = self.manifest["classes"]
        if isinstance(names, list):
            if self.largest >= len(names):
                raise ValueError(
                    f"{self.folder}: has the class {self.largest}, but manifest.json names "
                    f"{len(names)} classes"
                )
            return names
        if self.largest >= min(count, MAX_CLASSES):
            raise ValueError(
                f"{self.folder}: has the class {self.largest}, but {count} samples; if "
                f".{LABEL_FIELD} are ids, read no classes (--classes none)"
            )
        return [str(number) for number in range(self.largest + 1)]


def open_member(tar: str, start: int, length: int, suffix: str) -> Image.Image:
    """Open an image in a tar.

    Args:
        tar: the file.
        start: offset of the image's bytes.
        length: their number.
        suffix: of the image's format.
    """
    with open(tar, "rb") as file:
        file.seek(start)
        return open_image(io.BytesIO(file.read(length)), suffix)
