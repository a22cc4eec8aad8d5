"""Folders of images: which files are images, and which classes the subfolders are."""

import heapq
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

from data.files import check_folder, errors_named
from data.pixels import is_image

# Folders that systems and programs make beside a user's images.
SYSTEM_FOLDERS = {
    "@eaDir",
    "@Recycle",
    "@Recently-Snapshot",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__MACOSX",
    "__pycache__",
    "lost+found",
}
SPLITS = {
    *("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"),
    *("heldout", "holdout"),
}
CLASS_MODES = ("none", "top", "leaf")
UNSUPPORTED = (".heic", ".heif", ".dng", ".cr2", ".nef", ".arw", ".svg")  # images of other programs
SHOWN_SUFFIXES = (".png", ".jpg", ".webp", ".gif", ".tif", ".avif")
SHOWN = 20  # classes, or kinds of files, that a line names


class ImageFolder(NamedTuple):
    """The images of a folder, and their classes."""

    names: list[PurePath]  # of the images, relative to the folder, sorted
    labels: list[int] | None  # of the images; None without classes
    classes: list[str] | None  # names of the classes, by number
    passed_over: Counter[str]  # what is no image of a class, by kind


def find_images(
    folder: Path, classes: str | None = None, natural: bool = False, out: Path | None = None
) -> ImageFolder:
    """Find every image below a folder, and its class.

    Args:
        folder: the folder. Links are followed.
        classes: `none`; `top`, the first folder of an image's path; `leaf`, the folder that holds
            it; or a file with one folder a line, which are the classes in this order. By default
            `top` if there are subfolders.
        natural: order the names of classes by the numbers in them, `2` before `10`.
        out: folder of the packed set, which is no class if it lies in the folder.

    Raises:
        OSError: there is no such folder, or a part of it cannot be read.
        ValueError: it has no images, or its subfolders are not clearly classes.
    """
    # Find the files.
    check_folder(folder)
    passed_over: Counter[str] = Counter()
    names, folders = scan_folder(folder, passed_over)
    if not names:
        raise ValueError(
            f"{folder}: has no images{describe_passed_over(passed_over)}; files are read by their "
            f"suffix, such as {', '.join(SHOWN_SUFFIXES)}"
        )

    if out and out.resolve().is_relative_to(folder.resolve()):
        inside = out.resolve().relative_to(folder.resolve())
        around = {inside, *inside.parents}
        folders = [path for path in folders if path not in around and inside not in path.parents]

    # Name the class of each image.
    is_flat = all(len(name.parts) == 1 for name in names)
    if classes == "none" or (classes is None and is_flat):
        return ImageFolder(names, None, None, passed_over)
    if classes not in (None, *CLASS_MODES):
        return read_classes(folder, Path(classes), names, passed_over)
    check_not_loose(folder, names)
    if classes is None:
        check_top_folders(folder, names)
    if classes == "leaf":
        of_image = [name.parts[-2] for name in names]
        above = {parent for path in folders for parent in path.parents}
        wanted = {path.name: path for path in folders if path not in above}
    else:
        of_image = [name.parts[0] for name in names]
        wanted = {path.parts[0]: path for path in folders}

    # Number the classes.
    for name in sorted(wanted.keys() - set(of_image)):
        raise ValueError(
            f"{folder / wanted[name]}: has no images, so that it would be an empty class; remove "
            "it, or give a file that lists the classes (--classes FILE)"
        )
    found = sorted(set(of_image))
    if natural:
        found.sort(key=natural_key)
    numbers = {name: number for number, name in enumerate(found)}
    return ImageFolder(names, [numbers[name] for name in of_image], found, passed_over)


def scan_folder(folder: Path, passed_over: Counter[str]) -> tuple[list[PurePath], list[PurePath]]:
    """Return the images and the folders below a folder, relative to it and sorted.

    Args:
        folder: the folder.
        passed_over: counts everything else, by kind.
    """
    images: list[PurePath] = []
    folders: set[PurePath] = set()
    read: set[tuple[int, int]] = set()
    remaining = [(0, PurePath())]  # with the number of links in the path: they come last
    while remaining:
        # A link may lead to a folder that is read already, above it or beside it.
        links, subfolder = heapq.heappop(remaining)
        status = (folder / subfolder).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in read:
            passed_over["links to a folder that is read already"] += 1
            folders.discard(subfolder)
            continue
        read.add(identity)

        with os.scandir(folder / subfolder) as entries:
            for entry in entries:
                name = subfolder / entry.name
                if entry.name in SYSTEM_FOLDERS:
                    passed_over["folders of the system"] += 1
                elif entry.name.startswith("."):
                    passed_over["hidden"] += 1
                elif entry.is_dir():
                    folders.add(name)
                    heapq.heappush(remaining, (links + entry.is_symlink(), name))
                elif entry.is_file() and is_image(folder / name):
                    images.append(name)
                else:
                    os.stat(entry.path)  # an error if it is a link to nothing
                    passed_over[name.suffix.lower() or "without a suffix"] += 1
    return sorted(images), sorted(folders)


def check_not_loose(folder: Path, names: Iterable[PurePath]) -> None:
    """Check that no image lies beside class folders."""
    for name in names:
        if len(name.parts) == 1:
            raise ValueError(
                f"{folder / name}: lies beside class folders; move it into one of them, or all "
                "images into one folder, or use no classes (--classes none)"
            )


def check_top_folders(folder: Path, names: Iterable[PurePath]) -> None:
    """Check that the subfolders are not splits of a set, nor one folder around the classes."""
    top = sorted({name.parts[0] for name in names})
    splits = [name for name in top if name.lower() in SPLITS]
    if len(splits) > 1 or splits == top:
        raise ValueError(
            f"{folder}: {', '.join(splits)} are names of splits, not of classes; pack each by "
            f"itself (--images {folder / splits[0]} --holdout 0), or say what the classes are "
            "(--classes top, leaf, none or FILE)"
        )
    if len(top) == 1 and any(len(name.parts) > 2 for name in names):
        raise ValueError(
            f"{folder / top[0]}: would be the only class, but has subfolders; "
            f"give --images {folder / top[0]}, or say what the classes are "
            "(--classes top, leaf, none or FILE)"
        )


def read_classes(
    folder: Path, file: Path, names: Iterable[PurePath], passed_over: Counter[str]
) -> ImageFolder:
    """Return the images in the folders that a file lists, one a line: line n is class n.

    Raises:
        ValueError: there is no such file, or it lists a folder twice or one that does not exist.
    """
    # Read the file.
    if not file.is_file():
        raise ValueError(
            f"classes is {str(file)!r}; it must be {', '.join(CLASS_MODES)} or a file with one "
            "folder a line"
        )
    with errors_named(file):
        lines = file.read_text("utf-8-sig").splitlines()
    paths = [PurePath(line.strip()) for line in lines if line.strip()]
    for path, count in Counter(paths).items():
        if path.is_absolute() or ".." in path.parts or not (folder / path).is_dir():
            raise ValueError(f"{file}: {path} is no folder of {folder}; make it or remove the line")
        if count > 1:
            raise ValueError(f"{file}: lists {path} twice")
    classes = [str(path) for path in paths]
    numbers = {path: number for number, path in enumerate(paths)}

    # Keep the images in these folders.
    kept = []
    labels = []
    for name in names:
        listed = [parent for parent in name.parents if parent in numbers]
        if listed:
            kept.append(name)
            labels.append(numbers[listed[0]])
        else:
            passed_over[f"images that {file} has no folder of"] += 1
    if not kept:
        raise ValueError(f"{file}: none of its folders has an image")
    return ImageFolder(kept, labels, classes, passed_over)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names by the numbers in them."""
    key = []
    for part in re.findall("[0-9]+|[^0-9]+", name):
        key.append((int(part), "") if part[0] in "0123456789" else (-1, part))
    return key


def describe_classes(classes: list[str], labels: Iterable[int | None]) -> str:
    """Return the classes in order, each with its number of images."""
    counts = Counter(labels)
    parts = []
    for number, name in enumerate(classes):
        shown = name if name.isprintable() else repr(name)
        parts.append(f"{shown} ({counts[number]})")
    more = ""
    if len(parts) > SHOWN:
        more = f" and {len(parts) - SHOWN} more"
    order = ""
    if classes == sorted(classes) != sorted(classes, key=natural_key):
        order = "; in alphabetical order, --natural orders by number"
    return f"{len(classes)} classes: {', '.join(parts[:SHOWN])}{more}{order}"


def describe_twins(names: Iterable[PurePath]) -> str:
    """Return how many images have the name of another one but for the suffix; "" for none.

    One of the two may be a mask.
    """
    first: dict[PurePath, PurePath] = {}
    twins = []
    for name in names:
        other = first.setdefault(name.with_suffix(""), name)
        if other is not name:
            twins.append((other, name))
    if not twins:
        return ""
    return (
        f"{len(twins)} images have the name of another one, such as {twins[0][0]} and "
        f"{twins[0][1]}; all are read, so move masks elsewhere"
    )


def describe_passed_over(passed_over: Counter[str]) -> str:
    """Return what was passed over, by kind, after a semicolon; nothing if there is nothing."""
    if not passed_over:
        return ""
    parts = []
    for kind, count in passed_over.most_common(SHOWN):
        unsupported = " (convert them)" if kind in UNSUPPORTED else ""
        parts.append(f"{count} {kind}{unsupported}")
    more = len(passed_over) - len(parts)
    if more > 0:
        parts.append(f"{more} more kinds")
    return f"; passed over: {', '.join(parts)}"
