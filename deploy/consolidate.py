"""`rectify consolidate`: a checkpoint, sharded or not, as one safetensors file."""

import json
from pathlib import Path
from typing import Literal

from data.files import atomic_file
from models.checkpoint import denoiser_weights, newest_checkpoint, read_checkpoint
from models.tensors import to_safetensors


def consolidate(
    run: Path, out: Path | None = None, weights: Literal["average", "training"] = "average"
) -> None:
    """Write a run's weights to one safetensors file, which every verb accepts as a checkpoint.

    Args:
        run: run folder, or one of its checkpoints.
        out: the file to write, by default RUN/consolidated/step=N.safetensors. The run's codec is
            looked up one folder above it.
        weights: the exponential moving average, which is used for sampling, or the weights that
            the optimizer updates.
    """
    path = newest_checkpoint(run)
    checkpoint = read_checkpoint(path)
    chosen = checkpoint.get("ema") if weights == "average" else denoiser_weights(checkpoint)
    if not chosen:
        raise ValueError(
            f"{path}: it has no {weights} weights of a denoiser; choose other --weights"
        )
    description = json.dumps(checkpoint["rectify"], sort_keys=True)
    if out is None:
        out = path.parent.parent / "consolidated" / f"{path.stem}.safetensors"
    with atomic_file(out) as file:
        file.write(to_safetensors(chosen, {"rectify": description}))
