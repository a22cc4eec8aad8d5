"""Tiny teachers as run folders, of random weights: smooth maps from noise to data that nobody had to train."""

from pathlib import Path
from typing import Any

import torch

from models import teacher as teachers
from models.condition import ClassLabel, Condition
from models.denoiser import Denoiser
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity

SHAPE = (2, 4, 4)


def denoiser(classes: int = 3, seed: int = 0, scaled: bool = False) -> Denoiser:
    """Return a denoiser of random weights: it tells classes, and scales, apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DiT(size=4, channels=2, patch=2, width=16, depth=1, heads=2, classes=classes, scaled=scaled)
        for value in net.parameters():
            torch.nn.init.normal_(value, std=0.25)
        torch.nn.init.normal_(net.out.weight, std=0.05)
    return Denoiser(net, Linear(), Velocity()).eval().requires_grad_(False)


def saved(run: Path, model: Denoiser, condition: Condition | None = None, **more: Any) -> Path:
    """Write a denoiser as the checkpoint of a run folder in pixels, and return the folder."""
    condition = condition or ClassLabel(3)
    parts = {"denoiser": teachers.describe(model), "condition": teachers.describe(condition), "codec": None}
    weights = {f"denoiser.{key}": value for key, value in model.state_dict().items()}
    (run / "checkpoints").mkdir(parents=True)
    checkpoint = {"rectify": {"format": teachers.FORMAT, **parts, **more}, "state_dict": weights, "global_step": 1}
    torch.save(checkpoint, run / "checkpoints" / "step=000000001.ckpt")
    return run
