"""Reading sets in O(1) by offset, through memory maps; a shard's checksum is verified when it is first opened."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data.files import file_digest, read_json
from data.shards.write import FORMAT, split_name


def read_manifest(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check the manifest of a finished set (of a certain kind).

    Raises:
        FileNotFoundError: no such folder, no manifest (an unfinished set), or a shard is missing.
        ValueError: another format or kind, or a shard whose size is not the recorded one.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not path.is_file():
        begun = (folder / "plan.json").exists()
        raise FileNotFoundError(
            f"{folder}: an unfinished set; run the command that makes it again"
            if begun
            else f"{folder}: no manifest.json there, so no set of shards; make one with `rectify pack`, `encode` or `collect`"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not a manifest of format {FORMAT}, which this version reads")
    if kind and manifest.get("kind") != kind:
        raise ValueError(f"{folder}: holds {manifest.get('kind')}, wanted {kind}")
    if not {"kind", "samples", "shards"} <= manifest.keys() or manifest["samples"] != sum(s["count"] for s in manifest["shards"]):
        raise ValueError(f"{path}: its entries do not add up; run the command that makes the set again")
    if not manifest["samples"]:
        raise ValueError(f"{folder}: an empty set")
    for shard in manifest["shards"]:
        tar = folder / shard["name"]
        if not tar.is_file():
            raise FileNotFoundError(f"{tar}: named in the manifest but missing; restore it or make the set again")
        if tar.stat().st_size != shard["bytes"]:
            raise ValueError(f"{tar}: {tar.stat().st_size} bytes, the manifest says {shard['bytes']} (truncated?)")
    return manifest


@lru_cache(maxsize=64)
def _header(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Parse an .npy header, once for all samples that share it."""
    import ast

    fields = ast.literal_eval(header.decode("latin1"))
    dtype = np.dtype(fields["descr"])
    if dtype.hasobject or fields["fortran_order"]:
        raise ValueError(f"an array of {dtype} (Fortran order: {fields['fortran_order']}) is not read from shards")
    return dtype, fields["shape"]


def decode_array(data: np.ndarray) -> np.ndarray:
    """Return the array in .npy bytes (uint8 view), without a copy."""
    raw = data[:10].tobytes()
    if raw[:6] != b"\x93NUMPY" or raw[6] != 1:
        raise ValueError("not an .npy array of version 1")
    start = 10 + int.from_bytes(raw[8:10], "little")
    dtype, shape = _header(data[10:start].tobytes())
    return data[start:].view(dtype).reshape(shape)


class ShardReader:
    """Random access to a finished set: `len(reader)`, `reader[i] -> {"__key__": name, field: uint8 view}`.

    Args:
        folder: the set.
        kind: refuse a set of another kind.
    """

    def __init__(self, folder: str | Path, kind: str | None = None):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, kind)
        self.ends = np.cumsum([shard["count"] for shard in self.manifest["shards"]])
        self._maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.folder}: index {i} outside [0, {len(self)})")
        number = int(np.searchsorted(self.ends, i, side="right"))
        shard = self.manifest["shards"][number]
        data, offsets = self._maps.get(number) or self._open(number)
        spans = offsets[i - int(self.ends[number]) + shard["count"]]
        header = max(int(start) for start, _ in spans) - 512  # of any field that is there: the name stands first
        name = data[header:][:100].tobytes().split(b"\0")[0].decode()
        sample: dict[str, Any] = {"__key__": (split_name(name) or (name, ""))[0]}
        sample.update({f: data[a : a + n] for f, (a, n) in zip(shard["fields"], spans) if a >= 0})
        return sample

    def _open(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        shard = self.manifest["shards"][number]
        tar = self.folder / shard["name"]
        if file_digest(tar) != shard["sha256"]:
            raise ValueError(f"{tar}: its sha256 is not the manifest's; restore it or make the set again")
        try:
            offsets = np.load(tar.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        except (EOFError, ValueError) as error:
            raise ValueError(f"{tar.with_suffix('.npy')}: no readable offsets ({error}); make the set again") from None
        if offsets.shape != (shard["count"], len(shard["fields"]), 2):
            raise ValueError(f"{tar.with_suffix('.npy')}: offsets of shape {offsets.shape} do not fit the manifest")
        self._maps[number] = np.memmap(tar, np.uint8, "r"), offsets
        return self._maps[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # workers map the files themselves
