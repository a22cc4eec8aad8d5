"""Manifests of sets and records of shards: checksummed JSON that is checked when it is read."""

from pathlib import Path
from typing import Any

from data.cache import Cache, parse_scheme
from data.files import check_folder, parse_checksummed_json, read_json
from data.schema import COUNT, NAME, SHA256, XXH3, check_schema

FORMAT = 3  # of manifests and plans; pair sets identify interpolants by description since 3
RECORD_SCHEMA = {
    "count": COUNT,
    "bytes": COUNT,
    "sha256": SHA256,
    "xxh3": XXH3,
    "offsets": XXH3,
    "fields": [str],
}
MANIFEST_SCHEMA = {
    "format": int,
    "kind": str,
    "samples": COUNT,
    "shards": [{"name": NAME, **RECORD_SCHEMA}],
}


def read_record(path: Path) -> dict[str, Any] | None:
    """Return a shard's record, or None if it is missing or damaged.

    The shard must then be made again.
    """
    try:
        record = read_json(path)
        check_schema(record, RECORD_SCHEMA, str(path))
    except (FileNotFoundError, ValueError):
        return None
    return record


def identify_shards(manifest: dict[str, Any]) -> list[Any]:
    """Return the checksums of a set's shards, and the options that they were indexed with."""
    identity = []
    for shard in manifest["shards"]:
        identity.append(shard["sha256"])
        if "options" in shard:  # of `rectify index`
            identity.append(shard["options"])
    return identity


def read_manifest(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """Read and check the manifest of a finished set.

    Args:
        folder: the set, or its URL.
        kind: required kind of its samples.

    Raises:
        OSError: the folder, the manifest (of an unfinished set) or a shard is missing, or a URL
            cannot be read.
        ValueError: the format or kind is another one, an entry is damaged, the entries contradict
            each other, or a shard has another size.
    """
    path = f"{folder}/manifest.json"
    remote = bool(parse_scheme(str(folder)))
    if remote:
        manifest = parse_checksummed_json(Cache().read(path), path)
    else:
        manifest = _read_local_manifest(Path(folder))
    _check_manifest(manifest, path)
    if kind and manifest["kind"] != kind:
        raise ValueError(f"{folder}: holds {manifest['kind']}, but {kind} are needed")
    if not manifest["samples"]:
        raise ValueError(f"{folder}: the set is empty")
    if not remote:  # a remote shard is checked when it is downloaded
        _check_sizes(Path(folder), manifest)
    return manifest


def _read_local_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if path.is_file():
        return read_json(path)
    check_folder(folder)
    if (folder / "plan.json").exists():
        raise FileNotFoundError(f"{folder}: an unfinished set; run the command that makes it again")
    sets = [str(found.parent) for found in sorted(folder.glob("*/manifest.json"))]
    if sets:
        raise FileNotFoundError(
            f"{folder}: holds several sets; give one of them: {', '.join(sets)}"
        )
    raise FileNotFoundError(
        f"{folder}: no manifest.json, so this is no set of shards; "
        "make one with `rectify pack`, `encode`, `collect` or, of tars, `index`"
    )


def _check_manifest(manifest: dict[str, Any], path: str) -> None:
    """Check the format of a manifest, and that its entries are valid and consistent."""
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path}: the set has format {manifest.get('format')}, this version reads format "
            f"{FORMAT}; make the set again with the command that wrote it "
            "(in a new folder, except `rectify index`)"
        )
    check_schema(manifest, MANIFEST_SCHEMA, path)
    shards = manifest["shards"]
    names = {shard["name"] for shard in shards}
    samples = sum(shard["count"] for shard in shards)
    if manifest["samples"] != samples or len(names) < len(shards):
        raise ValueError(
            f"{path}: its entries contradict each other (number of samples, or names of shards); "
            "run the command that makes the set again"
        )


def _check_sizes(folder: Path, manifest: dict[str, Any]) -> None:
    """Check that every shard exists with the size in the manifest."""
    for shard in manifest["shards"]:
        tar = folder / shard["name"]
        if not tar.is_file():
            raise FileNotFoundError(
                f"{tar}: listed in the manifest but missing; restore it or make the set again"
            )
        size = tar.stat().st_size
        if size != shard["bytes"]:
            raise ValueError(
                f"{tar}: has {size} bytes, but {shard['bytes']} in the manifest (truncated?); "
                "restore it or make the set again"
            )
