"""`rectify ema`: an average of any width, reconstructed from snapshots of a few averages."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.files import atomic_file, errors_named, files_by_step
from models.checkpoint import newest_checkpoint, read_checkpoint
from models.tensors import read_safetensors, save_nested
from trainer.callbacks.checkpoint import SNAPSHOT_SUFFIX, SNAPSHOTS, step_of
from trainer.posthoc_ema import exponent, posthoc_weights


def ema(run: Path, width: float, out: Path | None = None) -> None:
    """Reconstruct an average of another width from a run's EMA snapshots.

    The result is a checkpoint that every verb accepts.

    Args:
        run: a run folder that was trained with `EMA` and its `widths`.
        width: the width to reconstruct: the average's relative standard deviation, e.g. 0.08.
        out: the checkpoint to write, by default RUN/ema/width=WIDTH.ckpt. The run's codec is
            looked up one folder above it.
    """
    # find the snapshots; those after the newest checkpoint will be written again
    gamma = exponent(width)
    newest = newest_checkpoint(run)
    checkpoint = read_checkpoint(newest)
    names = list(checkpoint.get("ema_profiles", {}))
    files = []
    for path in files_by_step(run / SNAPSHOTS, SNAPSHOT_SUFFIX):
        if step_of(path) <= checkpoint["global_step"]:
            files.append(path)
    if not (files and names):
        raise FileNotFoundError(
            f"{run}: no EMA snapshots in {run / 'ema'}; train with EMA widths, e.g. [0.05, 0.1]"
        )

    # compute a weight for every snapshot of every profile
    file_steps = [float(step_of(file)) for file in files]
    name_gammas = list(map(exponent, map(float, names)))
    steps = np.array(file_steps).repeat(len(names))
    gammas = np.array(name_gammas * len(files))
    weights = posthoc_weights(steps, gammas, int(steps.max()), gamma)

    # sum the snapshots in float64
    total: dict[str, Tensor] = {}
    for key, value in checkpoint["ema"].items():
        total[key] = torch.zeros_like(value, dtype=torch.float64)
    for path, file_weights in zip(files, weights.reshape(len(files), len(names))):
        with errors_named(path):
            snapshot, metadata = read_safetensors(path)
            step = int(metadata["step"])
            if step != step_of(path):
                raise ValueError(f"{path}: it holds step {step}; rename it to its step")
            if metadata.get("run", "") != checkpoint.get("run", ""):
                raise ValueError(f"{path}: it is of another run than {newest}; move it away")
            for name, weight in zip(names, file_weights):
                for key, value in total.items():
                    value.add_(snapshot[f"{name}/{key}"].double(), alpha=float(weight))

    # write them as a checkpoint
    average = {key: value.to(checkpoint["ema"][key].dtype) for key, value in total.items()}
    content = {"rectify": checkpoint["rectify"], "state_dict": {}, "ema": average}
    with atomic_file(out or run / "ema" / f"width={width:g}.ckpt") as file:
        save_nested(content, file)
