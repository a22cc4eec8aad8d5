"""LPIPS: how differently two images look to a pretrained network.

Zhang et al. 2018 (arXiv 1801.03924), version 0.1. The user provides the pretrained network, its
trunk; torchmetrics contains the learned linear layers. Its LPIPS itself is not used: it needs
torchvision, and normalises the features differently, so that its distances differ.
"""

import re
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from models.codec import load_codec
from models.tensors import tensor_digest

# Tensor names of the lpips package and of torchvision.
TRUNK_NAME = re.compile(r"(?:net\.slice\d|features)\.(\d+\.(?:weight|bias))")
LINEAR_NAME = re.compile(r"lins?\.?(\d)\.model\.\d\.weight")
WAY_OUT = (
    "download torchvision's https://download.pytorch.org/models/vgg16-397923af.pth "
    "or alexnet-owt-7be5be79.pth"
)
# The linear layers of LPIPS 0.1, by their trunk (models.tensors.tensor_digest).
LINEAR_DIGESTS = {
    "alex": "885a51c7aba6f7ccf3321ca5f345fbd72201f3347f0a88e807016be494493f5d",
    "vgg": "09016f6c713efecd87823d0ac57b392f1c5c47de4e54122e04c71f80cc4650a3",
}


class Trunk(NamedTuple):
    """The layers of a pretrained network, and which of their outputs are compared."""

    layers: nn.Sequential
    taps: list[int]  # indices of the layers


class Weights(NamedTuple):
    """The tensors of a file."""

    trunk: dict[str, Tensor]  # by the names of the trunk's layers
    linear: dict[int, Tensor]  # by the number of the tap; only files of the lpips package have them


def vgg() -> Trunk:
    """Return VGG16's layers under their public indices, with its taps."""
    layers: list[nn.Module] = []
    channels = 3
    taps = []
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        taps.append(len(layers) - 1)
        layers.append(nn.MaxPool2d(2))
    return Trunk(nn.Sequential(*layers[:-1]), taps)


def alex() -> Trunk:
    """Return AlexNet's layers under their public indices, with its taps."""
    layers = (
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
    return Trunk(nn.Sequential(*layers), [1, 4, 7, 9, 11])


class LPIPS(nn.Module):
    """The frozen metric.

    The features of each tapped layer are normalised over channels; their squared differences
    are weighted by channel and averaged over pixels, and the layers are added.

    Args:
        weights: VGG16 or AlexNet, as torchvision's file (.pth, or its tensors in safetensors), or
            the lpips package's model, version 0.1, in safetensors.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds other tensors.
    """

    def __init__(self, weights: Path):
        super().__init__()
        # 1. The trunk, recognised by its first kernel.
        found = _load_weights(Path(weights))
        is_alex = found.trunk["0.weight"].shape[-1] == 11
        self.net, self.taps = alex() if is_alex else vgg()
        self.min_size = 31 if is_alex else 16  # in pixels: below that a layer is empty

        try:
            self.net.load_state_dict(found.trunk)
        except RuntimeError as error:
            why = " ".join(str(error).split())[:160]
            raise ValueError(f"{weights}: neither VGG16 nor AlexNet ({why}); {WAY_OUT}") from None

        # 2. The linear layers, one for each tap.
        for number, linear in enumerate(load_linear("alex" if is_alex else "vgg")):
            given = found.linear.get(number, linear)
            if not torch.equal(given.float().flatten(), linear.flatten()):
                raise ValueError(
                    f"{weights}: its linear layer {number} is not that of LPIPS 0.1; {WAY_OUT}"
                )
            self.register_buffer(f"linear{number}", linear)

        # 3. ImageNet's mean and standard deviation, for images in [-1, 1].
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the features of images (B, 1 or 3, H, W), one tensor (B, C', H', W') per tap.

        Each has length 1 over its channels.
        """
        if images.shape[1] not in (1, 3) or min(images.shape[2:]) < self.min_size:
            raise ValueError(
                f"LPIPS: images are {tuple(images.shape[1:])}; it needs 1 or 3 channels and at "
                f"least {self.min_size} pixels a side; for latents give their codec"
            )
        # Grey images are broadcast to three equal channels.
        hidden = (images - self.get_buffer("shift")) / self.get_buffer("scale")
        features = []
        for number, layer in enumerate(self.net):
            hidden = layer(hidden)
            if number in self.taps:
                length = torch.linalg.vector_norm(hidden, dim=1, keepdim=True)
                features.append(hidden / (length + 1e-10))
        return features

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distances (B,) of images in [-1, 1], (B, 1 or 3, H, W); 0 if equal."""
        gaps = [(f - g).square() for f, g in zip(self.features(a), self.features(b), strict=True)]
        distances = []
        for number, gap in enumerate(gaps):
            weighted = self.get_buffer(f"linear{number}") * gap
            distances.append(weighted.sum(1).mean((1, 2)))
        return torch.stack(distances).sum(0)


def load_linear(net: str) -> list[Tensor]:
    """Return the weights of the linear layers on a trunk, (1, C, 1, 1) for each tap.

    Args:
        net: "alex" or "vgg".

    Raises:
        ValueError: this version of torchmetrics contains others than LPIPS 0.1's.
    """
    path = Path(str(files("torchmetrics"))) / f"functional/image/lpips_models/{net}.pth"
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if tensor_digest(tensors) != LINEAR_DIGESTS[net]:
        raise ValueError(
            f"{path}: not the linear layers of LPIPS 0.1; pip install torchmetrics==1.9.0"
        )
    return [tensors[f"lin{number}.model.1.weight"] for number in range(len(tensors))]


def _load_weights(path: Path) -> Weights:
    """Return the tensors of the trunk and of the linear layers from a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; LPIPS needs a trunk: {WAY_OUT}")
    tensors = _read_pickle(path) if path.suffix == ".pth" else _read_safetensors(path)
    trunk = {}
    linear = {}
    for name, value in tensors.items():
        in_trunk = TRUNK_NAME.fullmatch(name)
        in_linear = LINEAR_NAME.fullmatch(name)
        if in_trunk:
            trunk[in_trunk[1]] = value
        if in_linear:
            linear[int(in_linear[1])] = value
    if "0.weight" not in trunk:
        raise ValueError(f"{path}: holds no trunk (features.0.weight, ...); {WAY_OUT}")
    return Weights(trunk, linear)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save, without running code from it."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises many kinds
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not readable by torch.load ({why}); {WAY_OUT}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, without the classifier on top of the trunk."""
    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not name.startswith("classifier."):
                    tensors[name] = file.get_tensor(name)
        return tensors
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); {WAY_OUT}") from None


class Perceptual:
    """LPIPS of the images that x encodes.

    Args:
        weights: file of VGG16 or AlexNet, see LPIPS.
        codec: folder of the codec that decodes x, the model's; none if x is pixels.
        scale: factor of the distances, positive.
    """

    def __init__(self, weights: Path, codec: str | None = None, scale: float = 1.0):
        if not 0 < scale < float("inf"):
            raise ValueError(f"Perceptual: scale is {scale}; it must be positive")
        self.lpips = LPIPS(weights)
        self.codec = load_codec(codec)
        self.scale = scale

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Return the distances (B,) of data (B, C, H, W)."""
        codec = self.codec.to(x.device)
        lpips = self.lpips.to(x.device)
        with torch.no_grad():
            images = codec.decode(x)
        return self.scale * lpips(codec.decode(x_hat), images)
