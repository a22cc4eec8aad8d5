"""LPIPS (1801.03924): how differently two images look to a pretrained trunk. Its public weights are a file that users bring."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models import codec as codecs

TRUNK = re.compile(r"(?:net\.slice\d|features)\.(\d+\.(?:weight|bias))")  # names of lpips and of torchvision
LINEAR = re.compile(r"lins?\.?(\d)\.model\.\d\.weight")
WAY_OUT = 'make it once with the lpips package: safetensors.torch.save_model(lpips.LPIPS(net="vgg"), "lpips.safetensors")'


def vgg() -> tuple[nn.Sequential, list[int]]:
    """Return VGG16's layers under their public places, and the places whose outputs are compared."""
    layers: list[nn.Module] = []
    before, taps = 3, []
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
            before = width
        taps.append(len(layers) - 1)
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1]), taps


def alex() -> tuple[nn.Sequential, list[int]]:
    """Return AlexNet's layers under their public places, and the places whose outputs are compared."""
    layers = (
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    )
    return nn.Sequential(*layers), [1, 4, 7, 9, 11]


class LPIPS(nn.Module):
    """Frozen. Features of each tapped layer are normalised over channels; their squared gaps are weighted, and averaged.

    Args:
        weights: the lpips package's weights, version 0.1, of VGG16 or AlexNet, trunk and linear layers in one safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: other tensors are in it.
    """

    def __init__(self, weights: Path):
        super().__init__()
        trunk, linear = _read(Path(weights))
        wide = trunk["0.weight"].shape[-1] == 11  # AlexNet's first kernel
        self.net, self.taps = alex() if wide else vgg()
        self.least = 31 if wide else 16  # pixels: below that a layer is empty
        try:
            self.net.load_state_dict(trunk)
            for i, place in enumerate(self.taps):
                self.register_buffer(f"linear{i}", linear[i].view(1, self.net[place - 1].out_channels, 1, 1))  # type: ignore
        except (KeyError, RuntimeError) as error:
            why = " ".join(str(error).split())[:160]
            raise ValueError(f"{weights}: not the weights of LPIPS on VGG16 or AlexNet ({why}); {WAY_OUT}") from None
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))  # ImageNet's, of [-1, 1]
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the tapped features, each (B, C', H', W') and of length 1 over channels, of images (B, 1 or 3, H, W)."""
        if images.shape[1] not in (1, 3) or min(images.shape[2:]) < self.least:
            needs = f"it needs 1 or 3 channels and {self.least} pixels a side; for latents give their codec"
            raise ValueError(f"LPIPS: images are {tuple(images.shape[1:])}; {needs}")
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        hidden, found = (images - shift) / scale, []  # grey becomes three equal channels
        for place, layer in enumerate(self.net):
            hidden = layer(hidden)
            if place in self.taps:
                found.append(hidden / (torch.linalg.vector_norm(hidden, dim=1, keepdim=True) + 1e-10))
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return distances (B,), zero for equal images, of images in [-1, 1], (B, 1 or 3, H, W)."""
        gaps = [(f - g).square() for f, g in zip(self.features(a), self.features(b))]
        return torch.stack([(self.get_buffer(f"linear{i}") * gap).sum(1).mean((1, 2)) for i, gap in enumerate(gaps)]).sum(0)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Return the trunk's tensors and the linear layers' from a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; LPIPS needs its weights: {WAY_OUT}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); {WAY_OUT}") from None
    trunk = {found[1]: value for name, value in tensors.items() if (found := TRUNK.fullmatch(name))}
    linear = {int(found[1]): value for name, value in tensors.items() if (found := LINEAR.fullmatch(name))}
    if "0.weight" not in trunk:
        raise ValueError(f"{path}: holds no trunk (net.slice1.0.weight, ...); {WAY_OUT}")
    return trunk, linear


class Perceptual:
    """LPIPS of the images that x stands for.

    Args:
        weights: file of LPIPS's weights (safetensors).
        codec: folder of the codec whose latents x is, the model's own; none for pixels.
        scale: by which distances are multiplied.
    """

    def __init__(self, weights: Path, codec: str | None = None, scale: float = 1.0):
        if not 0 < scale < float("inf"):
            raise ValueError(f"Perceptual: scale is {scale}, it must be positive")
        self.lpips, self.codec, self.scale = LPIPS(weights), codecs.load(codec), scale

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Return distances (B,) of data (B, C, H, W)."""
        codec, lpips = self.codec.to(x.device), self.lpips.to(x.device)
        with torch.no_grad():
            images = codec.decode(x)
        return self.scale * lpips(codec.decode(x_hat), images)
