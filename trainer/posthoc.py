"""Post-hoc EMA: an average of any width, reconstructed from the snapshots of a few (EDM2, 2312.02696, section 3)."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.files import atomic, naming
from models import teacher
from models.tensors import save_nested, unpacked


def exponent(width: float) -> float:
    """Return the power gamma of the profile t^gamma whose relative standard deviation is `width` (eq. 126 there)."""
    if not 0 < width < 12**-0.5:
        raise ValueError(f"EMA width: {width}, it must lie in (0, {12**-0.5:.4f}): the widest profile is the plain mean")
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def products(steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray) -> np.ndarray:
    """Return the inner products, (a, b), of normalised profiles t^gamma on [0, step]."""
    s, g, r, h = steps_a[:, None], gammas_a[:, None], steps_b[None], gammas_b[None]
    ratio = s / r
    return (g + 1) * (h + 1) / ((g + h + 1) * np.maximum(s, r)) * np.where(s < r, ratio**h, ratio**-g)


def weights(steps: np.ndarray, gammas: np.ndarray, step: int, gamma: float) -> np.ndarray:
    """Return the least-squares weights of snapshots that make the profile `gamma` at `step`."""
    gram = products(steps, gammas, steps, gammas)
    target = products(steps, gammas, np.array([float(step)]), np.array([gamma]))[:, 0]
    return np.linalg.lstsq(gram, target, rcond=1e-12)[0]


def ema(run: Path, width: float, out: Path | None = None) -> None:
    """Reconstruct the average of another width from a run's EMA snapshots, as a checkpoint that every verb accepts.

    Args:
        run: a run folder trained with `EMA` and `widths`.
        width: the wanted relative standard deviation, say 0.08.
        out: the checkpoint to write, by default RUN/ema/width=WIDTH.ckpt (keep it one folder below the run's codec).
    """
    gamma = exponent(width)
    files = sorted((run / "ema").glob("step=*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{run}: no EMA snapshots under {run / 'ema'}; train with EMA widths, say [0.05, 0.1]")
    checkpoint = teacher.read(teacher.newest(run))
    names = list(checkpoint["ema_profiles"])
    steps = np.array([float(file.stem.removeprefix("step=")) for file in files]).repeat(len(names))
    found = weights(steps, np.array([exponent(float(name)) for name in names] * len(files)), int(steps.max()), gamma)
    total: dict[str, Tensor] = {key: torch.zeros_like(value, dtype=torch.float64) for key, value in checkpoint["ema"].items()}
    for path, parts in zip(files, found.reshape(len(files), len(names))):
        with naming(path):
            snapshot, about = unpacked(path)
            if int(about["step"]) != int(path.stem.removeprefix("step=")):
                raise ValueError(f"{path}: holds step {about['step']}; give it its own name back")
            for name, weight in zip(names, parts):
                for key, value in total.items():
                    value.add_(snapshot[f"{name}/{key}"].double(), alpha=float(weight))
    average = {key: value.to(checkpoint["ema"][key].dtype) for key, value in total.items()}
    with atomic(out or run / "ema" / f"width={width:g}.ckpt") as file:
        save_nested({"rectify": checkpoint["rectify"], "state_dict": {}, "ema": average}, file)
