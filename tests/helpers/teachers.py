"""Small teachers as run folders: random weights that map noise smoothly to data, untrained."""

import json
from pathlib import Path
from typing import Any

import torch

from models.checkpoint import FORMAT
from models.codec import LatentCodec
from models.condition import ClassLabel, Condition
from models.denoiser import Denoiser
from models.description import describe
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity

SHAPE = (2, 4, 4)


def small_denoiser(classes: int = 3, seed: int = 0, guidance_embedded: bool = False) -> Denoiser:
    """Return a denoiser of SHAPE with random weights.

    Its output depends on the class and, if it reads one, on the guidance scale.

    Args:
        classes: number of classes; 0 for none.
        seed: seed of the weights.
        guidance_embedded: whether the network reads a guidance scale.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DiT(
            size=4,
            channels=2,
            patch=2,
            width=16,
            depth=1,
            heads=2,
            classes=classes,
            guidance_embedded=guidance_embedded,
        )
        for value in net.parameters():
            torch.nn.init.normal_(value, std=0.25)
        torch.nn.init.normal_(net.out.weight, std=0.05)
    return Denoiser(net, Linear(), Velocity()).eval().requires_grad_(False)


def save_weights(
    run: Path, rectify: dict[str, Any], weights: dict[str, torch.Tensor], **parts: Any
) -> Path:
    """Write a checkpoint into a run's folder, after one step, and return the folder.

    Args:
        run: the run's folder.
        rectify: the description of the model, without the format's number.
        weights: the state dict.
        parts: more parts of the checkpoint, e.g. `ema`.
    """
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoint = {
        "rectify": {"format": FORMAT, **rectify},
        "state_dict": weights,
        "global_step": 1,
        **parts,
    }
    torch.save(checkpoint, run / "checkpoints" / "step=000000001.ckpt")
    return run


def save_teacher(
    run: Path,
    model: Denoiser,
    condition: Condition | None = None,
    codec: LatentCodec | None = None,
    averaged: bool = False,
    **more: Any,
) -> Path:
    """Write a denoiser as the checkpoint of a run, and return the run's folder.

    Args:
        run: the run's folder.
        model: the denoiser.
        condition: by default class labels of three classes.
        codec: by default none: the denoiser is in pixels.
        averaged: whether the denoiser's weights are the EMA, beside random raw weights.
        more: more entries of the model's description, e.g. `guidance`.
    """
    condition = condition or ClassLabel(3)
    rectify = {
        "denoiser": describe(model),
        "condition": describe(condition),
        "codec": None,
        **more,
    }
    if codec is not None:
        codec.save(run / "codec")
        rectify["codec"] = "codec"
    weights = {f"denoiser.{key}": value for key, value in model.state_dict().items()}
    if not averaged:
        return save_weights(run, rectify, weights)
    raw = {key: torch.randn_like(value) for key, value in weights.items()}
    return save_weights(run, rectify, raw, ema=model.state_dict())


def edit_json(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
