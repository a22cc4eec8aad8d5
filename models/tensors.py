"""Named tensors as safetensors files with a checksum of their bits, which the format itself has not; nested ones."""

from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def _bits(tensors: dict[str, Tensor]) -> str:
    found = xxhash.xxh3_128()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def packed(tensors: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """Return the bytes of a file of tensors and of texts about them."""
    whole = {name: value.contiguous() for name, value in tensors.items()}
    return save(whole, {**about, "xxh3": _bits(whole)})


def unpacked(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and texts in a file; a damaged one is a ValueError that names it."""
    try:
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable file of tensors ({error})") from None
    if about.get("xxh3") != _bits(tensors):
        raise ValueError(f"{path}: its checksum does not fit its tensors; delete it and make it again")
    return tensors, about


def save_nested(value: Any, file: BinaryIO) -> None:
    """Write a nested value as torch.save does, but let the operating system's error through, a full disk say."""
    try:
        torch.save(value, file)
    except RuntimeError as error:  # raised by torch's writer when it is closed in the middle
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
