"""Teachers that others made: pipelines of diffusers, read from their folders as (denoiser, codec, condition)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import codec as codecs
from models.clock import Clock, Index, Scaled
from models.codec import Codec
from models.condition import ClassLabel, Condition, Unconditional
from models.denoiser import Denoiser
from models.interpolant import Discrete, Interpolant, Linear
from models.nets.pretrained import KINDS, Pretrained
from models.prediction import Angular, Data, Noise, Prediction, Velocity

INDEX = "model_index.json"
ROWS: dict[str, type[Prediction]] = {"epsilon": Noise, "v_prediction": Angular, "sample": Data}
SCHEDULES: dict[str, Callable[[int, float, float, bool], Discrete]] = {
    "linear": Discrete.linear,
    "scaled_linear": Discrete.scaled_linear,
    "squaredcos_cap_v2": lambda n, start, end, zero: Discrete.squaredcos_cap_v2(n, zero),
}


def form(scheduler: Path) -> tuple[Interpolant, Prediction, Clock]:
    """Return the form in which a scheduler's network was trained: interpolant, prediction, and the clock that it reads.

    Args:
        scheduler: a scheduler's folder, of a chain of noising steps (DDPM, DDIM, DPM-Solver, ...) or of flow matching.

    Raises:
        ValueError: its form is none of these.
    """
    import diffusers

    try:
        name = json.loads((scheduler / "scheduler_config.json").read_bytes())["_class_name"]
        told: dict[str, Any] = dict(getattr(diffusers, name).from_pretrained(scheduler).config)  # complete with its defaults
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{scheduler}: not a readable scheduler's folder ({error})") from None
    n, row, schedule = told.get("num_train_timesteps", 0), told.get("prediction_type", ""), told.get("beta_schedule", "")
    if name.startswith("FlowMatch") or row == "flow_prediction":
        return Linear(), Velocity(), Scaled(float(n))
    zero, betas = bool(told.get("rescale_betas_zero_snr")), told.get("trained_betas")
    if row not in ROWS or (betas is None and schedule not in SCHEDULES):
        what = f"{name} with prediction_type {row} and beta_schedule {schedule}"
        raise ValueError(f"{scheduler}: is a {what}, of which no interpolant and prediction are known here")
    chain = SCHEDULES[schedule](n, told["beta_start"], told["beta_end"], zero) if betas is None else Discrete(list(betas), zero)
    return chain, ROWS[row](), Index(n)


def network(folder: Path) -> Path:
    """Return the folder of a pipeline's network."""
    try:
        parts = json.loads((folder / INDEX).read_bytes())
        kinds = {name: part[1] for name, part in parts.items() if isinstance(part, list) and len(part) == 2}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX}: not a readable index of a pipeline ({error})") from None
    for name, kind in kinds.items():
        if kind in KINDS:
            return folder / Path(name).name
    raise ValueError(
        f"{folder}: is a {parts.get('_class_name')} without a {' or '.join(KINDS)}; these are the networks known here"
    )


def pretrained(folder: str, lora: int = 0) -> Denoiser:
    """Return the denoiser of a pipeline of diffusers, in its own form: what a student of it is, too.

    Args:
        folder: the pipeline's folder, with a UNet2DModel or a DiTTransformer2DModel, and a scheduler.
        lora: rank of adapters, which alone are trained; 0 trains all.
    """
    interpolant, prediction, clock = form(Path(folder) / "scheduler")
    return Denoiser(Pretrained(str(network(Path(folder))), lora), interpolant, prediction, clock)


def load(folder: Path) -> tuple[Denoiser, Codec, Condition]:
    """Return (denoiser, codec, condition) of a pipeline's folder."""
    denoiser = pretrained(str(folder))
    codec = codecs.load(folder / "vae" if (folder / "vae").is_dir() else None)
    classes: int = denoiser.net.classes  # type: ignore[assignment]
    return denoiser.eval().requires_grad_(False), codec, ClassLabel(classes) if classes else Unconditional()
