"""Sources of text features, and the cache that `rectify encode --text` writes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.cache import Cache, parse_scheme
from data.captions import captions_from_json
from data.files import checksum, errors_named, sample_checksum
from data.schema import COUNT, check_schema, find_difference, shorten
from data.shards import ShardReader, array_to_npy, npy_to_array, read_manifest
from data.shards.read import Shard
from data.text_features import TextFeatures

KIND = "text"
CAPTION_FIELD = "txt"  # fields of a cache's sample
TOKENS_FIELD = "tokens.npy"
POOLED_FIELD = "pooled.npy"
CAPTIONS_FIELD = "json"  # field of an image's or latent's sample that has its captions
CAPTIONED_KINDS = ("images", "latents")
CACHE_SCHEMA = {
    "encoder": dict,
    "tokens_channels": (None, COUNT),
    "pooled_channels": (None, COUNT),
    "shards": [{"longest": COUNT}],
}


class TextSource(Protocol):
    """Where the embeddings of captions come from: a cache, or an encoder."""

    def features(self, texts: Sequence[str]) -> TextFeatures:
        """Return the embeddings of texts."""

    def identity(self) -> dict[str, object]:
        """Return what identifies the encoder and how it is read, as plain values."""


def check_same_embeddings(before: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Check that two sources embed texts alike.

    Args:
        before: the identity of one source.
        now: that of the other.
        where: what was made with the first source, for the error.

    Raises:
        ValueError: they differ; the message names the first entry that does.
    """
    if before == now:
        return
    found = find_difference("encoder", before, now)
    raise ValueError(
        f"{where}: was made with other text embeddings, with {found.key} {shorten(found.before)} "
        f"instead of {shorten(found.now)}; use the text encoder or cache that it was made with"
    )


def find_captioned_sets(folder: str | Path) -> list[str]:
    """Return the captioned sets of images or latents that a folder is, or directly holds.

    Raises:
        OSError: there is no set.
        ValueError: a set has no captions.
    """
    sets = [str(folder)]
    if not parse_scheme(str(folder)) and not (Path(folder) / "manifest.json").exists():
        # Other sets beside them, such as a text cache, are left out.
        inside = [str(path.parent) for path in sorted(Path(folder).glob("*/manifest.json"))]
        sets = [path for path in inside if read_manifest(path)["kind"] in CAPTIONED_KINDS] or sets
    for path in sets:
        manifest = read_manifest(path)
        if manifest["kind"] not in CAPTIONED_KINDS:
            raise ValueError(f"{path}: holds {manifest['kind']}, but images or latents are needed")
        if "captions" not in manifest:
            raise ValueError(
                f"{path}: has no captions, which --text would encode; pack its images again with "
                "captions"
            )
    return sets


def read_captions(path: str) -> Iterator[str]:
    """Yield all captions of a set, in order. Only the captions are read, not the images.

    Raises:
        ValueError: a sample's captions are missing or damaged.
    """
    for record in read_manifest(path)["shards"]:
        shard = Shard(f"{path}/{record['name']}", record, verified=True)
        for row in range(record["count"]):
            data = shard.content(CAPTIONS_FIELD, row, verify=True)
            for caption in captions_from_json(data, shard.tar):
                yield caption.text


def find_distinct_captions(sets: Sequence[str]) -> list[str]:
    """Return the distinct captions of sets.

    The first one is "", for images whose caption is missing or dropped. The others follow in the
    order of their first occurrence.
    """
    found = {"": None}
    for path in sets:
        found.update(dict.fromkeys(read_captions(path)))
    return list(found)


def text_sample(
    key: str, text: str, tokens: np.ndarray | None, pooled: np.ndarray | None
) -> dict[str, Any]:
    """Return one text and its embeddings as a sample of a shard.

    Args:
        key: name of the sample.
        text: the text.
        tokens: embeddings of its tokens, (length, D).
        pooled: embedding of the whole text, (E,).

    Raises:
        ValueError: a value is not finite in float16, in which it is stored.
    """
    sample: dict[str, Any] = {"__key__": key, CAPTION_FIELD: text.encode()}
    for field, values in ((TOKENS_FIELD, tokens), (POOLED_FIELD, pooled)):
        if values is None:
            continue
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16)
        if not np.isfinite(stored).all():
            largest = np.abs(values).max()
            raise ValueError(
                f"the embedding of {shorten(text)} has a value of {largest:g}, which is not finite "
                "in float16; embed the captions in training, with data.source.init_args.text, "
                "where they are float32"
            )
        sample[field] = array_to_npy(stored)
    return sample


def read_checksums(reader: ShardReader, field: str) -> np.ndarray:
    """Return the xxh3 of a field of all samples, (samples,) uint64.

    They are read from the shards' offsets: no tar is opened.
    """
    parts = []
    for record in reader.manifest["shards"]:
        path = f"{reader.folder}/{record['name'].removesuffix('.tar')}.npy"
        with Cache().open(path, record["offsets"]) as file:
            data = file.read()
        if checksum(data) != record["offsets"]:
            raise ValueError(
                f"{path}: its checksum is not the manifest's; restore it or make the set again"
            )
        with errors_named(path):
            offsets = npy_to_array(np.frombuffer(data, np.uint8))
            parts.append(offsets[:, record["fields"].index(field), 2])
    return np.concatenate(parts).view(np.uint64)


class TextCache:
    """Embeddings of captions, computed once by `rectify encode --text`.

    Args:
        path: the set.

    Raises:
        ValueError: it is no set of embeddings, or damaged.
    """

    def __init__(self, path: str):
        self.path = path
        self.reader = ShardReader(path, KIND)
        self.manifest = self.reader.manifest
        check_schema(self.manifest, CACHE_SCHEMA, f"{path}/manifest.json")
        self.longest = max(shard["longest"] for shard in self.manifest["shards"])
        # A caption is found by its checksum, which is sorted here, and compared in full.
        checksums = read_checksums(self.reader, CAPTION_FIELD)
        self._numbers = np.argsort(checksums, kind="stable")
        self._checksums = checksums[self._numbers]

    def __repr__(self) -> str:
        return self.path

    def __len__(self) -> int:
        return len(self.reader)

    def identity(self) -> dict[str, object]:
        """Return what identifies the encoder and how it was read, as plain values."""
        return self.manifest["encoder"]

    def features(self, texts: Sequence[str]) -> TextFeatures:
        """Return the embeddings of texts, padded to the longest text of the cache.

        Raises:
            ValueError: a text is not in the cache.
        """
        tokens = []
        pooled = []
        for text in texts:  # all fields of one text at once: its shard is open
            number = self._find(text)
            if self.manifest["tokens_channels"] is not None:
                tokens.append(self._array(TOKENS_FIELD, number))
            if self.manifest["pooled_channels"] is not None:
                pooled.append(self._array(POOLED_FIELD, number))
        padded, mask = self._pad(tokens) if tokens else (None, None)
        whole = torch.from_numpy(np.stack(pooled)).float() if pooled else None
        return TextFeatures(padded, mask, whole)

    def _array(self, field: str, number: np.ndarray) -> np.ndarray:
        """Return the array of a field of one sample."""
        (data,) = self.reader.contents(field, number)
        with errors_named(self.path):
            return npy_to_array(np.frombuffer(data, np.uint8))

    def _pad(self, arrays: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Return tokens of texts, (B, longest, D) float32, and their mask."""
        shape = (len(arrays), self.longest, self.manifest["tokens_channels"])
        tokens = np.zeros(shape, np.float32)
        for padded, array in zip(tokens, arrays):
            padded[: len(array)] = array
        lengths = torch.tensor([len(array) for array in arrays])
        return torch.from_numpy(tokens), torch.arange(self.longest) < lengths[:, None]

    def _find(self, text: str) -> np.ndarray:
        """Return the number of a text, (1,)."""
        data = text.encode()
        xxh3 = np.uint64(sample_checksum(data))
        first = np.searchsorted(self._checksums, xxh3, side="left")
        end = np.searchsorted(self._checksums, xxh3, side="right")
        numbers = self._numbers[first:end]  # more than one if captions have equal checksums
        for i, found in enumerate(self.reader.contents(CAPTION_FIELD, numbers)):
            if found == data:
                return numbers[i : i + 1]
        raise ValueError(
            f"{self.path}: has no embedding of {shorten(text)}; run `rectify encode --text` again "
            "on this set of images, into a new folder"
        )
