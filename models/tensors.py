"""Tensors: their checksums, their files (safetensors with a checksum), and nested values."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def tensor_digest(tensors: dict[str, Tensor], header: str = "") -> str:
    """Return the sha256 of a text and of the names and bits of tensors, which identifies them."""
    sha256 = hashlib.sha256(header.encode())
    for name, value in sorted(tensors.items()):
        sha256.update(name.encode())
        sha256.update(_bytes(value))
    return sha256.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Return the xxh3 of the names, types, shapes and bits of tensors, which shows damage."""
    xxh3 = xxhash.xxh3_128()
    for name, value in sorted(tensors.items()):
        xxh3.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        xxh3.update(_bytes(value))
    return xxh3.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy if it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def to_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return the bytes of a safetensors file with a checksum in its metadata."""
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    return save(contiguous, {**metadata, "xxh3": _checksum(contiguous)})


def sort_metadata(data: bytes) -> bytes:
    """Return the bytes of a safetensors file with its metadata in order: equal ones are the same.

    The library writes them in another order in every process.
    """
    start = 8  # the length of the header comes first
    end = start + int.from_bytes(data[:start], "little")
    header = json.loads(data[start:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return data[:start] + text.ljust(end - start) + data[end:]


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    if "xxh3" not in metadata:
        raise ValueError(f"{path}: not a safetensors file of rectify (its metadata lack xxh3)")
    if metadata["xxh3"] != _checksum(tensors):
        raise ValueError(
            f"{path}: its checksum does not match its tensors; delete it and write it again"
        )
    return tensors, metadata


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a file.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from None


def save_nested(value: Any, file: BinaryIO) -> None:
    """Write a nested value as torch.save does, but raise the operating system's own error.

    For example the error of a full disk, which torch's writer hides.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:  # raised by torch's writer when it is closed halfway
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
