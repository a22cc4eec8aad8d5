"""What a set says of itself, and whether it can be believed: sealed JSON of a known form, naming only files beside it."""

from pathlib import Path
from typing import Any

from data.cache import Cache, scheme
from data.files import parse_sealed, read_json
from data.form import COUNT, NAME, SHA256, XXH3, conform

FORMAT = 2
RECORD = {"count": COUNT, "bytes": COUNT, "sha256": SHA256, "xxh3": XXH3, "offsets": XXH3, "fields": [str]}
MANIFEST = {"format": int, "kind": str, "samples": COUNT, "shards": [{"name": NAME, **RECORD}]}


def read_record(path: Path) -> dict[str, Any] | None:
    """Return a shard's record, or None where there is none that is whole: the shard is then to be made again."""
    try:
        record = read_json(path)
        conform(record, RECORD, str(path))
    except (FileNotFoundError, ValueError):
        return None
    return record


def read_manifest(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check the manifest of a finished set (of a certain kind), in a folder or at a URL.

    Raises:
        OSError: no such folder, no manifest (an unfinished set), or a shard is missing; a URL cannot be read.
        ValueError: another format or kind, entries that are damaged or do not add up, or a shard of another size.
    """
    remote, path = bool(scheme(str(folder))), f"{folder}/manifest.json"
    manifest = parse_sealed(Cache().read(path), path) if remote else _local_manifest(Path(folder))
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not a manifest of format {FORMAT}, which this version reads")
    conform(manifest, MANIFEST, path)
    if kind and manifest["kind"] != kind:
        raise ValueError(f"{folder}: holds {manifest['kind']}, wanted {kind}")
    names = {shard["name"] for shard in manifest["shards"]}
    if manifest["samples"] != sum(s["count"] for s in manifest["shards"]) or len(names) < len(manifest["shards"]):
        raise ValueError(f"{path}: its entries do not add up; run the command that makes the set again")
    if not manifest["samples"]:
        raise ValueError(f"{folder}: an empty set")
    for shard in () if remote else manifest["shards"]:  # a remote one is compared when it is fetched
        tar = Path(folder) / shard["name"]
        if not tar.is_file():
            raise FileNotFoundError(f"{tar}: named in the manifest but missing; restore it or make the set again")
        if tar.stat().st_size != shard["bytes"]:
            raise ValueError(f"{tar}: {tar.stat().st_size} bytes, the manifest says {shard['bytes']} (truncated?)")
    return manifest


def _local_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / "manifest.json").is_file():
        begun = (folder / "plan.json").exists()
        raise FileNotFoundError(
            f"{folder}: an unfinished set; run the command that makes it again"
            if begun
            else f"{folder}: no manifest.json there, so no set of shards; make one with `rectify pack`, `encode` or `collect`"
        )
    return read_json(folder / "manifest.json")
