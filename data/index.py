"""Indexing webdataset tars of other programs: offsets beside each tar, and a manifest."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.files import (
    canonical,
    check_folder,
    describe_error,
    digest,
    file_checksum,
    is_machine_fault,
    raise_named,
    read_json,
    write_json,
)
from data.images import read_image
from data.latents import check_unit_variance, read_latent
from data.pixels import PixelOptions
from data.progress import Meter
from data.schema import COUNT, check_schema
from data.shards.manifest import FORMAT, read_record
from data.shards.scan import TAR_BLOCK, PassedOver, Spans, describe_passed_over
from data.shards.write import describe_shard, measure_offsets, scan_complete_tar, write_offsets
from data.tars import (
    LABEL_FIELD,
    LATENT_FIELD,
    check_options,
    check_tolerance,
    check_used,
    choose_samples,
    field_kind,
    parse_label,
)

ONE_LAYOUT = {  # what samples that differ must be, by their kind
    "images": (
        "scale them to one size with `rectify pack`, or read the tars with SequentialTars and its "
        "option `size`"
    ),
    "latents": "they must have one type and shape",
}
UNEVEN = "not every sample has their field"  # why members are not read
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # names of compressed tars

# Entries of a tar's record, in addition to those of any shard.
SCHEMA = {
    "largest_class": range(-1, COUNT.stop),
    "options": [(None, str, bool, float)],
    "kind": (None, str),
    "left_out": COUNT,
    "reason": str,
    "layout": (None, str),
    "moments": [float],
}


class Options(NamedTuple):
    """What is read of each tar. A record that was made with other options is made again."""

    field: str | None
    labelled: bool  # whether classes are read
    factor: float  # that scales latents
    pixels: PixelOptions  # how images become pixels

    def as_list(self) -> list[Any]:
        """Return the options as they are recorded."""
        return [self.field, self.labelled, self.factor, *self.pixels]


class CheckedSamples(NamedTuple):
    """The readable samples of a tar."""

    samples: list[tuple[str, Spans]]
    largest_class: int  # -1 without classes
    skipped: int  # samples that are left out
    reason: str  # why the last of them is
    layout: str | None  # size of the images, or type and shape of the latents
    moments: list[float]  # number of numbers in the latents, their sum and sum of squares


def index(
    folder: Path,
    out: Path | None = None,
    field: str | None = None,
    classes: int | None = None,
    scale: float | None = None,
    tolerance: float = 0.01,
    grey: bool = False,
    background: str = "white",
    white: float | None = None,
) -> None:
    """Index a folder of webdataset tars: write offsets beside each tar, and a manifest.

    Samples with an image make a set of images, which must have one size. Samples with .npy make a
    set of latents. A .cls file is the number of a class. Every sample is read once. Files that this
    command did not write are never replaced.

    Args:
        folder: the tars' folder.
        out: folder for the set, with links to the tars; by default the tars' folder.
        field: the field to read, for samples with several images: jpg, or mask.png.
        classes: number of classes; 0 reads none. By default the largest class and one.
        scale: factor that latents are multiplied by, such as the scaling_factor of their
            autoencoder; 1 reads them as they are. By default they must have about unit variance.
        tolerance: fraction of a tar's samples, rounded up, that may lack what is read or be
            unreadable. They are left out, counted and named; more are an error.
        grey: read images with one channel instead of three.
        background: colour on which transparent images are laid, such as white or #808080.
        white: value of white in images of 16 or 32 bits and floats. By default 65535 for 16 bits;
            others must declare it.
    """
    # Check the options, and that nothing of the user's would be replaced.
    if field:
        field_kind(field)
    pixel_options = PixelOptions(grey, background, white)
    check_options(tolerance, classes or 0, scale, pixel_options)
    check_folder(folder)
    tars = find_tars(folder)
    out = out or folder
    check_replaceable(folder, out, tars)

    # Index each tar.
    options = Options(field, classes != 0, scale or 1.0, pixel_options)
    passed_over: dict[str, PassedOver] = {}
    shards = []
    with Meter("index", len(tars), "shards") as meter:
        for tar in tars:
            record = index_shard(tar, out, options, tolerance, passed_over)
            shards.append({"name": tar.name, **record})
            meter.add(1)
    if passed_over:
        print(f"index: passed over {describe_passed_over(passed_over)}", file=sys.stderr)
    empty = [shard["name"] for shard in shards if not shard["count"]]
    if empty:
        print(f"index: {len(empty)} tars are empty, such as {empty[0]}", file=sys.stderr)

    # Write the manifest.
    kind = find_kind(folder, shards)
    check_used(str(folder), kind, scale, pixel_options)
    class_count = count_classes(folder, shards, classes)
    check_layouts(folder, shards, kind)
    if kind == "latents" and scale is None:
        check_variance(folder, shards)
    identity = [shard["sha256"] for shard in shards]
    if field:
        identity.append(field)
    if pixel_options != PixelOptions():
        identity.append(str(pixel_options))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "kind": kind,
        "listing": digest(canonical(identity)),
        "classes": [str(number) for number in range(class_count)] or None,
        "samples": sum(shard["count"] for shard in shards),
        "shards": shards,
    }
    if kind == "images":
        manifest |= pixel_options._asdict()
    if scale is not None and kind == "latents":
        manifest["factor"] = scale
    for tar in tars:
        if not (out / tar.name).exists():
            (out / tar.name).symlink_to(tar.resolve())
    write_json(out / "manifest.json", manifest)


def find_tars(folder: Path) -> list[Path]:
    """Return the tars of a folder, by name; those that are not read are printed.

    Raises:
        OSError: it has none.
        ValueError: it also has compressed tars, which would be left out.
    """
    tars = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    compressed = sorted(path for path in folder.glob("*") if path.name.endswith(COMPRESSED))
    if compressed:
        raise ValueError(
            f"{compressed[0]}: is compressed, as {len(compressed)} tars in this folder are; "
            "decompress them, or move them elsewhere"
        )
    read = {tar.resolve() for tar in tars}
    others = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ".tar" and path.resolve() not in read
    ]
    if not tars:
        found = f", but {others[0]}" if others else ""
        raise FileNotFoundError(f"{folder}: has no .tar files{found}")
    if others:
        text = f"index: passed over {len(others)} tars, such as {others[0]} (hidden, in a subfolder"
        print(f"{text} or with a suffix that is not .tar)", file=sys.stderr)
    return tars


def check_replaceable(folder: Path, out: Path, tars: list[Path]) -> None:
    """Check that every file that will be written is new, or was written by this command."""
    if out.exists():
        check_folder(out)
        if not os.access(out, os.W_OK):
            raise PermissionError(
                f"{out}: may not be written to; write the set to another folder (--out)"
            )
    for target in (folder, out):
        if (target / "plan.json").exists():
            raise ValueError(
                f"{target}: is a set of this program already; "
                "run the command that makes it to repair it"
            )
    for tar in tars:
        path = out / tar.name
        if (path.exists() or path.is_symlink()) and path.resolve() != tar.resolve():
            raise ValueError(f"{path}: is not a link to {tar}; choose another --out")
    records = [(out / tar.name).with_suffix(".json") for tar in tars]
    for path in (*records, out / "manifest.json"):
        if path.exists() and not is_written_by_rectify(path):
            raise ValueError(
                f"{path}: is no file of `rectify index`, or damaged; move it away, or write the "
                "set to another folder (--out)"
            )
    for record in records:
        offsets = record.with_suffix(".npy")
        if offsets.exists() and not record.exists() and not has_offsets(offsets):
            raise ValueError(
                f"{offsets}: is no file of `rectify index`; move it away, or write the set to "
                "another folder (--out)"
            )


def is_written_by_rectify(path: Path) -> bool:
    """Whether a file has the checksum that this program writes into JSON."""
    try:
        read_json(path)
    except ValueError:
        return False
    return True


def has_offsets(path: Path) -> bool:
    """Whether an .npy file looks like the offsets of a tar, whose record was not written yet."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return False
    if array.dtype != np.int64 or array.ndim != 3 or array.shape[-1] != 3:
        return False
    starts = array[..., 0][array[..., 1] >= 0]
    return bool((starts >= TAR_BLOCK).all() and (starts % TAR_BLOCK == 0).all())


def index_shard(
    tar: Path, out: Path, options: Options, tolerance: float, passed_over: dict[str, PassedOver]
) -> dict[str, Any]:
    """Index one tar unless that was done and the tar did not change; return its record.

    Args:
        tar: the tar.
        out: folder of the set.
        options: what is read of it.
        tolerance: fraction of its samples, rounded up, that may be left out.
        passed_over: receives the members that are not read.
    """
    record_path = (out / tar.name).with_suffix(".json")
    offsets_path = record_path.with_suffix(".npy")
    record = read_record(record_path)
    if record and is_indexed(tar, offsets_path, record, options):
        check_schema(record, SCHEMA, str(record_path))
        report_left_out(tar, record, tolerance)
        return record

    # Choose and check the samples.
    contents = scan_complete_tar(tar)
    chosen = choose_samples(contents, str(tar), options.field)
    checked = check_samples(tar, chosen.samples, options)
    facts = {
        "count": len(checked.samples),
        "largest_class": checked.largest_class,
        "options": options.as_list(),
        "kind": chosen.kind,
        "left_out": chosen.missing + checked.skipped,
        "reason": chosen.reason or checked.reason,
        "layout": checked.layout,
        "moments": checked.moments,
    }
    report_left_out(tar, facts, tolerance)

    # Leave out fields that not all samples have, but of those that are read.
    spans = [spans for _, spans in checked.samples]
    counts = Counter(field for sample in spans for field in sample)
    read = {next(iter(sample)) for sample in spans}
    fields = []
    for field, count in sorted(counts.items()):
        if field == LABEL_FIELD and not options.labelled:
            continue
        if field in read or count == len(spans):
            fields.append(field)
        else:
            add_passed_over(passed_over, UNEVEN, f"{tar.name}: .{field}", count)
    for why, (first, count) in contents.passed_over.items():
        add_passed_over(passed_over, why, f"{tar.name}: {first}", count)

    # Write the offsets, and then the record.
    write_offsets(offsets_path, measure_offsets(tar, spans, fields))
    record = {**describe_shard(tar, offsets_path, fields, len(spans)), **facts}
    write_json(record_path, record)
    return record


def report_left_out(tar: Path, record: dict[str, Any], tolerance: float) -> None:
    """Print how many samples of a tar are left out; refuse more than are tolerated."""
    left_out = record["left_out"]
    total = record["count"] + left_out
    check_tolerance(str(tar), left_out, total, tolerance, record["reason"])
    if left_out:
        text = f"index: {tar}: {left_out} of {total} samples are left out ({record['reason']})"
        print(text, file=sys.stderr)


def add_passed_over(passed_over: dict[str, PassedOver], reason: str, name: str, count: int) -> None:
    """Add members of a tar that are not read, with the name of the first."""
    before = passed_over.get(reason, PassedOver(name, 0))
    passed_over[reason] = PassedOver(before.first, before.members + count)


def is_indexed(tar: Path, offsets: Path, record: dict[str, Any], options: Options) -> bool:
    """Whether a record belongs to the present content of a tar, its offsets and the options."""
    if not offsets.exists() or record.get("options") != options.as_list():
        return False
    same_offsets = record["offsets"] == file_checksum(offsets)
    return same_offsets and record["xxh3"] == file_checksum(tar)


def check_samples(tar: Path, samples: list[tuple[str, Spans]], options: Options) -> CheckedSamples:
    """Read every sample; leave out those that are unreadable.

    Args:
        tar: the tar.
        samples: key and spans of each, the field that is read first.
        options: what is read.

    Raises:
        ValueError: only some samples have a class, images have several sizes, or latents several
            types or shapes.
    """
    labelled = options.labelled and check_all_labelled(tar, samples)
    data = np.memmap(tar, np.uint8, "r") if samples else np.empty(0, np.uint8)
    found = CheckedSamples([], -1, 0, "", None, [0.0, 0.0, 0.0])
    label = -1
    for key, spans in samples:
        name = f"{tar}: {key}"
        field = next(iter(spans))
        try:
            if labelled:
                label = parse_label(cut(data, spans[LABEL_FIELD]))
            if field == LATENT_FIELD:
                x = read_latent(cut(data, spans[field]), options.factor)
            else:
                x = read_image(cut(data, spans[field]), field, options.pixels, name)
        except Exception as error:  # Pillow and the parser of .npy headers raise many kinds
            if is_machine_fault(error):
                raise_named(error, name)
            reason = found.reason or f"{key}: {describe_error(error)}"
            found = found._replace(skipped=found.skipped + 1, reason=reason)
            continue
        found = add_layout(found, name, x, "latents" if field == LATENT_FIELD else "images")
        found.samples.append((key, spans))
        found = found._replace(largest_class=max(found.largest_class, label))
    return found


def cut(data: np.ndarray, span: tuple[int, int]) -> np.ndarray:
    """Return the bytes of a span."""
    start, size = span
    return data[start : start + size]


def check_all_labelled(tar: Path, samples: list[tuple[str, Spans]]) -> bool:
    """Return whether the samples of a tar have classes.

    Raises:
        ValueError: only some of them do.
    """
    without = [key for key, spans in samples if LABEL_FIELD not in spans]
    if without and len(without) < len(samples):
        raise ValueError(
            f"{tar}: {len(without)} of {len(samples)} samples have no .{LABEL_FIELD}, such as "
            f"{without[0]}; add them, or read no classes (--classes 0)"
        )
    return not without


def add_layout(found: CheckedSamples, name: str, x: np.ndarray, kind: str) -> CheckedSamples:
    """Add the layout of a sample, which must be that of the others, and the moments of a latent.

    Args:
        found: what was found before.
        name: of the sample, for the error.
        x: pixels or latent, (C, H, W).
        kind: images or latents.
    """
    layout = f"{x.dtype} {x.shape}"
    if kind == "images":
        layout = f"{x.shape[2]} x {x.shape[1]} pixels"
    if found.layout not in (None, layout):
        raise ValueError(f"{name} is {layout}, but others are {found.layout}; {ONE_LAYOUT[kind]}")
    found = found._replace(layout=layout)
    if kind == "images":
        return found
    values = x.astype(np.float64)
    of_latent = (values.size, values.sum(), np.square(values).sum())
    moments = [float(total + part) for total, part in zip(found.moments, of_latent)]
    return found._replace(moments=moments)


def find_kind(folder: Path, shards: list[dict[str, Any]]) -> str:
    """Return what the samples of all tars are: images or latents."""
    kinds = {shard["kind"]: shard["name"] for shard in shards if shard["count"]}
    if not kinds:
        raise ValueError(f"{folder}: its tars have no samples")
    if len(kinds) > 1:
        names = [f"{name} holds {kind}" for kind, name in kinds.items()]
        raise ValueError(
            f"{folder}: {', '.join(names)}; keep them in folders of their own, or name the one "
            "to read with --field"
        )
    return next(iter(kinds))


def count_classes(folder: Path, shards: list[dict[str, Any]], classes: int | None) -> int:
    """Return the number of classes, 0 for none.

    Args:
        folder: the tars' folder.
        shards: records of the tars.
        classes: number of classes that the user gave.

    Raises:
        ValueError: only some tars have classes, or there are more classes than samples.
    """
    labelled = []
    unlabelled = []
    for shard in shards:
        if shard["count"] and LABEL_FIELD in shard["fields"]:
            labelled.append(shard["name"])
        elif shard["count"]:
            unlabelled.append(shard["name"])
    if classes == 0 or (classes is None and not labelled):
        return 0
    if unlabelled:
        raise ValueError(
            f"{folder}: the samples of {unlabelled[0]} have no .{LABEL_FIELD} "
            f"({len(labelled)} tars have classes, {len(unlabelled)} have none); add them, or read "
            "no classes (--classes 0)"
        )
    largest = max(shard["largest_class"] for shard in shards)
    samples = sum(shard["count"] for shard in shards)
    if classes is not None and largest >= classes:
        raise ValueError(f"{folder}: has the class {largest}, but classes is {classes}")
    if classes is None and largest >= samples:
        raise ValueError(
            f"{folder}: has the class {largest}, but only {samples} samples; .{LABEL_FIELD} must "
            f"be the number of a class, no id; if it is, give the number of classes (--classes)"
        )
    return classes or largest + 1


def check_layouts(folder: Path, shards: list[dict[str, Any]], kind: str) -> None:
    """Check that the images of all tars have one size, or the latents one type and shape."""
    layouts = {shard["layout"]: shard["name"] for shard in shards if shard["count"]}
    if len(layouts) > 1:
        found = [f"{layout} in {name}" for layout, name in layouts.items()]
        raise ValueError(f"{folder}: its {kind} are {', '.join(found)}; {ONE_LAYOUT[kind]}")


def check_variance(folder: Path, shards: list[dict[str, Any]]) -> None:
    """Check that the latents of all tars have about unit variance."""
    count, total, squares = np.sum([shard["moments"] for shard in shards], axis=0)
    variance = max(0.0, squares / count - (total / count) ** 2)
    check_unit_variance(str(folder), float(variance**0.5))
