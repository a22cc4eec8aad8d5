"""Codecs: image <-> latent. Images are float32 in [-1, 1], shape (B, C, H, W)."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from data.files import file_digest
from models.tensors import tensor_digest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL  # importing it takes a second

CHECKSUMS = "checksums.json"  # in a codec folder that we wrote: the sha256 of its other files


class Codec(nn.Module, ABC):
    """A frozen pair of maps between images and the x that a denoiser learns."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Return x of images (B, C, H, W) in [-1, 1]."""

    @abstractmethod
    def decode(self, x: Tensor) -> Tensor:
        """Return images, not clamped, of x."""


class Identity(Codec):
    """Pixels are the data."""

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x: Tensor) -> Tensor:
        return x


class KL(Codec):
    """A diffusers AutoencoderKL folder.

    Latents are (posterior mean - `shift_factor`) * `scaling_factor`.

    Args:
        path: the folder (config.json and safetensors weights).
    """

    def __init__(self, path: str):
        super().__init__()
        from diffusers import AutoencoderKL

        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(
                f"{path}: it has no config.json; a codec is a diffusers AutoencoderKL folder"
            )
        self.path = path
        _check_files(Path(path))
        try:
            vae = AutoencoderKL.from_pretrained(path, use_safetensors=True)
        except Exception as error:  # diffusers, safetensors and torch raise different kinds
            reason = str(error).strip() or type(error).__name__
            raise ValueError(
                f"{path}: not a readable diffusers AutoencoderKL ({reason})"
            ) from error
        self.vae = vae.eval().requires_grad_(False)

    @property
    def scale(self) -> float:
        """Factor that gives latents unit variance (diffusers' scaling_factor)."""
        return self.vae.config.scaling_factor

    @property
    def shift(self) -> float:
        """Mean of the raw latents, subtracted before scaling (diffusers' shift_factor)."""
        return self.vae.config.shift_factor or 0.0

    def encode(self, images: Tensor) -> Tensor:
        return (self.vae.encode(images).latent_dist.mode() - self.shift) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        return self.vae.decode(x / self.scale + self.shift).sample

    def weights(self) -> str:
        """Return the sha256 of the weights' bits, independent of the file that they came from."""
        return tensor_digest(self.vae.state_dict())

    def save(self, path: Path) -> None:
        """Write the diffusers folder, weights as safetensors."""
        save_codec(self.vae, path)


def save_codec(vae: "AutoencoderKL", path: Path) -> None:
    """Write an autoencoder as a diffusers folder, with the checksums of its files."""
    try:
        vae.save_pretrained(path)
    except SafetensorError as error:  # it hides the operating system's error, e.g. a full disk
        raise OSError(f"{path}: {error}") from error
    sums = {}
    for file in sorted(path.iterdir()):
        if file.name != CHECKSUMS:
            sums[file.name] = file_digest(file)
    (path / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")


def _check_files(path: Path) -> None:
    """Compare a folder's files with its checksums; folders written by other programs have none."""
    if not (path / CHECKSUMS).exists():
        return
    try:
        sums = dict(json.loads((path / CHECKSUMS).read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path / CHECKSUMS}: not valid JSON ({error}); restore it or make the codec again"
        ) from None
    for name, expected in sums.items():
        file = path / Path(name).name
        if not file.is_file() or file_digest(file) != expected:
            raise ValueError(
                f"{path / name}: its checksum is not the one in {CHECKSUMS}; "
                "restore it or make the codec again"
            )


def load_codec(path: str | Path | None) -> Codec:
    """Load a codec.

    Args:
        path: a diffusers AutoencoderKL folder, or a run that contains one as `codec/`; None is
            Identity.
    """
    if path is None:
        return Identity()
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such codec folder; train one with `rectify fit` or use a diffusers "
            "AutoencoderKL"
        )
    nested = path / "codec"
    return KL(str(nested if nested.is_dir() else path))


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to uint8 in [0, 255], same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
