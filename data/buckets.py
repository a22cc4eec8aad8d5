"""Buckets: a set of images of several sizes. Consecutive samples of one size are a bucket."""

from typing import Any, NamedTuple

import numpy as np

from data.schema import COUNT, check_schema

SIDE = range(1, COUNT.stop)
SCHEMA = {"buckets": [{"width": SIDE, "height": SIDE, "count": COUNT}]}


class Bucket(NamedTuple):
    """The samples of one size. Indices are those of a `ShardReader`: skipped images have none."""

    width: int  # of the images, in pixels
    height: int
    start: int  # index of its first sample
    counts: np.ndarray  # samples in each of its shards

    @property
    def total(self) -> int:
        """Number of samples."""
        return int(self.counts.sum())

    @property
    def name(self) -> str:
        """Width and height, such as 64x96."""
        return f"{self.width}x{self.height}"


def read_buckets(manifest: dict[str, Any], path: str) -> list[Bucket]:
    """Return the buckets of a set, without empty ones; none if its images have one size.

    Args:
        manifest: of the set. Entry `buckets` lists the sizes; entry `group` of each shard is the
            number of its bucket.
        path: of the manifest, for errors.
    """
    if "buckets" not in manifest:
        return []
    check_schema(manifest, SCHEMA, path)
    sizes = manifest["buckets"]
    check_schema(manifest, {"shards": [{"group": range(len(sizes))}]}, path)
    groups = np.array([shard["group"] for shard in manifest["shards"]])
    counts = np.array([shard["count"] for shard in manifest["shards"]])
    if (np.diff(groups) < 0).any():
        raise ValueError(f"{path}: the shards are not in the order of their buckets")
    buckets = []
    start = 0
    for number, size in enumerate(sizes):
        of_shards = counts[groups == number]
        if of_shards.sum():
            buckets.append(Bucket(size["width"], size["height"], start, of_shards))
        start += int(of_shards.sum())
    return buckets
