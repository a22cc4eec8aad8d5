"""Images: packing any folder into shards of PNG, and reading them."""

import io
import sys
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.batch import Batch, Set
from data.digits import CLASSES, Item, digits
from data.files import canonical, digest, naming
from data.form import SHA256, conform
from data.noise import permutation
from data.progress import Meter
from data.shards import ShardReader, ShardWriter

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FIELDS = ("png", "jpg", "jpeg", "webp")  # of an image in a shard
FORMATS = ("PNG", "JPEG", "WEBP")  # that Pillow may take it for: of others (EPS) it runs programs, whatever the name says
LOOSE = (*FORMATS, "BMP", "GIF", "TIFF")  # likewise, of an image in a folder
SPLIT = 0  # seed of the held-out split
UNREADABLE = 0.01  # fraction of corrupt images above which packing is an error


def folder_items(folder: Path) -> tuple[list[Item], list[str] | None]:
    """Return (name, opener, class) of every image below a folder, sorted, and the classes: subfolders, if any."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise ValueError(f"{folder}: no images there ({', '.join(sorted(SUFFIXES))})")
    top = [path.relative_to(folder).parts[0] if path.parent != folder else None for path in paths]
    if None in top and any(top):
        loose = paths[top.index(None)]
        raise ValueError(f"{loose}: lies beside class folders; move it into one, or all images into one folder")
    classes = sorted({name for name in top if name}) or None
    labels = [classes.index(name) if classes and name else None for name in top]
    names = [str(path.relative_to(folder)) for path in paths]
    return [(n, partial(Image.open, p, formats=LOOSE), c) for n, p, c in zip(names, paths, labels)], classes


def fit(image: Image.Image, size: int, grey: bool) -> Image.Image:
    """Return an image upright, 8 bits, grey or RGB, scaled on its shorter side and cropped to a centred square."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip them
        image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return ImageOps.fit(image.convert("L" if grey else "RGB"), (size, size), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    """Return an image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def pack(
    out: Path, images: Path | None = None, size: int = 32, grey: bool = False, holdout: float = 0.1, shard: int = 1024
) -> None:
    """Pack images into webdataset shards of PNG: OUT/train and OUT/heldout.

    Args:
        out: folder for the two sets.
        images: folder of images, subfolders are classes; without it, scikit-learn's handwritten digits.
        size: height and width in pixels; images are scaled and centre-cropped.
        grey: one channel instead of three (the digits are grey anyway).
        holdout: fraction of the images, drawn at random once and for all, that training never sees.
        shard: images in one shard.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout: {holdout} must lie in [0, 1)")
    items, classes = folder_items(images) if images else (digits(), CLASSES)
    grey = grey or images is None
    held = set(permutation(len(items), SPLIT)[: min(round(holdout * len(items)), len(items) - 1)].tolist())
    splits = {"train": [i for i in range(len(items)) if i not in held], "heldout": sorted(held)}
    origin = {"source": str(images or "sklearn.datasets.load_digits"), "size": size, "grey": grey, "classes": classes}
    origin |= {"holdout": holdout, "listing": listing(images, items)}
    unreadable: list[str] = []
    with Meter("pack", len(items), "images") as meter:
        for split, members in splits.items():
            if members:
                writer = ShardWriter(out / split, "images", {**origin, "split": split}, len(members), shard)
                pack_split(writer, [items[i] for i in members], meter, unreadable, UNREADABLE * len(items))
    for name in unreadable:
        print(f"pack: skipped unreadable {name}", file=sys.stderr)


def listing(folder: Path | None, items: list[Item]) -> str:
    """Return a checksum of the images' names, sizes and times of change: another listing is another set."""
    stats = [(folder / name).stat() for name, _, _ in items] if folder else []
    return digest(canonical([[item[0] for item in items], [[stat.st_size, stat.st_mtime_ns] for stat in stats]]))


def pack_split(writer: ShardWriter, items: list[Item], meter: Meter, unreadable: list[str], tolerated: float) -> None:
    """Pack one split; unreadable images are skipped and named in their shard's record, too many are an error."""
    size, grey = writer.plan["size"], writer.plan["grey"]

    def samples(indices: range, skipped: list[str]) -> Iterator[dict[str, Any]]:
        for i in indices:
            name, opened, klass = items[i]
            meter.add(1)
            try:
                data = png(fit(opened(), size, grey))
            except Exception as error:  # Pillow raises many kinds on broken files: struct.error, DecompressionBombError, ...
                skipped.append(name)
                unreadable.append(name)
                if len(unreadable) > tolerated:
                    raise ValueError(f"{name}: unreadable ({error}), as are {len(unreadable)} images so far: over 1 %") from None
                continue
            sample = {"__key__": f"{i:09d}", "png": data}
            yield sample if klass is None else {**sample, "cls": str(klass).encode()}

    for number in writer.numbers():
        if record := writer.finished(number):
            meter.add(len(writer.indices(number)))
            conform(record, {"skipped": [str]}, f"{writer.folder}: record of shard {number}")
            unreadable.extend(record["skipped"])
        else:
            skipped: list[str] = []
            writer.write(number, samples(writer.indices(number), skipped), skipped=skipped)
    writer.finish()


class Images(Set):
    """Packed images, as float32 in [-1, 1].

    Args:
        path: the set, made by `rectify pack`.
        cache: decoded images kept in memory (the most recently read).
    """

    def __init__(self, path: str, cache: int = 4096):
        self.path, self.cache = path, cache
        self.reader = ShardReader(path, "images")
        self.manifest = self.reader.manifest
        conform(self.manifest, {"classes": (None, [str]), "listing": SHA256}, f"{path}/manifest.json")
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.reader)

    def pixels(self, i: int) -> np.ndarray:
        """Return image i as uint8, (C, H, W)."""
        if i not in self._kept:
            sample = self.reader[i]
            with naming(f"{self.path}: image {i} ({sample['__key__']})"):
                data = next(sample[field] for field in FIELDS if field in sample)
                pixels = np.asarray(Image.open(io.BytesIO(data.tobytes()), formats=FORMATS))
                self._kept[i] = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
            if len(self._kept) > self.cache:
                self._kept.popitem(last=False)
        return self._kept[i]

    def read(self, indices: np.ndarray) -> Batch:
        with naming(self.path):  # foreign images may differ in size
            stacked = torch.from_numpy(np.stack([self.pixels(int(i)) for i in indices]))
        return Batch(stacked.float() / 127.5 - 1, latent=False, condition=labels(self.reader, indices))


def labels(reader: ShardReader, indices: np.ndarray) -> Tensor | None:
    """Return the classes of samples, (B,), or None in a set without classes."""
    told = "cls" in reader.manifest["shards"][0]["fields"]
    return torch.from_numpy(reader.numbers("cls", indices)) if told else None


def read_all(source: Set, count: int, batch: int = 512) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield (x, condition) of samples 0 .. count - 1 in order, in batches."""
    for start in range(0, count, batch):
        part = source.read(np.arange(start, min(count, start + batch)))
        yield part.x, part.condition
