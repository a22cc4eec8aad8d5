"""A small classifier of a packed, labelled set: its features measure distance, its answers accuracy."""

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import Steps
from data.cache import alone
from data.files import atomic, naming
from data.images import Images, read_all
from data.progress import Meter
from models.tensors import packed, unpacked

STEPS, BATCH, SEED = 400, 128, 0


class Classifier(nn.Module):
    """Three strided convolutions and a layer of 64 features.

    Args:
        channels: of the images.
        classes: to tell apart.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, 16, 3, 2, 1), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU()),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()),
            *(nn.Linear(1024, 64), nn.GELU()),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (features, logits), (B, 64) and (B, classes), of images in [-1, 1], (B, C, H, W)."""
        features = self.body(images)
        return features, self.head(features)


def accuracy(classifier: Classifier, images: Images) -> float:
    """Return the fraction of a set's images that are put into their own class."""
    with torch.inference_mode():
        hits = [classifier(x)[1].argmax(1) == label for x, label in read_all(images, len(images))]
    return torch.cat(hits).float().mean().item()


def trained(folder: Path, train: Images, heldout: Images) -> tuple[Classifier, float]:
    """Return the set's classifier and its held-out accuracy, trained once and kept as FOLDER/classifier.safetensors."""
    if not train.manifest["classes"]:
        raise ValueError(f"{folder}: has no class labels to train a classifier on; give --extractor, a network to measure with")
    kept = (folder / "classifier.safetensors").exists()
    with nullcontext() if kept else alone(folder / "classifier"):  # of evaluations side by side one trains it, the others wait
        return _trained(folder, train, heldout)


def _trained(folder: Path, train: Images, heldout: Images) -> tuple[Classifier, float]:
    classes = train.manifest["classes"]
    path, torch_state = folder / "classifier.safetensors", torch.random.get_rng_state()
    torch.manual_seed(SEED)
    classifier = Classifier(train.pixels(0).shape[0], len(classes))
    torch.random.set_rng_state(torch_state)
    origin = train.manifest["listing"]
    if path.exists():
        with naming(f"{path} (delete it, it will be trained again)"):
            tensors, about = unpacked(path)
            if about["listing"] == origin:
                classifier.load_state_dict(tensors)
                return classifier.eval(), float(about["accuracy"])
    _fit(classifier, train)
    score = accuracy(classifier, heldout)
    with atomic(path) as file:
        file.write(packed(classifier.state_dict(), {"listing": origin, "accuracy": str(score)}))
    return classifier, score


def _fit(classifier: Classifier, train: Images) -> None:
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with Meter("classifier", STEPS, "steps") as meter:
        for _, batch in zip(range(STEPS), Steps(train, BATCH, SEED)):
            loss = F.cross_entropy(classifier(batch.x)[1], batch.condition, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            meter.add(1, f"loss {loss.item():.3f}")
    classifier.eval()
