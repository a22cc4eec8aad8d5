"""Codecs: image <-> latent. Images are float32 in [-1, 1], shape (B, C, H, W)."""

import json
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from data.files import check_folder, file_digest
from models.diffusers.parts import load_part, read_config
from models.tensors import tensor_digest

CHECKSUMS = "checksums.json"  # in a codec folder that we wrote: the sha256 of its other files

# Keys of a codec's config that diffusers writes, or we do, and its class may not read.
EXTRA_KEYS = ("latents_mean", "latents_std", "block_out_channels")
# Entries of a manifest that identify the codec of latents: its weights and statistics.
CODEC_ENTRIES = ("codec", "scale", "shift", "channel_mean", "channel_std")


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


class LatentCodec(Codec, ABC):
    """The folder of an autoencoder of diffusers, one subclass per architecture.

    Latents are (raw - `shift_factor` - `latents_mean`) / `latents_std` * `scaling_factor`, where
    raw is what the encoder returns. Mean and standard deviation are of each channel, and most
    folders have none.

    Args:
        path: the folder (config.json and safetensors weights).

    Attributes:
        architecture: name of diffusers' class.
        levels: key of the config that has one entry for each resolution of the encoder.
    """

    architecture: ClassVar[str]
    levels: ClassVar[str]

    def __init__(self, path: str):
        super().__init__()
        import diffusers

        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(
                f"{path}: it has no config.json; a codec is the folder of a diffusers "
                "autoencoder, for example vae/ of a pipeline"
            )
        self.path = path
        _check_files(Path(path))
        vae = load_part(getattr(diffusers, self.architecture), Path(path), EXTRA_KEYS)
        self.vae = vae.eval().requires_grad_(False)
        _check_statistics(vae.config, f"{path}/config.json")

    @abstractmethod
    def encode_raw(self, images: Tensor) -> Tensor:
        """Return what the encoder makes of images (B, C, H, W), without scale and statistics."""

    def encode(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self.center(self.encode_raw(images)) * self.scale

    def decode(self, x: Tensor) -> Tensor:
        latents = x / self.scale
        if self.vae.config.get("latents_std") is not None:
            latents = latents * self._per_channel("latents_std", x)
            latents = latents + self._per_channel("latents_mean", x)
        return self.vae.decode(latents + self.shift).sample

    @property
    def scale(self) -> float:
        """Factor that gives latents unit variance (diffusers' scaling_factor)."""
        return self.vae.config.scaling_factor

    @property
    def shift(self) -> float:
        """Mean of the raw latents, subtracted before scaling (diffusers' shift_factor)."""
        return self.vae.config.get("shift_factor") or 0.0

    @property
    def factor(self) -> int:
        """Pixels in a row of an image to one number in a row of its latent."""
        return 2 ** (len(self.vae.config[self.levels]) - 1)

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.vae.config.latent_channels

    def center(self, latents: Tensor) -> Tensor:
        """Return raw latents (B, C, H, W) with everything but the scale applied."""
        latents = latents - self.shift
        if self.vae.config.get("latents_std") is None:
            return latents
        centered = latents - self._per_channel("latents_mean", latents)
        return centered / self._per_channel("latents_std", latents)

    def _per_channel(self, key: str, like: Tensor) -> Tensor:
        return like.new_tensor(self.vae.config[key]).view(1, -1, 1, 1)

    def check_images(self, images: Tensor) -> None:
        """Check that images (B, C, H, W) have the channels and a size that the codec encodes.

        Raises:
            ValueError: they have not.
        """
        channels, height, width = images.shape[1:]
        expected = self.vae.config.in_channels
        if channels != expected:
            raise ValueError(
                f"{self.path}: takes images of {expected} channels, these have {channels}; pack "
                "them with or without --grey, or use another codec"
            )
        self.check_size(height, width)

    def check_size(self, height: int, width: int) -> None:
        """Check that the codec encodes images of a size.

        Raises:
            ValueError: a side is no multiple of its factor.
        """
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"{self.path}: takes images whose sides are multiples of {self.factor} pixels, "
                f"these are {width} x {height}; pack them with another --size or --buckets"
            )

    def set_scale(self, scale: float) -> None:
        """Set the factor that gives latents unit variance."""
        self.vae.register_to_config(scaling_factor=scale)

    def set_channels(self, mean: list[float], std: list[float]) -> None:
        """Set the mean and standard deviation of each channel; they replace scale and shift.

        Args:
            mean: of the raw latents, one number for each channel.
            std: of the raw latents.
        """
        statistics = {"latents_mean": mean, "latents_std": std, "scaling_factor": 1.0}
        if self.shift:
            statistics["shift_factor"] = 0.0
        self.vae.register_to_config(**statistics)

    def identity(self) -> dict[str, Any]:
        """Return what identifies a codec, as manifests record it: its weights and statistics.

        Statistics that change nothing are left out.
        """
        identity: dict[str, Any] = {"codec": self.weights(), "scale": self.scale}
        return identity | self.record_shift()

    def record_shift(self) -> dict[str, Any]:
        """Return the statistics beside the scale, without those that change nothing."""
        record: dict[str, Any] = {}
        if self.shift:
            record["shift"] = self.shift
        if self.vae.config.get("latents_std") is not None:
            record["channel_mean"] = list(self.vae.config.latents_mean)
            record["channel_std"] = list(self.vae.config.latents_std)
        return record

    def weights(self) -> str:
        """Return the sha256 of the weights' bits, independent of the file that they came from."""
        return tensor_digest(self.vae.state_dict())

    def save(self, path: Path) -> None:
        """Write the diffusers folder, weights as safetensors."""
        save_codec(self.vae, path)


class KL(LatentCodec):
    """A diffusers AutoencoderKL; raw latents are means of the posterior.

    Latent Diffusion, Rombach et al. 2021 (arXiv 2112.10752).

    Args:
        path: the folder (config.json and safetensors weights).
    """

    architecture = "AutoencoderKL"
    levels = "block_out_channels"

    def encode_raw(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latent_dist.mode()


class DC(LatentCodec):
    """A diffusers AutoencoderDC, whose latents are 32 or more times smaller than the images.

    Deep Compression Autoencoder, Chen et al. 2024 (arXiv 2410.10733).

    Args:
        path: the folder (config.json and safetensors weights).
    """

    architecture = "AutoencoderDC"
    levels = "encoder_block_out_channels"

    def encode_raw(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latent


class Tiny(LatentCodec):
    """A diffusers AutoencoderTiny (TAESD), distilled from a larger autoencoder.

    Its `latent_magnitude` and `latent_shift` serve to store latents in 8 bits; neither encoding
    nor decoding applies them.

    Args:
        path: the folder (config.json and safetensors weights).
    """

    architecture = "AutoencoderTiny"
    levels = "num_encoder_blocks"

    def encode_raw(self, images: Tensor) -> Tensor:
        return self.vae.encode(images).latents


# Codecs by the `_class_name` in their config.json.
LATENT_CODECS: dict[str, type[LatentCodec]] = {
    codec.architecture: codec for codec in (KL, DC, Tiny)
}


def describe_codec(codec: Codec) -> dict[str, Any]:
    """Return what identifies a codec (`LatentCodec.identity`); {} for pixels."""
    return codec.identity() if isinstance(codec, LatentCodec) else {}


def find_codec_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return how one codec differs from another, "" if they are the same.

    Args:
        before: its weights and statistics (`describe_codec`).
        now: those of the other codec.
    """
    for key in CODEC_ENTRIES:
        if key == "scale" and "codec" in before and key not in before:
            continue  # latents that record only the weights
        if not _are_close(before.get(key), now.get(key)):
            values = [f"{value!s:.40}" for value in (now.get(key), before.get(key))]
            return f"its {key} is {values[0]} instead of {values[1]}"
    return ""


def _are_close(before: Any, now: Any) -> bool:
    """Whether two values are equal, numbers up to rounding."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return all(_are_close(left, right) for left, right in zip(before, now))
    if isinstance(before, float | int) and isinstance(now, float | int):
        return math.isclose(before, now, rel_tol=1e-6)
    return before == now


def _check_statistics(config: Any, name: str) -> None:
    """Check the statistics of latents in an autoencoder's config.

    Raises:
        ValueError: they are not finite, or mean and deviation are not of every channel.
    """
    for key, least in {"scaling_factor": 0.0, "shift_factor": -math.inf}.items():
        value = config.get(key)
        if value is None and key == "shift_factor":
            continue
        if not isinstance(value, int | float) or not least < value < math.inf:
            wanted = "finite" if least else "positive, finite"
            raise ValueError(f"{name}: {key} is {value}; it must be a {wanted} number")
    mean = config.get("latents_mean")
    deviation = config.get("latents_std")
    if mean is None and deviation is None:
        return
    for key, values in {"latents_mean": mean, "latents_std": deviation}.items():
        count = config["latent_channels"]
        if not isinstance(values, list | tuple) or len(values) != count:
            raise ValueError(f"{name}: {key} is {values}; it must be a list of {count} numbers")
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name}: {key} is {values}; its numbers must be finite")
    if min(deviation) <= 0:
        raise ValueError(f"{name}: latents_std is {deviation}; its numbers must be positive")


def save_codec(vae: Any, path: Path) -> None:
    """Write an autoencoder as a diffusers folder, with the checksums of its files.

    Args:
        vae: the model of diffusers.
        path: the folder.
    """
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
        path: the folder of a diffusers autoencoder, or a run that contains one as `codec/`; None
            is Identity.

    Raises:
        ValueError: the folder is damaged, or of another architecture.
    """
    if path is None:
        return Identity()
    path = Path(path)
    if path.is_file():
        check_folder(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such codec folder; train one with `rectify fit` or use a diffusers "
            f"{' or '.join(LATENT_CODECS)}"
        )
    nested = path / "codec"
    is_codec = (path / "config.json").exists()  # latents may have been written into its folder
    folder = nested if nested.is_dir() and not is_codec else path
    return find_architecture(folder)(str(folder))


def find_architecture(folder: Path) -> type[LatentCodec]:
    """Return the class of a codec's folder; KL if its config names none.

    Raises:
        ValueError: it is of an architecture that is not supported.
    """
    config = folder / "config.json"
    if not config.is_file():
        return KL  # which reports it
    name = str(read_config(config).get("_class_name", KL.architecture))
    if name not in LATENT_CODECS:
        raise ValueError(
            f"{config}: _class_name is {name}; supported codecs are {', '.join(LATENT_CODECS)}"
        )
    return LATENT_CODECS[name]


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to uint8 in [0, 255], same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
