"""Twelve pictures whose captions are odd, written in every form that `rectify pack` reads."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.captions import Caption, captions_to_json, clean_captions
from data.listings import ListingOptions
from data.shards import ShardWriter

LONG = "a long text " * 682 + "of 8192."
TEXTS: list[list[str]] = [
    ["a red square"],
    ["Ein Käse über dem Fluß, e\u0301"],
    ["👩‍🚀 on the 🌙"],
    ["שלום, مرحبا"],
    ["first line\nsecond line"],
    ["a line that ends as in Windows\r\nthe next"],
    [""],
    [" \t\n "],
    [],
    ["one dog", "two dogs"],
    ['she says "hi, you";\tthen goes'],
    [f"\ufeff{LONG}"],
]
NAMES = [f"{i:02d}.png" for i in range(len(TEXTS))]
HALF = len(TEXTS) // 2
MARK = b"\xef\xbb\xbf"  # a byte order mark


class Storage(NamedTuple):
    """A way to store captioned pictures."""

    write: Callable[[Path], Path]  # into a folder; returns what `pack --images` is given
    captions: str = "auto"
    image_column: str | None = None
    classes: str | None = None

    def options(self, **changes: Any) -> ListingOptions:
        """Return the options with which it is read."""
        options = ListingOptions(
            captions=self.captions,
            image_column=self.image_column,
            classes=self.classes,
            uncaptioned=0.25,
        )
        return options._replace(**changes)


def expected_captions() -> list[tuple[Caption, ...]]:
    """Return the captions of the pictures, as every form must give them."""
    found = []
    for texts in TEXTS:
        found.append(clean_captions([Caption(text) for text in texts], "test"))
    return found


def pixels_of_picture(i: int) -> np.ndarray:
    """Return picture i as uint8, (4, 5, 3)."""
    return np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)


def picture(i: int) -> bytes:
    """Return picture i as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_of_picture(i)).save(buffer, "png")
    return buffer.getvalue()


def write_pictures(folder: Path, names: list[str] = NAMES) -> Path:
    """Write the pictures into a folder under these names."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return folder


def value_of(texts: list[str]) -> str | list[str] | None:
    """Return captions as one value: a text, a list of several, or null."""
    if len(texts) > 1:
        return texts
    return texts[0] if texts else None


def rows(names: list[str] = NAMES) -> list[dict[str, Any]]:
    """Return one row of each picture: its name, and all captions as one value."""
    found = []
    for name, texts in zip(names, TEXTS):
        found.append({"file_name": name, "text": value_of(texts)})
    return found


def columns() -> dict[str, list[str | None]]:
    """Return the first and the second caption of each picture, as two columns."""
    first = [texts[0] if texts else None for texts in TEXTS]
    second = [texts[1] if len(texts) > 1 else None for texts in TEXTS]
    return {"text": first, "alt": second}


def write_csv(path: Path, rows: list[list[str | None]], delimiter: str = ",") -> Path:
    """Write rows as CSV, with a byte order mark as spreadsheets write it."""
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), "utf-8")
    return path


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """Write samples, each a key and its fields, as a webdataset tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, fields in samples:
            for field, data in fields.items():
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def table_rows() -> list[list[str | None]]:
    """Return a header and a row of each picture, with its captions in two columns."""
    cells = columns()
    return [["file_name", *cells], *map(list, zip(NAMES, *cells.values()))]


# Folders of images.


def write_sidecar_text(folder: Path) -> Path:
    """Write 00.txt beside 00.png, and its second caption as 00.caption."""
    write_pictures(folder)
    for name, texts in zip(NAMES, TEXTS):
        for suffix, text in zip((".txt", ".caption"), texts):
            (folder / name).with_suffix(suffix).write_bytes(text.encode())
    return folder


def write_sidecar_json(folder: Path) -> Path:
    """Write 00.json beside 00.png."""
    write_pictures(folder)
    for name, texts in zip(NAMES, TEXTS):
        if texts:
            text = json.dumps({"caption": value_of(texts), "url": "http://host/0"})
            (folder / name).with_suffix(".json").write_bytes(MARK + text.encode())
    return folder


def write_metadata_jsonl(folder: Path) -> Path:
    write_pictures(folder)
    write_jsonl(folder / "metadata.jsonl", rows())
    return folder


def write_metadata_csv(folder: Path) -> Path:
    write_pictures(folder)
    write_csv(folder / "metadata.csv", table_rows())
    return folder


def write_metadata_parquet(folder: Path) -> Path:
    write_pictures(folder)
    table = pa.table({"file_name": NAMES, **columns()})
    pq.write_table(table, folder / "metadata.parquet")
    return folder


def write_metadata_of_subfolders(folder: Path) -> Path:
    """Write the pictures into two folders, each with its own metadata."""
    for number, part in enumerate((slice(0, HALF), slice(HALF, None))):
        subfolder = folder / f"part{number}"
        subfolder.mkdir(parents=True)
        write_jsonl(subfolder / "metadata.jsonl", rows()[part])
        for i, name in list(enumerate(NAMES))[part]:
            (subfolder / name).write_bytes(picture(i))
    return folder


def write_img2dataset_files(folder: Path) -> Path:
    """Write two shards as `img2dataset --output_format files` does."""
    cells = columns()
    for i in range(len(TEXTS)):
        shard = f"{i // HALF:05d}"
        path = folder / shard / f"{i // HALF:05d}{i % HALF:04d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".jpg").write_bytes(picture(i))
        text = cells["text"][i] or ""
        path.with_suffix(".txt").write_bytes(text.encode())
        facts = {"caption": text, "alt": cells["alt"][i], "status": "success", "key": path.name}
        path.with_suffix(".json").write_text(json.dumps(facts, indent=4))
        (folder / f"{shard}_stats.json").write_text('{"count": 6}')
        pq.write_table(pa.table({"key": [path.name]}), folder / f"{shard}.parquet")
    return folder


# Lists.


def write_list_csv(folder: Path) -> Path:
    write_pictures(folder)
    return write_csv(folder / "list.csv", table_rows())


def write_list_tsv(folder: Path) -> Path:
    write_pictures(folder)
    return write_csv(folder / "list.tsv", table_rows(), "\t")


def write_list_jsonl(folder: Path) -> Path:
    """Write a list beside the folder of the pictures; half of its paths are absolute."""
    write_pictures(folder / "pictures")
    paths = [f"pictures/{name}" for name in NAMES]
    paths[HALF:] = [str(folder / path) for path in paths[HALF:]]
    return write_jsonl(folder / "list.jsonl", rows(paths))


def write_list_json(folder: Path) -> Path:
    write_pictures(folder)
    path = folder / "list.json"
    path.write_text(json.dumps(rows()))
    return path


def write_list_parquet(folder: Path) -> Path:
    """Write paths, and captions as lists of objects."""
    write_pictures(folder)
    captions = []
    for texts in TEXTS:
        captions.append([{"text": text, "weight": 1.0} for text in texts] or None)
    table = pa.table({"image_path": NAMES, "captions": captions})
    pq.write_table(table, folder / "list.parquet", row_group_size=5)
    return folder / "list.parquet"


def write_hugging_face_parquet(folder: Path) -> Path:
    """Write images into the columns of Hugging Face's `Image`, in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": picture(i), "path": name} for i, name in enumerate(NAMES)]
    table = pa.table({"image": images, **columns()})
    for number, start in enumerate((0, HALF)):
        path = folder / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(table.slice(start, HALF), path, row_group_size=4)
    return folder


def write_img2dataset_parquet(folder: Path) -> Path:
    """Write `img2dataset --output_format parquet`, with two failed downloads."""
    folder.mkdir(parents=True, exist_ok=True)
    cells = columns()
    table = {
        "key": [f"{i:09d}" for i in range(len(TEXTS) + 2)],
        "jpg": [None, *[picture(i) for i in range(len(TEXTS))], None],
        "txt": [None, *[text or "" for text in cells["text"]], None],
        "alt": [None, *cells["alt"], None],
        "status": ["failed_to_download", *["success"] * len(TEXTS), "failed_to_resize"],
    }
    pq.write_table(pa.table(table), folder / "00000.parquet", row_group_size=5)
    return folder


# Tars.


def text_samples() -> list[tuple[str, dict[str, bytes]]]:
    """Return samples as `img2dataset --output_format webdataset` writes them."""
    samples = []
    for i, texts in enumerate(TEXTS):
        text = texts[0] if texts else ""
        facts = {"caption": text, "alt": texts[1] if len(texts) > 1 else None, "key": str(i)}
        fields = {"jpg": picture(i), "txt": text.encode(), "json": json.dumps(facts).encode()}
        samples.append((f"{i:09d}", fields))
    return samples


def write_img2dataset_tars(folder: Path) -> Path:
    samples = text_samples()
    for number, start in enumerate((0, HALF)):
        write_tar(folder / f"{number:05d}.tar", samples[start : start + HALF])
        (folder / f"{number:05d}_stats.json").write_text('{"count": 6}')
        pq.write_table(pa.table({"key": ["0"]}), folder / f"{number:05d}.parquet")
    return folder


def write_json_tar(folder: Path) -> Path:
    """Write one tar whose captions are in .json alone; a sample without one has none."""
    samples = []
    for i, texts in enumerate(TEXTS):
        fields = {"png": picture(i)}
        if texts:
            fields["json"] = json.dumps({"prompt": value_of(texts)}).encode()
        samples.append((f"{i:04d}", fields))
    return write_tar(folder / "one.tar", samples)


def write_our_set(folder: Path) -> Path:
    """Write a set as `rectify pack` does."""
    writer = ShardWriter(folder, "images", {"grey": False}, len(TEXTS), 5)
    for number in writer.numbers():
        samples = []
        for i in writer.indices(number):
            facts = {"captions": captions_to_json(expected_captions()[i])}
            sample = {"__key__": f"{i:09d}", "png": picture(i), "json": json.dumps(facts).encode()}
            samples.append(sample)
        writer.write(number, samples, skipped=[])
    writer.finish()
    return folder


STORAGES = {
    "text files": Storage(write_sidecar_text, "txt,caption"),
    "JSON files": Storage(write_sidecar_json),
    "metadata.jsonl": Storage(write_metadata_jsonl),
    "metadata.csv": Storage(write_metadata_csv, "text,alt"),
    "metadata.parquet": Storage(write_metadata_parquet, "text,alt"),
    "metadata of subfolders": Storage(write_metadata_of_subfolders, classes="none"),
    "img2dataset files": Storage(write_img2dataset_files, "txt,alt"),
    "CSV": Storage(write_list_csv, "text,alt"),
    "TSV": Storage(write_list_tsv, "text,alt"),
    "JSON lines": Storage(write_list_jsonl),
    "JSON list": Storage(write_list_json),
    "parquet of paths": Storage(write_list_parquet),
    "parquet of Hugging Face": Storage(write_hugging_face_parquet, "text,alt"),
    "parquet of img2dataset": Storage(write_img2dataset_parquet, "txt,alt"),
    "tars of img2dataset": Storage(write_img2dataset_tars, "txt,alt"),
    "tar with JSON": Storage(write_json_tar),
    "our set": Storage(write_our_set),
}
