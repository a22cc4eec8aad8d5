"""Sharded checkpoints: a folder of safetensors, of which every rank wrote its part, and `rest.pt` for all that is no tensor.

The bytes are written and read by torch.distributed.checkpoint, so that any number of ranks, or one process, can read them.
"""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, empty

REST, SUMS = "rest.pt", "sums.json"


def split(tree: Any, place: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Return a nested value with a plain description in each tensor's place, and the tensors by their places."""
    if isinstance(tree, Tensor):
        kind = {"shape": list(tree.shape), "dtype": str(tree.dtype).removeprefix("torch."), "sharded": isinstance(tree, DTensor)}
        return {"tensor": place, **kind}, {place: tree.detach()}
    tensors: dict[str, Tensor] = {}
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    rest = {}
    for key, value in parts:
        rest[key], found = split(value, f"{place}/{key}" if place else str(key))
        tensors |= found
    return rest if isinstance(tree, dict) else list(rest.values()) if isinstance(tree, list | tuple) else tree, tensors


def join(rest: Any, mesh: DeviceMesh | None) -> tuple[Any, dict[str, Tensor]]:
    """Return what `split` was given, with tensors still to be filled, and these by their places."""
    if isinstance(rest, dict) and "tensor" in rest:
        dtype = getattr(torch, rest["dtype"])
        if mesh is not None and rest["sharded"]:
            tensor: Tensor = empty(rest["shape"], dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
        else:
            tensor = torch.empty(rest["shape"], dtype=dtype)
        return tensor, {rest["tensor"]: tensor}
    tensors: dict[str, Tensor] = {}
    parts = rest.items() if isinstance(rest, dict) else enumerate(rest) if isinstance(rest, list) else ()
    tree = {}
    for key, value in parts:
        tree[key], found = join(value, mesh)
        tensors |= found
    return tree if isinstance(rest, dict) else list(tree.values()) if isinstance(rest, list) else rest, tensors


def checksum(path: Path) -> str:
    """Return the xxh3 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def read_rest(folder: Path) -> dict[str, Any]:
    """Read what is no tensor, without running code from it."""
    return torch.load(folder / REST, map_location="cpu", weights_only=True)


def read(folder: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Read a whole checkpoint; with a mesh of ranks, each reads its own part of the sharded tensors.

    Raises:
        ValueError: a file is missing, torn or changed, or the parts do not make the whole.
    """
    try:
        agree(folder, mesh)
        checkpoint, tensors = join(read_rest(folder), mesh)
        with warnings.catch_warnings(action="ignore"):  # that one process reads alone
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=mesh is None)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{folder}: not a readable checkpoint ({(str(error) or repr(error)).splitlines()[0]})") from error
    return checkpoint


def agree(folder: Path, mesh: DeviceMesh | None) -> None:
    """Compare all files with their checksums; ranks share the work, and all raise if one finds a difference."""
    recorded = json.loads((folder / SUMS).read_text())
    rank, world = (mesh.get_rank(), mesh.size()) if mesh else (0, 1)
    there = {path.name for path in (*folder.glob("*.safetensors"), folder / REST)}
    bad = sorted(there - recorded.keys())
    for name in sorted(recorded)[rank::world]:
        path = folder / Path(name).name
        if not path.is_file() or checksum(path) != recorded[name]:
            bad.append(name)
    if mesh:
        found: list[list[str]] = [[]] * world
        dist.all_gather_object(found, bad, mesh.get_group())
        bad = sum(found, [])
    if bad:
        raise ValueError(f"{', '.join(bad)}: missing, torn or changed")
