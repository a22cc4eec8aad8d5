"""A small classifier of a packed, labelled image set.

Its features measure distances between image sets, its predictions the accuracy of samples.
"""

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batch import RankBatches, check_one_size
from data.cache import exclusive
from data.files import atomic_file, errors_named
from data.images import Images, read_all
from data.progress import Meter
from models.tensors import read_safetensors, sort_metadata, to_safetensors

TRAINING_STEPS = 400
TRAINING_BATCH = 128
TRAINING_SEED = 0


class Classifier(nn.Module):
    """Three strided convolutions, a layer of 64 features and a linear head.

    Args:
        channels: channels of the images.
        classes: number of classes.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, 2, 1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.GELU(),
        )
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (features, logits), (B, 64) and (B, classes).

        Args:
            images: (B, C, H, W), in [-1, 1].
        """
        features = self.body(images)
        return features, self.head(features)


def accuracy(classifier: Classifier, images: Images) -> float:
    """Return the fraction of a set's images that the classifier assigns to their class."""
    hits = []
    with torch.inference_mode():
        for x, label in read_all(images, len(images)):
            _, logits = classifier(x)
            hits.append(logits.argmax(1) == label)
    all_hits = torch.cat(hits).float()
    return all_hits.mean().item()


def load_or_train_classifier(
    folder: Path, train: Images, heldout: Images
) -> tuple[Classifier, float]:
    """Return an image set's classifier and its held-out accuracy.

    It is trained once, and stored as FOLDER/classifier.safetensors. Of several evaluations at the
    same time one trains it, and the others wait. Where locks do not reach other nodes, each of them
    trains it, and all write the same bytes.

    Args:
        folder: where the classifier is stored.
        train: images that it is trained on.
        heldout: images that its accuracy is measured on.

    Raises:
        ValueError: the images have no class labels, or several sizes.
    """
    for images in (train, heldout):
        check_one_size(images, "the classifier")
    if not train.manifest["classes"]:
        raise ValueError(
            f"{folder}: has no class labels to train a classifier on; "
            "give --extractor, a network whose features measure distances"
        )
    path = folder / "classifier.safetensors"
    lock = nullcontext() if path.exists() else exclusive(folder / "classifier")
    with lock:
        return _load_or_train(path, train, heldout)


def _load_or_train(path: Path, train: Images, heldout: Images) -> tuple[Classifier, float]:
    # Initialise it from its seed, and leave torch's global generator as it is.
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(TRAINING_SEED)
    classifier = Classifier(train.pixels(0).shape[0], len(train.manifest["classes"]))
    torch.random.set_rng_state(torch_state)

    # Load the stored weights, if they were trained on the same images.
    listing = train.manifest["listing"]
    if path.exists():
        with errors_named(f"{path} (delete it, it will be trained again)"):
            tensors, metadata = read_safetensors(path)
            if metadata["listing"] == listing:
                classifier.load_state_dict(tensors)
                return classifier.eval(), float(metadata["accuracy"])

    # Train it, and store it.
    _fit(classifier, train)
    score = accuracy(classifier, heldout)
    metadata = {"listing": listing, "accuracy": str(score)}
    with atomic_file(path) as file:
        file.write(sort_metadata(to_safetensors(classifier.state_dict(), metadata)))
    return classifier, score


def _fit(classifier: Classifier, train: Images) -> None:
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TRAINING_STEPS)
    batches = RankBatches(train, TRAINING_BATCH, TRAINING_SEED)
    with Meter("classifier", TRAINING_STEPS, "steps") as meter:
        for _, batch in zip(range(TRAINING_STEPS), batches):
            _, logits = classifier(batch.x)
            loss = F.cross_entropy(logits, batch.condition, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            meter.add(1, f"loss {loss.item():.3f}")
    classifier.eval()
