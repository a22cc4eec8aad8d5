"""Sets of webdataset shards: tars of fixed index ranges, each with offsets and checksums.

set/plan.json       what the set will be (kind, count, provenance), written before any shard
set/000000.tar      samples, readable by any webdataset
set/000000.npy      offsets, (samples, fields, 3): start, length and xxh3 of each member of the tar
set/000000.json     count, bytes, checksums: a shard without this record is not finished
set/manifest.json   the plan and the list of shards: a set without its manifest is not finished
"""

from data.shards.manifest import identify_shards, read_manifest
from data.shards.order import Order
from data.shards.read import ShardReader, npy_to_array
from data.shards.write import ShardWriter, array_to_npy

__all__ = [
    "Order",
    "ShardReader",
    "ShardWriter",
    "array_to_npy",
    "identify_shards",
    "npy_to_array",
    "read_manifest",
]
