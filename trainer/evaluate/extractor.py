"""Features of a network of the user's own, in which distances are measured: a TorchScript file, or a transformers folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import canonical, digest, file_digest, naming

Look = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # (features, logits or none), (B, d), (B, classes), of images in [-1, 1]
Filter = Literal["bicubic", "bilinear"]  # both antialiased, as Pillow's are: without it figures cannot be compared (2104.11222)
BATCH = 64  # images looked at at once


class Extractor:
    """Maps images to features, and says how.

    A TorchScript file is code, which runs here: take it only from whom you trust; what is not a local file is refused. It is
    called with float32 RGB images (B, 3, size, size) in [0, 1], and gives (B, d) or what flattens to it. A transformers folder
    holds config.json and safetensors, and nothing of it is run: its features are those of CLIP's and its kin's images, else
    the last layer's first token (ViT, DINO), of a convolutional network the mean over places; scaled by the mean and
    deviation in its preprocessor_config.json.

    Args:
        path: the file or folder.
        size: that images are brought to; by default the folder's own, and for a file the images' own.
        resize: the filter.
        device: where it runs.
    """

    def __init__(self, path: Path, size: int | None = None, resize: Filter = "bicubic", device: torch.device | str = "cpu"):
        if size is not None and size < 1:
            raise ValueError(f"extractor_size: {size}, it must be at least 1")
        self.path, self.resize, self.device = path, resize, torch.device(device)
        self.mean, self.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
        if path.is_dir():
            self.net, own = transformer(path), preparation(path)
            self.mean, self.std = (torch.tensor(own[name]).view(3, 1, 1) for name in ("mean", "std"))
            self.size, self.files = size or own["size"], [*sorted(path.glob("*.json")), *sorted(path.glob("*.safetensors"))]
        elif path.is_file():
            self.net, self.size, self.files = scripted(path), size, [path]
        else:
            raise FileNotFoundError(f"{path}: not here; give a local TorchScript file or transformers folder, nothing is fetched")
        self.net = self.net.to(self.device).eval()

    def about(self) -> dict[str, Any]:
        """Return what every figure measured in these features is to be told with."""
        sums = [file_digest(path) for path in self.files]
        whole = sums[0] if self.path.is_file() else digest(canonical(dict(zip((path.name for path in self.files), sums))))
        return {"extractor": self.path.name, "sha256": whole, "size": self.size, "resize": self.resize if self.size else "none"}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return features (B, d), float32, on the CPU, of images (B, 1 or 3, H, W) in [-1, 1]."""
        return torch.cat([self._part(part) for part in images.split(BATCH)])

    def _part(self, images: Tensor) -> Tensor:
        x = (images.expand(-1, 3, -1, -1) / 2 + 0.5).to(self.device, torch.float32)
        if self.size and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode=self.resize, antialias=True).clamp(0, 1)
        x = (x - self.mean.to(x)) / self.std.to(x)
        try:
            found = features(self.net, x) if self.path.is_dir() else self.net(x)
            found = found.flatten(1).float().cpu()
        except (RuntimeError, AttributeError, ValueError) as error:
            said = f"does not take images {tuple(x.shape)} ({why(error)}); see --extractor_size"
            raise ValueError(f"{self.path}: {said}") from error
        if len(found) != len(x) or not found.isfinite().all():
            raise ValueError(f"{self.path}: gives {tuple(found.shape)} for {len(x)} images, wanted as many finite rows")
        return found

    def beside(self, classifier: nn.Module | None) -> Look:
        """Return what looks with this at features, and with a classifier, if there is one, at classes."""
        return lambda images: (self(images), None if classifier is None else classifier(images)[1])


def why(error: Exception) -> str:
    """Return the last line of an error, where TorchScript says what is wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def scripted(path: Path) -> nn.Module:
    """Return the network in a TorchScript file."""
    try:
        return torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise ValueError(f"{path}: not a TorchScript file ({why(error)}); make one with torch.jit.save") from error


def transformer(folder: Path) -> nn.Module:
    """Return the network in a transformers folder: all of its weights, from safetensors, and none of its code."""
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: no config.json and safetensors there, as a transformers folder has")
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ValueError(f"{folder}: needs transformers ({error}); pip install 'rectify[text]'") from None
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    try:
        model, told = AutoModel.from_pretrained(folder, **options)
    except Exception as error:  # transformers, safetensors and torch each raise kinds of their own
        raise ValueError(f"{folder}: not a readable transformers folder ({why(error)})") from error
    if missing := sorted(key for key in told["missing_keys"] if not key.startswith("pooler.")):  # the pooler is not used
        raise ValueError(f"{folder}: has no weights for {missing[0]} (and {len(missing) - 1} more); they would be random")
    return model


def preparation(folder: Path) -> dict[str, Any]:
    """Return the size, mean and std that a transformers folder prepares images with."""
    path, config = folder / "preprocessor_config.json", folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; it says the mean and deviation that the network expects")
    with naming(path):
        told = json.loads(path.read_text())
        scaled = told.get("do_normalize", True)
        mean, std = (told[key] if scaled else [plain] * 3 for key, plain in (("image_mean", 0.0), ("image_std", 1.0)))
        size = told.get("crop_size") if told.get("do_center_crop") else told.get("size")
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge")
        size = size or json.loads(config.read_text()).get("image_size")
        if not isinstance(size, int) or len(mean) != 3 or len(std) != 3:
            raise ValueError(f"size is {size}, image_mean {mean}, image_std {std}; wanted one number and three each")
    return {"size": size, "mean": mean, "std": std}


def features(model: Any, x: Tensor) -> Tensor:
    """Return the features of prepared images x, (B, 3, H, W), that a transformers network gives."""
    if hasattr(model, "get_image_features"):  # CLIP and its kin
        found = model.get_image_features(pixel_values=x)
        return found if isinstance(found, Tensor) else found.pooler_output  # since transformers 5
    last = model(pixel_values=x).last_hidden_state
    return last.mean((2, 3)) if last.ndim == 4 else last[:, 0]
