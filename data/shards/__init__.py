"""Sets of webdataset shards: tars of fixed index ranges, each with offsets and a checksum, and a manifest last.

set/plan.json       what the set is to be (kind, count, provenance), written first
set/000000.tar      samples, readable by any webdataset
set/000000.npy      their offsets, (samples, fields, 2): start and length of each field in the tar
set/000000.json     count, bytes, sha256: a shard without this one is not finished
set/manifest.json   the plan and the list of shards: a set without this one is not finished
"""

from data.shards.manifest import read_manifest
from data.shards.order import Order, order
from data.shards.read import ShardReader, decode_array
from data.shards.write import ShardWriter, encode_array

__all__ = ["Order", "ShardReader", "ShardWriter", "decode_array", "encode_array", "order", "read_manifest"]
