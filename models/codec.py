"""Codecs: image <-> latent. Images are float32 in [-1, 1], shape (B, C, H, W)."""

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

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
    """A diffusers AutoencoderKL folder; latents are posterior means less its `shift_factor`, times its `scaling_factor`.

    Args:
        path: the folder (config.json and safetensors weights).
    """

    def __init__(self, path: str):
        super().__init__()
        from diffusers import AutoencoderKL

        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"{path}: no config.json there; a codec is a diffusers AutoencoderKL folder")
        self.path = path
        _compare(Path(path))
        try:
            self.vae = AutoencoderKL.from_pretrained(path, use_safetensors=True).eval().requires_grad_(False)
        except Exception as error:  # diffusers, safetensors and torch each raise kinds of their own on a damaged folder
            why = str(error).strip() or type(error).__name__
            raise ValueError(f"{path}: not a readable diffusers AutoencoderKL ({why})") from error

    @property
    def scale(self) -> float:
        """What latents are multiplied by to have unit variance (diffusers' scaling_factor)."""
        return self.vae.config.scaling_factor

    @property
    def shift(self) -> float:
        """What latents have before as their mean, where it is not zero (diffusers' shift_factor, of Stable Diffusion 3)."""
        return self.vae.config.shift_factor or 0.0

    def encode(self, images: Tensor) -> Tensor:
        return (self.vae.encode(images).latent_dist.mode() - self.shift) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        return self.vae.decode(x / self.scale + self.shift).sample

    def weights(self) -> str:
        """Return the sha256 of the weights' bits, whatever file they came from."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vae.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the diffusers folder, weights as safetensors."""
        save(self.vae, path)


def save(vae: "AutoencoderKL", path: Path) -> None:
    """Write an autoencoder as a diffusers folder, with the checksums of its files beside them."""
    try:
        vae.save_pretrained(path)
    except SafetensorError as error:  # safetensors hides the operating system's error, a full disk say
        raise OSError(f"{path}: {error}") from error
    sums = {file.name: _sha256(file) for file in sorted(path.iterdir()) if file.name != CHECKSUMS}
    (path / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n")


def _compare(path: Path) -> None:
    """Compare a folder's files with its checksums; folders that others made have none."""
    if not (path / CHECKSUMS).exists():
        return
    try:
        sums = dict(json.loads((path / CHECKSUMS).read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path / CHECKSUMS}: not valid JSON ({error}); restore it or make the codec again") from None
    for name, wanted in sums.items():
        if not (path / Path(name).name).is_file() or _sha256(path / Path(name).name) != wanted:
            raise ValueError(f"{path / name}: its checksum is not the one in {CHECKSUMS}; restore it or make the codec again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(path: str | Path | None) -> Codec:
    """Load a codec: None is Identity; a folder is a diffusers AutoencoderKL or a run that holds one as `codec/`."""
    if path is None:
        return Identity()
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such codec folder; train one with `rectify fit` or give a diffusers AutoencoderKL")
    return KL(str(path / "codec" if (path / "codec").is_dir() else path))


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to uint8 in [0, 255], same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
