"""Named tensors as safetensors files with a checksum of their bits, which the format itself has not."""

from pathlib import Path

import xxhash
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import atomic, naming


def _bits(tensors: dict[str, Tensor]) -> str:
    found = xxhash.xxh3_128()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write tensors, and texts about them, atomically."""
    whole = {name: value.contiguous() for name, value in tensors.items()}
    with atomic(path) as file:
        file.write(save(whole, {**(about or {}), "xxh3": _bits(whole)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and texts that `write_tensors` wrote; a damaged file is a ValueError that names it."""
    with naming(path), safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if about.get("xxh3") != _bits(tensors):
            raise ValueError(f"{path}: its checksum does not fit its tensors; delete it and make it again")
    return tensors, about
