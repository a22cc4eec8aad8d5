"""Features of a user's network: a TorchScript file or a transformers folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import canonical, digest, errors_named, file_digest

# Maps images (B, C, H, W) in [-1, 1] to features (B, d) and logits (B, classes), or no logits.
FeatureFunction = Callable[[Tensor], tuple[Tensor, Tensor | None]]

# Both are antialiased, like Pillow's: without antialiasing, metrics of different codebases cannot
# be compared (Parmar et al. 2021, arXiv 2104.11222).
ResizeFilter = Literal["bicubic", "bilinear"]

EXTRACTION_BATCH = 64  # images in one pass of the network


class Preprocessing(NamedTuple):
    """How a transformers folder prepares images."""

    size: int
    mean: Tensor  # (3, 1, 1)
    std: Tensor  # (3, 1, 1)


class Extractor:
    """Maps images to the features of a network that the user provides.

    A TorchScript file contains code, which is executed: take it only from sources that you trust.
    It is called with float32 RGB images (B, 3, size, size) in [0, 1], and must return features
    (B, d), or a tensor that flattens to them.

    A transformers folder contains config.json and safetensors; none of its code is executed. The
    features are the image features of CLIP-like models, the last layer's first token of other
    transformers (ViT, DINO), and the spatial mean of the last layer of convolutional networks.
    Images are normalised by the mean and standard deviation in its preprocessor_config.json.

    Paths that are not local are refused.

    Args:
        path: the file or folder.
        size: height and width that images are resized to; by default the folder's size, and for a
            file the images' size.
        resize: the filter that resizes them.
        device: where the network runs.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the file or folder is not readable.
    """

    def __init__(
        self,
        path: Path,
        size: int | None = None,
        resize: ResizeFilter = "bicubic",
        device: torch.device | str = "cpu",
    ):
        if size is not None and size < 1:
            raise ValueError(f"extractor_size is {size}; it must be at least 1")
        self.path = path
        self.resize = resize
        self.device = torch.device(device)
        self.size = size
        self.mean = torch.zeros(3, 1, 1)
        self.std = torch.ones(3, 1, 1)
        if path.is_dir():
            self.net = load_transformer(path)
            preprocessing = read_preprocessing(path)
            self.mean = preprocessing.mean
            self.std = preprocessing.std
            self.size = size or preprocessing.size
            self.files = [*sorted(path.glob("*.json")), *sorted(path.glob("*.safetensors"))]
        elif path.is_file():
            self.net = load_torchscript(path)
            self.files = [path]
        else:
            raise FileNotFoundError(
                f"{path}: no such file or folder; give a local TorchScript file or transformers "
                "folder, nothing is downloaded"
            )
        self.net = self.net.to(self.device).eval()

    def describe(self) -> dict[str, Any]:
        """Return what identifies the features: name, checksum, size and filter."""
        checksums = {path.name: file_digest(path) for path in self.files}
        sha256 = digest(canonical(checksums))
        if self.path.is_file():
            sha256 = checksums[self.path.name]
        return {
            "extractor": self.path.name,
            "sha256": sha256,
            "size": self.size,
            "resize": self.resize if self.size else "none",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, d), float32, on the CPU.

        Args:
            images: (B, 1 or 3, H, W), in [-1, 1].

        Raises:
            ValueError: the network does not take such images, or its features are not finite.
        """
        return torch.cat([self._extract(part) for part in images.split(EXTRACTION_BATCH)])

    def _extract(self, images: Tensor) -> Tensor:
        # Prepare the images.
        x = images.expand(-1, 3, -1, -1) / 2 + 0.5
        x = x.to(self.device, torch.float32)
        if self.size and x.shape[-2:] != (self.size, self.size):
            resized = F.interpolate(x, (self.size, self.size), mode=self.resize, antialias=True)
            x = resized.clamp(0, 1)
        x = (x - self.mean.to(x)) / self.std.to(x)

        # Run the network, which may fail in many ways on images of another size.
        try:
            is_folder = self.path.is_dir()
            found = transformer_features(self.net, x) if is_folder else self.net(x)
            found = found.flatten(1).float().cpu()
        except (RuntimeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: does not take images {tuple(x.shape)} ({last_line(error)}); "
                "see --extractor_size"
            ) from error
        if len(found) != len(x) or not found.isfinite().all():
            raise ValueError(
                f"{self.path}: returns {tuple(found.shape)} for {len(x)} images; "
                "it must return finite features (B, d), one vector for each image"
            )
        return found

    def with_classifier(self, classifier: nn.Module | None) -> FeatureFunction:
        """Return a function that adds the logits of a classifier, if any, to the features."""

        def extract(images: Tensor) -> tuple[Tensor, Tensor | None]:
            features = self(images)
            if classifier is None:
                return features, None
            _, logits = classifier(images)
            return features, logits

        return extract


def last_line(error: Exception) -> str:
    """Return the last line of an error, in which TorchScript names the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def load_torchscript(path: Path) -> nn.Module:
    """Load the network in a TorchScript file."""
    try:
        return torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise ValueError(
            f"{path}: not a TorchScript file ({last_line(error)}); make one with torch.jit.save"
        ) from error


def load_transformer(folder: Path) -> nn.Module:
    """Load the network in a transformers folder: its safetensors, and none of its code."""
    # Check the folder and the library.
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder}: has no config.json and safetensors; give a transformers folder"
        )
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ValueError(
            f"{folder}: needs transformers ({error}); pip install 'rectify[text]'"
        ) from None

    # Load the network. transformers, safetensors and torch each raise their own exceptions.
    options = {
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    try:
        model, loading = AutoModel.from_pretrained(folder, **options)
    except Exception as error:
        raise ValueError(
            f"{folder}: not a readable transformers folder ({last_line(error)})"
        ) from error

    # Weights that are missing would be random. The pooler is not used.
    missing = []
    for key in sorted(loading["missing_keys"]):
        if not key.startswith("pooler."):
            missing.append(key)
    if missing:
        raise ValueError(
            f"{folder}: has no weights for {missing[0]} (and {len(missing) - 1} more), "
            "which would be random; give a complete transformers folder"
        )
    return model


def read_preprocessing(folder: Path) -> Preprocessing:
    """Read how a transformers folder prepares images, from its preprocessor_config.json."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; it has the mean and standard deviation that the network expects"
        )
    with errors_named(path):
        config = json.loads(path.read_text())

        # Mean and standard deviation.
        mean = [0.0] * 3
        std = [1.0] * 3
        if config.get("do_normalize", True):
            mean = config["image_mean"]
            std = config["image_std"]

        # Size: that of the crop, of the resized image, or of the network's input.
        size = config.get("size")
        if config.get("do_center_crop"):
            size = config.get("crop_size")
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        size = size or json.loads((folder / "config.json").read_text()).get("image_size")

        if not isinstance(size, int) or len(mean) != 3 or len(std) != 3:
            raise ValueError(
                f"size is {size}, image_mean {mean}, image_std {std}; "
                "they must be one number, three numbers and three numbers"
            )
        return Preprocessing(
            size, torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        )


def transformer_features(model: Any, x: Tensor) -> Tensor:
    """Return the features of a transformers network.

    Args:
        model: the network.
        x: prepared images, (B, 3, H, W).
    """
    # CLIP and similar models. Since transformers 5 they return an output object.
    if hasattr(model, "get_image_features"):
        found = model.get_image_features(pixel_values=x)
        return found if isinstance(found, Tensor) else found.pooler_output

    # Convolutional networks return maps (B, d, h, w), transformers tokens (B, n, d).
    last = model(pixel_values=x).last_hidden_state
    if last.ndim == 4:
        return last.mean((2, 3))
    return last[:, 0]
