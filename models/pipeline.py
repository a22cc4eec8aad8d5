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
from models.nets.pretrained import KINDS, TOLD, Pretrained
from models.prediction import Angular, Data, Noise, Prediction, Velocity
from models.text import ENCODE, INDEX, Prompts
from models.text import kind as telling

SIDE = 128  # of the states of Flux, whose config does not say it; diffusers' own
APART = ("safety_checker", "feature_extractor")  # parts that look at finished images, which are not trained
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
    except Exception as error:  # diffusers and torch each raise kinds of their own
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{scheduler}: not a readable scheduler's folder ({why})") from None
    n, row, schedule = told.get("num_train_timesteps", 0), told.get("prediction_type", ""), told.get("beta_schedule", "")
    if name.startswith("FlowMatch") or row == "flow_prediction":
        return Linear(), Velocity(), Scaled(float(n))
    zero, betas = bool(told.get("rescale_betas_zero_snr")), told.get("trained_betas")
    if row not in ROWS or (betas is None and schedule not in SCHEDULES):
        what = f"{name} with prediction_type {row} and beta_schedule {schedule}"
        raise ValueError(f"{scheduler}: is a {what}, of which no interpolant and prediction are known here")
    chain = SCHEDULES[schedule](n, told["beta_start"], told["beta_end"], zero) if betas is None else Discrete(list(betas), zero)
    return chain, ROWS[row](), Index(n)


def components(folder: Path) -> tuple[Path, Path | None]:
    """Return the folders of a pipeline's network and of its AutoencoderKL, or None where its data are pixels.

    Raises:
        ValueError: it has other parts, whose work would be left out.
    """
    try:
        parts = json.loads((folder / INDEX).read_bytes())
        kinds = {name: part[1] for name, part in parts.items() if isinstance(part, list) and len(part) == 2 and part[1]}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX}: not a readable index of a pipeline ({error})") from None
    networks = [name for name, kind in kinds.items() if kind in KINDS]
    others = {name: kind for name, kind in kinds.items() if name not in ("scheduler", *networks, *APART)}
    texts = telling(folder)[1]
    strange = [part for part, kind in others.items() if part not in texts and kind != "AutoencoderKL"]
    if len(networks) != 1 or strange or bool(texts) != (kinds[networks[0]] in TOLD):
        what = f"a {parts.get('_class_name')} of {', '.join(map(str, kinds.values()))}"
        raise ValueError(
            f"{folder}: is {what}; known here are a {' or '.join(KINDS)}, a scheduler, an AutoencoderKL or none, and what "
            f"encodes the texts of a {', '.join(ENCODE)}"
        )
    codec = next((folder / Path(name).name for name, kind in kinds.items() if kind == "AutoencoderKL"), None)
    return folder / Path(networks[0]).name, codec


def pretrained(folder: str, lora: int = 0) -> Denoiser:
    """Return the denoiser of a pipeline of diffusers, in its own form: what a student of it is, too.

    Args:
        folder: the pipeline's folder, with a scheduler and a UNet2DModel or DiTTransformer2DModel, or of Stable Diffusion 1, 2,
            XL or 3, Flux or PixArt, with the encoders of the texts that its network is told.
        lora: rank of adapters, which alone are trained; 0 trains all.
    """
    interpolant, prediction, clock = form(Path(folder) / "scheduler")
    network, codec = components(Path(folder))
    if not telling(Path(folder))[0]:
        return Denoiser(Pretrained(str(network), lora), interpolant, prediction, clock)
    texts = Prompts(folder)
    nothing = texts.empty
    flux = telling(Path(folder))[0] == "FluxPipeline"
    size = {"side": SIDE} if flux else {"pixels": pixels(network, codec)}
    net = Pretrained(str(network), lora, len(nothing), **size)
    for here, there, what in ((nothing.shape[1], net.nothing.shape[1], "texts"), (texts.pooled, net.pooled, "whole texts")):
        if here != there:
            raise ValueError(f"{folder}: its {what} have {here} channels, its network reads {there}")
    net.nothing.copy_(nothing)
    return Denoiser(net, interpolant, prediction, clock)


def pixels(network: Path, codec: Path | None) -> int:
    """Return the height and width of a pipeline's images, from its network's and its autoencoder's folder."""
    try:
        size = json.loads((network / "config.json").read_bytes())["sample_size"]
        halves = json.loads((codec / "config.json").read_bytes())["block_out_channels"] if codec else [0]
        return size * 2 ** (len(halves) - 1)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{network.parent}: no sizes in the configs of its network and autoencoder ({error!r})") from None


def load(folder: Path) -> tuple[Denoiser, Codec, Condition]:
    """Return (denoiser, codec, condition) of a pipeline's folder."""
    denoiser = pretrained(str(folder))
    codec = codecs.load(components(folder)[1])
    net = denoiser.eval().requires_grad_(False).net
    assert isinstance(net, Pretrained)
    condition = Prompts(str(folder)) if net.tokens else ClassLabel(net.classes) if net.classes else Unconditional()
    return denoiser, codec, condition
