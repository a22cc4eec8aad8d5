"""Consolidating: a checkpoint, sharded or not, as one safetensors file that every verb accepts."""

import json
from pathlib import Path
from typing import Literal

from data.files import atomic
from models import teacher
from models.tensors import packed


def consolidate(run: Path, out: Path | None = None, weights: Literal["average", "training"] = "average") -> None:
    """Write a run's weights into one safetensors file, with the description that rebuilds its denoiser.

    Args:
        run: run folder, or a checkpoint in it.
        out: the file to write, by default RUN/consolidated/step=N.safetensors (keep it one folder below the run's codec).
        weights: the exponential average, which is what is sampled from, or the weights that are trained.
    """
    path = teacher.newest(run)
    checkpoint = teacher.read(path)
    chosen = checkpoint.get("ema") if weights == "average" else teacher.weights(checkpoint)
    if not chosen:
        raise ValueError(f"{path}: holds no {weights} weights of a denoiser")
    with atomic(out or path.parent.parent / "consolidated" / f"{path.stem}.safetensors") as file:
        file.write(packed(chosen, {"rectify": json.dumps(checkpoint["rectify"], sort_keys=True)}))
