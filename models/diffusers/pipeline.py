"""Pipelines of diffusers: models loaded from their folders, and pipelines built from our models."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.files import canonical, digest
from models.codec import KL, Codec, LatentCodec, load_codec
from models.condition import ClassLabel, Condition, Unconditional
from models.denoiser import Denoiser
from models.diffusers.architectures import ARCHITECTURES, TEXT_ARCHITECTURES
from models.diffusers.networks import Pretrained
from models.diffusers.parts import (
    FORMER_NETWORK,
    check_class,
    part_digest,
    read_config,
    update_config,
)
from models.diffusers.scheduler import (
    PREDICTIONS,
    chain_scheduler,
    euler_scheduler,
    flow_scheduler,
    read_scheduler,
)
from models.diffusers.text import (
    CHECKERS,
    ENCODER_PARTS,
    INDEX,
    TEXT_PIPELINES,
    Prompts,
    copy_untrained,
    find_text_encoders,
)
from models.interpolant import Discrete, Linear
from models.prediction import Velocity

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline  # slow to import

    from models.checkpoint import LoadedModel

# Statistics of a VAE's latents beside their scale, and the pipelines that apply them; the others
# ignore them.
STATISTICS = ("shift_factor", "latents_mean", "latents_std")
APPLIED_STATISTICS = {
    "StableDiffusion3Pipeline": ("shift_factor",),
    "FluxPipeline": ("shift_factor",),
    "StableDiffusionXLPipeline": ("latents_mean", "latents_std"),
}
LATENT_ARCHITECTURES = (*TEXT_ARCHITECTURES, "DiTTransformer2DModel")  # never without a VAE
IMAGE_CHANNELS = (1, 3)
FLUX_SIDE = 128  # height and width of Flux's states, which no config contains; diffusers' default


class Components(NamedTuple):
    """Folders of the parts of a pipeline."""

    network: Path
    codec: Path | None  # None: the data are pixels


def find_components(folder: Path) -> Components:
    """Return the folders of a pipeline's network and AutoencoderKL.

    Raises:
        ValueError: it has other parts, whose work would be omitted, or lacks one.
    """
    pipeline, kinds, absent = _read_index(folder)
    networks = []
    codecs = []
    encoders = find_text_encoders(folder).parts
    supported = f"supported are a {' or '.join(ARCHITECTURES)}, a scheduler and an AutoencoderKL"
    for name, kind in kinds.items():
        if kind == FORMER_NETWORK:
            config = read_config(folder / Path(name).name / "config.json")
            kinds[name] = kind = update_config(config)["_class_name"]
        if kind in ARCHITECTURES:
            networks.append(name)
        elif kind == "AutoencoderKL":
            codecs.append(name)
        elif name.startswith(ENCODER_PARTS) and not encoders:
            raise ValueError(
                f"{folder}: is a {pipeline} with {name}, a {kind}; supported with texts are "
                f"{', '.join(TEXT_PIPELINES)}"
            )
        elif name not in ("scheduler", *CHECKERS, *encoders):
            raise ValueError(
                f"{folder}: is a {pipeline} with {name}, a {kind}, which is not supported; "
                f"{supported}"
            )
    # one network, of the pipeline's kind
    if len(networks) != 1 or len(codecs) > 1:
        parts = ", ".join([*networks, *codecs]) or "no network"
        raise ValueError(f"{folder}: is a {pipeline} with {parts}; it must have one network")
    kind = kinds[networks[0]]
    if bool(encoders) != (kind in TEXT_ARCHITECTURES):
        texts = "texts" if encoders else "no texts"
        raise ValueError(f"{folder}: is a {pipeline} with {texts} and the network {kind}")
    # nothing of it is left out
    needed = ["scheduler"]
    if "vae" in absent or kind in LATENT_ARCHITECTURES:
        needed.append("vae")
    for name in needed:
        if name not in (*kinds, *codecs):
            raise ValueError(
                f"{folder / INDEX}: a {pipeline} with a {kind} needs a {name}, and it lists none; "
                "use the folder of a complete pipeline"
            )
    # each is what the index states
    for name, kind in kinds.items():
        if name not in CHECKERS:
            check_class(folder / Path(name).name, kind)
    codec = folder / Path(codecs[0]).name if codecs else None
    return Components(folder / Path(networks[0]).name, codec)


class Index(NamedTuple):
    """What a pipeline's index states."""

    pipeline: Any  # the pipeline's class
    kinds: dict[str, str]  # classes of its parts, by name
    absent: list[str]  # names of parts that it does without


def _read_index(folder: Path) -> Index:
    """Return what a pipeline's index states."""
    kinds = {}
    absent = []
    try:
        index = json.loads((folder / INDEX).read_bytes())
        for name, part in index.items():
            if not (isinstance(part, list) and len(part) == 2):
                continue
            if part[1]:
                kinds[name] = str(part[1])
            else:
                absent.append(name)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / INDEX}: not a readable index of a pipeline ({error})"
        ) from None
    return Index(index.get("_class_name"), kinds, absent)


def pretrained(folder: str, lora: int = 0) -> Denoiser:
    """Return the denoiser of a diffusers pipeline, with its own interpolant and prediction.

    A student of it is such a denoiser, too.

    Args:
        folder: the pipeline's folder, with a scheduler and a UNet2DModel or DiTTransformer2DModel;
            or of Stable Diffusion 1, 2, XL or 3, Flux or PixArt, with their text encoders.
        lora: rank of adapters, which alone are trained; 0 trains all weights.
    """
    network, codec = find_components(Path(folder))
    pipeline = find_text_encoders(Path(folder)).pipeline
    scheduler = Path(folder) / "scheduler"
    interpolant, prediction, time_input = read_scheduler(scheduler, pipeline)
    if codec:
        _check_applied_statistics(codec, pipeline)
    if not pipeline:
        net = Pretrained(str(network), lora)
        _check_latents(folder, net, codec)
        return Denoiser(net, interpolant, prediction, time_input)
    # a network with texts
    assert codec is not None
    _check_former_size(network, pipeline)
    prompts = Prompts(folder)
    tokens, channels = prompts.empty.shape
    if pipeline == "FluxPipeline":
        net = Pretrained(str(network), lora, tokens, side=FLUX_SIDE)
    else:
        net = Pretrained(str(network), lora, tokens, pixels=_image_size(network, codec))
    _check_latents(folder, net, codec)
    _check_channels(folder, "texts", channels, net.empty_text.shape[1])
    _check_channels(folder, "pooled texts", prompts.pooled, net.pooled)
    net.empty_text.copy_(prompts.empty)
    return Denoiser(net, interpolant, prediction, time_input)


def _check_former_size(network: Path, pipeline: str) -> None:
    """Check that a pipeline reads its network's sample_size, which it changes in old configs."""
    path = network / "config.json"
    config = read_config(path)
    version = str(config.get("_diffusers_version", "")).split(".")
    is_old = len(version) > 1 and version[0] == "0" and version[1].isdigit() and int(version[1]) < 9
    size = config.get("sample_size")
    if pipeline == "StableDiffusionPipeline" and is_old and isinstance(size, int) and size < 64:
        raise ValueError(
            f"{path}: sample_size is {size}, of a diffusers before 0.9, which a {pipeline} of "
            "today reads as 64; set it to the size of the latents, 64 for images of 512 pixels, "
            "and remove _diffusers_version"
        )


def _check_latents(folder: str, net: Pretrained, codec: Path | None) -> None:
    """Check that a pipeline's autoencoder, or images, have the channels of its network."""
    if codec:
        encoded = read_config(codec / "config.json").get("latent_channels", 4)
        _check_channels(folder, "latents", encoded, net.channels)
    elif net.channels not in IMAGE_CHANNELS:
        raise ValueError(
            f"{folder}: its network takes {net.channels} channels, and no vae is listed in its "
            f"{INDEX}; images have 1 or 3"
        )


def _check_applied_statistics(codec: Path, pipeline: str) -> None:
    """Check that a codec has only those statistics of latents that its pipeline applies.

    Raises:
        ValueError: it has others, which we would apply and the pipeline does not.
    """
    config = read_config(codec / "config.json")
    key = find_ignored_statistic(config, pipeline)
    if key:
        raise ValueError(
            f"{codec / 'config.json'}: {key} is {config[key]}, which is not supported in a "
            f"{pipeline or 'pipeline without texts'}; set it to null if the network was "
            "trained without it"
        )


def find_ignored_statistic(config: Mapping[str, Any], pipeline: str) -> str:
    """Return the first statistic of a codec's latents that a pipeline ignores, "" if there is none.

    Args:
        config: of the codec.
        pipeline: the pipeline's class.
    """
    applied = APPLIED_STATISTICS.get(pipeline, ())
    for key in STATISTICS:
        if config.get(key) and key not in applied:
            return key
    return ""


def _check_channels(folder: str, name: str, encoded: int, expected: int) -> None:
    """Check that a pipeline's text encoders fit its network."""
    if encoded != expected:
        raise ValueError(
            f"{folder}: its {name} have {encoded} channels, its network takes {expected}"
        )


def _image_size(network: Path, codec: Path) -> int:
    """Return the height and width of a pipeline's images, from two configs."""
    try:
        size = json.loads((network / "config.json").read_bytes())["sample_size"]
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


def part_digests(codec: Codec, condition: Condition, folder: str | Path | None) -> dict[str, str]:
    """Return the digests of a model's parts besides its network, by name.

    They are those of its text encoders and tokenizers, of the scheduler of a pipeline's folder, and
    then of its autoencoder. Other models have none.

    Args:
        codec: the model's.
        condition: the model's.
        folder: where it was loaded from.
    """
    digests: dict[str, str] = {}
    if isinstance(condition, Prompts):
        digests |= condition.parts
    if folder and (Path(folder) / INDEX).is_file():
        digests["scheduler"] = part_digest(Path(folder) / "scheduler")
    if digests and isinstance(codec, LatentCodec):
        digests["vae"] = codec_digest(codec)
    return digests


def codec_digest(codec: LatentCodec) -> str:
    """Return the digest of what identifies a codec."""
    return digest(canonical(codec.identity()))


def check_pipeline_codec(codec: LatentCodec, pipeline: str) -> None:
    """Check that a pipeline decodes latents as their codec does.

    Args:
        codec: the codec.
        pipeline: the pipeline's class.

    Raises:
        ValueError: it decodes with another autoencoder, or ignores statistics of the latents.
    """
    if not isinstance(codec, KL):
        raise ValueError(
            f"{codec.path}/config.json: _class_name is {codec.architecture}, a {pipeline} decodes "
            f"with an {KL.architecture}; train in the latents of one, or use `rectify consolidate`"
        )
    key = find_ignored_statistic(codec.vae.config, pipeline)
    if key:
        raise ValueError(
            f"{codec.path}/config.json: {key} is {codec.vae.config[key]!s:.60}, which a "
            f"{pipeline} ignores; train in latents of `rectify encode --scale measured`, or use "
            "`rectify consolidate`"
        )


def to_diffusers_vae(codec: LatentCodec, pipeline: str) -> "AutoencoderKL":
    """Return a codec's autoencoder with a config that does not contain where it was read from.

    Args:
        codec: the codec.
        pipeline: class of the pipeline that decodes with it.

    Raises:
        ValueError: the pipeline decodes otherwise.
    """
    from diffusers import AutoencoderKL

    check_pipeline_codec(codec, pipeline)
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
    from diffusers import DDPMPipeline, DiTPipeline

    net = denoiser.net
    assert isinstance(net, Pretrained)
    predictions = tuple(PREDICTIONS.values())
    is_chain = isinstance(denoiser.interpolant, Discrete) and isinstance(
        denoiser.prediction, predictions
    )
    is_flow = isinstance(denoiser.interpolant, Linear) and isinstance(denoiser.prediction, Velocity)
    has_vae = isinstance(codec, LatentCodec)
    # pixels, without classes
    if net.kind == "UNet2DModel" and is_chain and not net.classes and not has_vae:
        # DDIMPipeline would replace the scheduler by diffusers' DDIM.
        return DDPMPipeline(net.merged(), chain_scheduler(denoiser))
    if isinstance(codec, LatentCodec) and (is_chain or is_flow):
        # texts
        if isinstance(condition, Prompts):
            return _to_text_pipeline(denoiser, codec, condition, is_chain)
        # classes
        if net.kind == "DiTTransformer2DModel":
            scheduler = chain_scheduler(denoiser) if is_chain else flow_scheduler()
            vae = to_diffusers_vae(codec, "DiTPipeline")
            return DiTPipeline(net.merged(), vae, scheduler)
    raise ValueError(
        f"diffusers has no pipeline for a {net.kind} of {net.classes} classes with "
        f"{denoiser.interpolant!r}, {denoiser.prediction!r} and codec {type(codec).__name__}; "
        "`rectify consolidate` writes its weights as one file"
    )


def save_pipeline(
    pipe: "DiffusionPipeline",
    condition: Condition,
    folder: Path,
    labels: dict[str, str] | None = None,
) -> None:
    """Write a pipeline into a folder; byte for byte what training leaves of its teacher.

    Args:
        pipe: the pipeline.
        condition: of its network; its folder has the text encoders.
        folder: where to write it.
        labels: names of the classes by number, if they have any.
    """
    added: dict[str, Any] = {}
    if isinstance(condition, Prompts):
        source = Path(condition.encoder)
        added = copy_untrained(source, folder)
        if "safety_checker" in added:
            index = json.loads((source / INDEX).read_bytes())
            added["requires_safety_checker"] = index.get("requires_safety_checker", True)
    if labels:
        added["id2label"] = labels
    for name, part in pipe.components.items():
        if part is not None and name not in added:
            part.save_pretrained(folder / name)
    pipe.save_config(folder)

    # The index, without the folder that the text encoders were read from.
    index = json.loads((folder / INDEX).read_bytes())
    index.pop("_name_or_path", None)
    (folder / INDEX).write_text(json.dumps({**index, **added}, indent=2) + "\n")


def _to_text_pipeline(
    denoiser: Denoiser, codec: LatentCodec, condition: Prompts, is_chain: bool
) -> "DiffusionPipeline":
    """Return a pipeline with texts: that of the text encoders, with our network and codec."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, PixArtAlphaPipeline

    pipe = copy.copy(condition.pipe)
    scheduler: Any = flow_scheduler()
    if isinstance(pipe, PixArtAlphaPipeline):
        if not is_chain:
            raise ValueError(
                "PixArtAlphaPipeline samples flows in no single step; `rectify consolidate` writes "
                "the weights as one file"
            )
        scheduler = euler_scheduler(denoiser)
    elif is_chain:
        scheduler = chain_scheduler(denoiser)
    elif isinstance(pipe, FluxPipeline):
        scheduler = FlowMatchEulerDiscreteScheduler()  # Flux passes it equal steps
    assert isinstance(denoiser.net, Pretrained)
    name = "unet" if "unet" in pipe.components else "transformer"
    network = {name: denoiser.net.merged()}
    vae = to_diffusers_vae(codec, type(pipe).__name__)
    pipe.register_modules(**network, vae=vae, scheduler=scheduler)
    return pipe
