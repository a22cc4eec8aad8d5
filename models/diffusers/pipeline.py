"""Pipelines of diffusers: models loaded from their folders, and pipelines built from our models."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.codec import KL, Codec, load_codec
from models.condition import ClassLabel, Condition, Unconditional
from models.denoiser import Denoiser
from models.diffusers.architectures import ARCHITECTURES, TEXT_ARCHITECTURES
from models.diffusers.networks import Pretrained
from models.diffusers.scheduler import (
    PREDICTIONS,
    chain_scheduler,
    flow_scheduler,
    read_scheduler,
)
from models.diffusers.text import INDEX, TEXT_PIPELINES, Prompts, find_text_encoders
from models.interpolant import Discrete, Linear
from models.prediction import Velocity

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline  # slow to import

    from models.checkpoint import LoadedModel

FLUX_SIDE = 128  # height and width of Flux's states, which no config contains; diffusers' default
# Parts that check finished images, which training does not need.
IGNORED_PARTS = ("safety_checker", "feature_extractor")


class Components(NamedTuple):
    """Folders of the parts of a pipeline."""

    network: Path
    codec: Path | None  # None: the data are pixels


def find_components(folder: Path) -> Components:
    """Return the folders of a pipeline's network and AutoencoderKL.

    Raises:
        ValueError: it has other parts, whose work would be omitted.
    """
    pipeline, kinds = _read_index(folder)
    networks = []
    codecs = []
    others = []
    encoders = find_text_encoders(folder).parts
    for name, kind in kinds.items():
        if kind in ARCHITECTURES:
            networks.append(name)
        elif kind == "AutoencoderKL":
            codecs.append(name)
        elif name not in ("scheduler", *IGNORED_PARTS, *encoders):
            others.append(name)
    matches = len(networks) == 1 and bool(encoders) == (kinds[networks[0]] in TEXT_ARCHITECTURES)
    if others or not matches:
        raise ValueError(
            f"{folder}: is a {pipeline} of {', '.join(kinds.values())}; supported are a "
            f"{' or '.join(ARCHITECTURES)}, a scheduler, an AutoencoderKL or none, and the text "
            f"encoders of a {', '.join(TEXT_PIPELINES)}"
        )
    codec = folder / Path(codecs[0]).name if codecs else None
    return Components(folder / Path(networks[0]).name, codec)


def _read_index(folder: Path) -> tuple[Any, dict[str, str]]:
    """Return the class of a pipeline, and the classes of its parts by name."""
    kinds = {}
    try:
        index = json.loads((folder / INDEX).read_bytes())
        for name, part in index.items():
            if isinstance(part, list) and len(part) == 2 and part[1]:
                kinds[name] = str(part[1])
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / INDEX}: not a readable index of a pipeline ({error})"
        ) from None
    return index.get("_class_name"), kinds


def pretrained(folder: str, lora: int = 0) -> Denoiser:
    """Return the denoiser of a diffusers pipeline, with its own interpolant and prediction.

    A student of it is such a denoiser, too.

    Args:
        folder: the pipeline's folder, with a scheduler and a UNet2DModel or DiTTransformer2DModel;
            or of Stable Diffusion 1, 2, XL or 3, Flux or PixArt, with their text encoders.
        lora: rank of adapters, which alone are trained; 0 trains all weights.
    """
    interpolant, prediction, time_input = read_scheduler(Path(folder) / "scheduler")
    network, codec = find_components(Path(folder))
    pipeline = find_text_encoders(Path(folder)).pipeline
    if not pipeline:
        net = Pretrained(str(network), lora)
        return Denoiser(net, interpolant, prediction, time_input)
    # a network with texts
    prompts = Prompts(folder)
    tokens, channels = prompts.empty.shape
    if pipeline == "FluxPipeline":
        net = Pretrained(str(network), lora, tokens, side=FLUX_SIDE)
    else:
        net = Pretrained(str(network), lora, tokens, pixels=_image_size(network, codec))
    _check_channels(folder, "texts", channels, net.empty_text.shape[1])
    _check_channels(folder, "pooled texts", prompts.pooled, net.pooled)
    net.empty_text.copy_(prompts.empty)
    return Denoiser(net, interpolant, prediction, time_input)


def _check_channels(folder: str, name: str, encoded: int, expected: int) -> None:
    """Check that a pipeline's text encoders fit its network."""
    if encoded != expected:
        raise ValueError(
            f"{folder}: its {name} have {encoded} channels, its network takes {expected}"
        )


def _image_size(network: Path, codec: Path | None) -> int:
    """Return the height and width of a pipeline's images, from two configs."""
    try:
        size = json.loads((network / "config.json").read_bytes())["sample_size"]
        if codec is None:
            return size
        blocks = json.loads((codec / "config.json").read_bytes())["block_out_channels"]
        return size * 2 ** (len(blocks) - 1)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{network.parent}: no sizes in the configs of its network and autoencoder ({error!r})"
        ) from None


def load_pipeline(folder: Path) -> "LoadedModel":
    """Load the denoiser, codec and condition of a pipeline's folder."""
    from models.checkpoint import LoadedModel  # which loads pipelines, too

    denoiser = pretrained(str(folder)).eval().requires_grad_(False)
    codec = load_codec(find_components(folder).codec)
    net = denoiser.net
    assert isinstance(net, Pretrained)
    condition: Condition = Unconditional()
    if net.tokens:
        condition = Prompts(str(folder))
    elif net.classes:
        condition = ClassLabel(net.classes)
    return LoadedModel(denoiser, codec, condition)


def to_diffusers_vae(codec: KL) -> "AutoencoderKL":
    """Return a codec's autoencoder with a config that does not contain where it was read from."""
    from diffusers import AutoencoderKL

    config = {}
    for key, value in codec.vae.config.items():
        if not key.startswith("_"):
            config[key] = value
    vae = AutoencoderKL.from_config(config)
    vae.load_state_dict(codec.vae.state_dict())
    return vae


def to_diffusers_pipeline(
    denoiser: Denoiser, codec: Codec, condition: Condition
) -> "DiffusionPipeline":
    """Return the diffusers pipeline of a denoiser whose network is `Pretrained`.

    Raises:
        ValueError: diffusers has none for its interpolant, prediction, codec and classes.
    """
    from diffusers import DDIMPipeline, DiTPipeline

    net = denoiser.net
    assert isinstance(net, Pretrained)
    predictions = tuple(PREDICTIONS.values())
    is_chain = isinstance(denoiser.interpolant, Discrete) and isinstance(
        denoiser.prediction, predictions
    )
    is_flow = isinstance(denoiser.interpolant, Linear) and isinstance(denoiser.prediction, Velocity)
    has_vae = isinstance(codec, KL)
    # pixels, without classes
    if net.kind == "UNet2DModel" and is_chain and not net.classes and not has_vae:
        return DDIMPipeline(net.merged(), chain_scheduler(denoiser))
    if isinstance(codec, KL) and (is_chain or is_flow):
        # texts
        if isinstance(condition, Prompts):
            return _to_text_pipeline(denoiser, codec, condition, is_chain)
        # classes
        if net.kind == "DiTTransformer2DModel":
            scheduler = chain_scheduler(denoiser) if is_chain else flow_scheduler()
            return DiTPipeline(net.merged(), to_diffusers_vae(codec), scheduler)
    raise ValueError(
        f"diffusers has no pipeline for a {net.kind} of {net.classes} classes with "
        f"{denoiser.interpolant!r}, {denoiser.prediction!r} and codec {type(codec).__name__}; "
        "`rectify consolidate` writes its weights as one file"
    )


def _to_text_pipeline(
    denoiser: Denoiser, codec: KL, condition: Prompts, is_chain: bool
) -> "DiffusionPipeline":
    """Return a pipeline with texts: that of the text encoders, with our network and codec."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipe = copy.copy(condition.pipe)
    scheduler: Any = flow_scheduler()
    if is_chain:
        scheduler = chain_scheduler(denoiser)
    elif isinstance(pipe, FluxPipeline):
        scheduler = FlowMatchEulerDiscreteScheduler()  # Flux passes it equal steps
    assert isinstance(denoiser.net, Pretrained)
    name = "unet" if "unet" in pipe.components else "transformer"
    network = {name: denoiser.net.merged()}
    pipe.register_modules(**network, vae=to_diffusers_vae(codec), scheduler=scheduler)
    return pipe
