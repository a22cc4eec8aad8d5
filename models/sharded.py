"""Sharded checkpoints: a folder of safetensors, one or more from each rank, and `rest.pt`.

`rest.pt` holds everything that is not a tensor. The tensors are written and read by
torch.distributed.checkpoint, so that any number of ranks, or one process, can read them.
"""

import json
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, empty

from data.files import file_checksum

REST = "rest.pt"
CHECKSUMS = "sums.json"


def split(tree: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split a nested value into plain values and tensors: the inverse of `join`.

    Args:
        tree: dicts and lists of tensors and plain values.
        path: of this value in the whole.

    Returns:
        The value with a plain description instead of each tensor, and the tensors by their paths.
    """
    if isinstance(tree, Tensor):
        description = {
            "tensor": path,
            "shape": list(tree.shape),
            "dtype": str(tree.dtype).removeprefix("torch."),
            "sharded": isinstance(tree, DTensor),
        }
        return description, {path: tree.detach()}
    tensors: dict[str, Tensor] = {}
    rest = {}
    for key, value in _items(tree):
        rest[key], found = split(value, f"{path}/{key}" if path else str(key))
        tensors |= found
    return _like(tree, rest), tensors


def join(rest: Any, mesh: DeviceMesh | None) -> tuple[Any, dict[str, Tensor]]:
    """Return the nested value that was `split`, with empty tensors, and these by their paths.

    Args:
        rest: the plain part of `split`.
        mesh: with a mesh of ranks, sharded tensors are sharded over it.
    """
    if isinstance(rest, dict) and "tensor" in rest:
        tensor = _empty(rest, mesh)
        return tensor, {rest["tensor"]: tensor}
    tensors: dict[str, Tensor] = {}
    tree = {}
    for key, value in _items(rest):
        tree[key], found = join(value, mesh)
        tensors |= found
    return _like(rest, tree), tensors


def _items(tree: Any) -> Iterable[tuple[Any, Any]]:
    """Return the (key, value) parts of a dict or sequence; a plain value has none."""
    if isinstance(tree, dict):
        return tree.items()
    return enumerate(tree) if isinstance(tree, list | tuple) else ()


def _like(tree: Any, parts: dict[Any, Any]) -> Any:
    """Return the parts as a dict or list, as `tree` is one; a plain value is returned itself."""
    if isinstance(tree, dict):
        return parts
    return list(parts.values()) if isinstance(tree, list | tuple) else tree


def _empty(description: dict[str, Any], mesh: DeviceMesh | None) -> Tensor:
    """Return an empty tensor of a description made by `split`."""
    shape = description["shape"]
    dtype = getattr(torch, description["dtype"])
    if mesh is not None and description["sharded"]:
        return empty(shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
    return torch.empty(shape, dtype=dtype)


def read_rest(folder: Path) -> dict[str, Any]:
    """Read everything that is not a tensor, without running code from it."""
    return torch.load(folder / REST, map_location="cpu", weights_only=True)


def read(
    folder: Path, mesh: DeviceMesh | None = None, skipped: Collection[str] = ()
) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        folder: the checkpoint.
        mesh: with a mesh of ranks, each reads its own part of the sharded tensors.
        skipped: entries that are left out.

    Raises:
        ValueError: a file is missing or damaged, or the files do not make a whole checkpoint.
    """
    try:
        check_files(folder, mesh)
        rest = {key: value for key, value in read_rest(folder).items() if key not in skipped}
        checkpoint, tensors = join(rest, mesh)
        with warnings.catch_warnings(action="ignore"):  # about reading with one process
            reader = HuggingFaceStorageReader(str(folder))
            dcp.load(tensors, storage_reader=reader, no_dist=mesh is None)
    except (Exception, CheckpointException) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{folder}: not a readable checkpoint ({reason})") from error
    return checkpoint


def check_files(folder: Path, mesh: DeviceMesh | None) -> None:
    """Compare all files with their checksums.

    Ranks share the work, and all of them raise if one finds a difference.
    """
    recorded = json.loads((folder / CHECKSUMS).read_text())
    rank = mesh.get_rank() if mesh else 0
    world = mesh.size() if mesh else 1
    # Every rank looks for unrecorded files, and compares its share of the recorded ones.
    present = {path.name for path in (*folder.glob("*.safetensors"), folder / REST)}
    bad = sorted(present - recorded.keys())
    for name in sorted(recorded)[rank::world]:
        path = folder / Path(name).name
        if not path.is_file() or file_checksum(path) != recorded[name]:
            bad.append(name)
    # All ranks learn what any of them found.
    if mesh:
        found: list[list[str]] = [[]] * world
        dist.all_gather_object(found, bad, mesh.get_group())
        bad = sum(found, [])
    if bad:
        raise ValueError(f"{', '.join(bad)}: missing or damaged")
