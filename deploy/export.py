"""Export: a run as a diffusers folder that plain `DiffusionPipeline.from_pretrained` loads."""

import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import yaml
from diffusers import DiffusionPipeline, DiTPipeline, EulerDiscreteScheduler
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from data.files import atomic_folder, checksummed_json, errors_named, read_json
from models.checkpoint import LoadedModel, fingerprint, load_checkpoint, newest_checkpoint
from models.codec import LatentCodec
from models.condition import ClassLabel
from models.denoiser import Denoiser
from models.diffusers.dit import NO_CLASS, to_diffusers_dit
from models.diffusers.networks import LORA_LAYER, LORA_TARGETS, Pretrained
from models.diffusers.parts import part_digest, read_config
from models.diffusers.pipeline import (
    check_pipeline_codec,
    codec_digest,
    part_digests,
    save_pipeline,
    to_diffusers_pipeline,
    to_diffusers_vae,
)
from models.diffusers.scheduler import flow_scheduler, on_scheduler_grid
from models.diffusers.text import INDEX, Prompts, find_checkers
from models.interpolant import Linear
from models.nets.dit import DiT
from models.prediction import Velocity
from models.sampler import DDIM

log = logging.getLogger(__name__)
# Step counts at which images are compared, besides the recommended one.
DIT_STEPS = (1, 2, 3, 4, 8, 32)
PRETRAINED_STEPS = (1, 2, 4, 8)
TEST_PROMPTS = ["a red bird", "two houses by the sea", "", "zebra"]
TOLERANCE = 1e-4  # of images in [0, 1]
# Files of adapters: those that peft and diffusers look for.
PEFT_WEIGHTS = "adapter_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
# Where the cache of the hub keeps ORG/NAME, such a name itself, and the header of a card.
HUB_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HEADER = re.compile(r"---\n(.*?)\n---", re.S)
# PixArt would resize images and clean texts.
PLAIN_OPTIONS = ("use_resolution_binning", "clean_caption")
# What changes finished images is left out of the comparison.
UNCOMPARED = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}


def export(run: Path, out: Path, steps: int = 4) -> None:
    """Write a run's EMA weights as a diffusers folder, if its images equal those of our sampler.

    A student of a diffusers network becomes a pipeline of its teacher's kind. Its adapters are
    merged into the network, and also written alone into OUT/lora, for diffusers and peft.

    Args:
        run: run folder or checkpoint: of a DiT with Linear and Velocity, in latents, or of a
            `Pretrained` network.
        out: the folder to write; an export in it is kept if it is of the same weights, parts and
            steps, and else replaced as a whole.
        steps: recommended number of steps, for the model card.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    # Load the model, and what is known of its teacher, which is not to be replaced.
    disable_progress_bar()
    model = load_checkpoint(run)
    check_exportable(run, model)
    origin = Origin("")
    if isinstance(model.denoiser.net, Pretrained):
        origin = read_origin(run)
    for source in (run, Path(origin.teacher or run)):
        if out.resolve() == source.resolve():
            raise ValueError(f"{out}: it is what is exported, or its teacher; choose another --out")
    # Keep a finished export of the same inputs.
    inputs = {
        "denoiser": fingerprint(model.denoiser),
        "parts": digest_parts(run, model),
        "steps": steps,
    }
    if _is_finished(out, inputs):
        log.info("%s is finished", out)
        return
    # Write it, and compare its images with ours.
    with atomic_folder(out) as folder:
        write_pipeline(folder, model, origin.labels)
        gaps = compare_images(folder, model, steps)
        for n, gap in gaps.items():
            if not gap.same_grid <= gap.allowed:
                raise ValueError(
                    f"{run}: the exported folder's images differ from ours by {gap.same_grid:.2g} "
                    f"in {n} steps, more than {gap.allowed:.2g}; nothing was written"
                )
        # The model card, and a record of this export.
        worst = max(gap.same_grid for gap in gaps.values())
        native = max(gap.native_grid for gap in gaps.values())
        card = model_card(out.resolve().name, folder, origin, steps, model, worst, native)
        (folder / "README.md").write_text(card)
        recorded = {}
        for n, gap in gaps.items():
            recorded[str(n)] = {"same_grid": gap.same_grid, "native_grid": gap.native_grid}
        record = {"format": 1, **inputs, "max_abs_diff": worst, "gaps": recorded}
        (folder / "export.json").write_bytes(checksummed_json(record))


def digest_parts(run: Path, model: LoadedModel) -> dict[str, str]:
    """Return the digests of all that an export has beside the network, by name."""
    digests = part_digests(model.codec, model.condition, run)
    if isinstance(model.codec, LatentCodec):
        digests["vae"] = codec_digest(model.codec)
    if isinstance(model.condition, Prompts):
        folder = Path(model.condition.encoder)
        for name in find_checkers(folder):
            digests[name] = part_digest(folder / name)
    return digests


def _is_finished(out: Path, inputs: dict[str, Any]) -> bool:
    """Whether a folder is an export of the same inputs already; what differs is reported.

    Raises:
        ValueError: it is something else, which must not be replaced.
    """
    path = out / "export.json"
    if path.exists():
        try:
            record = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path}: damaged; delete {out}, and it is made again") from error
        changed = [key for key in ("denoiser", "steps") if record.get(key) != inputs[key]]
        before = record.get("parts", {})
        parts = inputs["parts"]
        changed += [key for key in sorted({*before, *parts}) if before.get(key) != parts.get(key)]
        if changed:
            log.info("%s: not the recorded %s; it is made again", out, ", ".join(changed))
        return not changed
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out}: it exists and is not an export; choose another --out")
    return False


def check_exportable(run: Path, model: LoadedModel) -> None:
    """Check that diffusers has a pipeline for a model."""
    denoiser = model.denoiser
    if isinstance(denoiser.net, Pretrained):
        return  # `to_diffusers_pipeline` checks the rest
    interpolant = denoiser.interpolant
    is_linear = isinstance(interpolant, Linear) and interpolant.sigma_min == 0
    if not (is_linear and isinstance(denoiser.prediction, Velocity)):
        raise ValueError(
            f"{run}: it was trained with {interpolant!r} and {denoiser.prediction!r}; "
            "export needs Linear() and Velocity()"
        )
    if not (isinstance(model.codec, LatentCodec) and isinstance(denoiser.net, DiT)):
        raise ValueError(
            f"{run}: its network is a {type(denoiser.net).__name__} with codec "
            f"{type(model.codec).__name__}; export needs a DiT in the latents of an AutoencoderKL"
        )
    check_pipeline_codec(model.codec, DiTPipeline.__name__)


def write_pipeline(folder: Path, model: LoadedModel, labels: dict[str, str] | None = None) -> None:
    """Write a model as a diffusers pipeline.

    Args:
        folder: where.
        model: the model.
        labels: names of a teacher's classes by number, if they have any.
    """
    denoiser, codec, condition = model
    net = denoiser.net
    if isinstance(net, Pretrained):
        pipe = to_diffusers_pipeline(denoiser, codec, condition)
        save_pipeline(pipe, condition, folder, labels)
        if net.lora:
            write_adapters(folder / "lora", net)
        return
    assert isinstance(net, DiT) and isinstance(codec, LatentCodec)
    vae = to_diffusers_vae(codec, DiTPipeline.__name__)
    DiTPipeline(to_diffusers_dit(net), vae, flow_scheduler()).save_pretrained(folder)


def write_adapters(folder: Path, net: Pretrained) -> None:
    """Write a network's adapters alone: for its teacher, or a fine-tune of it.

    The folder is peft's, and has the same adapters as a file of diffusers' `load_lora_weights`.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    config = LoraConfig(r=net.lora, lora_alpha=net.lora, target_modules=LORA_TARGETS)
    config.save_pretrained(str(folder))
    adapters = {}
    for key, value in net.model.state_dict().items():
        if LORA_LAYER in key:
            adapters[key.replace(".default.", ".")] = value.contiguous()
    for file, prefix in ((PEFT_WEIGHTS, "base_model.model"), (LORA_WEIGHTS, component(net))):
        named = {f"{prefix}.{key}": value for key, value in adapters.items()}
        save_file(named, folder / file, {"format": "pt"})


def component(net: Pretrained) -> str:
    """Return the name of a network in its pipeline."""
    return "unet" if net.kind.startswith("UNet") else "transformer"


class Request(NamedTuple):
    """The samples on which a pipeline and our sampler are compared."""

    arguments: dict[str, Any]  # of the pipeline
    samples: int
    cond: Tensor | None  # of our denoiser


def _make_request(pipe: DiffusionPipeline, model: LoadedModel) -> Request:
    """Return which samples are compared: with every class, or with test prompts."""
    condition = model.condition
    parameters = inspect.signature(type(pipe).__call__).parameters
    plain: dict[str, Any] = {key: False for key in PLAIN_OPTIONS if key in parameters}
    if isinstance(condition, Prompts):
        encoded = condition.encode(TEST_PROMPTS, torch.device("cpu"))
        arguments = {"prompt": TEST_PROMPTS, "guidance_scale": 1.0, **plain}
        return Request(arguments, len(TEST_PROMPTS), encoded)
    if isinstance(model.denoiser.net, DiT):
        classes = condition.classes if isinstance(condition, ClassLabel) else 1
        labels = [i % classes for i in range(max(10, min(classes, 20)))]
        cond = condition(torch.tensor(labels))
        return Request({"class_labels": labels, "guidance_scale": 1.0}, len(labels), cond)
    requested = condition.requested(range(4))
    if requested is None:
        return Request({"batch_size": 4}, 4, condition(None))
    arguments = {"class_labels": requested.tolist(), "guidance_scale": 1.0}
    return Request(arguments, 4, condition(requested))


class Gap(NamedTuple):
    """The largest differences of a pipeline's images in [0, 1] from ours."""

    same_grid: float  # on the pipeline's own grid of times
    native_grid: float  # on our uniform one
    allowed: float  # for same_grid


@torch.inference_mode()
def compare_images(folder: Path, model: LoadedModel, steps: int, seed: int = 0) -> dict[int, Gap]:
    """Return, by number of steps, the largest differences of a pipeline's images from ours.

    For networks of diffusers more is allowed where our sample has large numbers: the first step of
    a noise prediction divides by alpha(1), and its rounding errors too.

    Args:
        folder: the pipeline's.
        model: ours.
        steps: recommended number of steps, compared too.
        seed: of the noise.
    """
    # The pipeline, without what changes finished images.
    denoiser, codec, _ = model
    parameters = inspect.signature(find_class(folder)).parameters
    options = {key: value for key, value in UNCOMPARED.items() if key in parameters}
    pipe = DiffusionPipeline.from_pretrained(
        folder, use_safetensors=True, dtype=torch.float32, **options
    )
    pipe.set_progress_bar_config(disable=True)
    request = _make_request(pipe, model)

    # Its images and ours, by number of steps.
    gaps = {}
    for n in _step_counts(pipe, denoiser, steps):
        # theirs
        output = pipe(
            **request.arguments,
            num_inference_steps=n,
            output_type="np",
            generator=torch.manual_seed(seed),
        )
        theirs = torch.from_numpy(output.images).permute(0, 3, 1, 2)
        # ours, from the same noise
        eps = torch.randn(request.samples, *denoiser.shape, generator=torch.manual_seed(seed))
        latents = {
            "same_grid": sample_on_grid(denoiser, pipe.scheduler, n, eps, request.cond),
            "native_grid": DDIM(n)(denoiser, eps, request.cond),
        }
        largest = 1.0
        if isinstance(denoiser.net, Pretrained):
            largest = max(1.0, latents["same_grid"].abs().max().item())
        differences = {}
        for name, x in latents.items():
            ours = (codec.decode(x) / 2 + 0.5).clamp(0, 1)
            differences[name] = (theirs - ours).abs().max().item()
        gaps[n] = Gap(**differences, allowed=TOLERANCE * largest)
    return gaps


def find_class(folder: Path) -> Any:
    """Return the class of a pipeline's folder."""
    return getattr(diffusers, json.loads((folder / INDEX).read_bytes())["_class_name"])


def _step_counts(pipe: DiffusionPipeline, denoiser: Denoiser, steps: int) -> list[int]:
    """Return the step counts at which images are compared."""
    levels = pipe.scheduler.config["num_train_timesteps"]
    if steps > levels:
        raise ValueError(f"steps is {steps}; the network was trained with {levels} times at most")
    usual = DIT_STEPS if isinstance(denoiser.net, DiT) else PRETRAINED_STEPS
    return sorted(n for n in {*usual, steps} if n <= levels)


def sample_on_grid(
    denoiser: Denoiser, scheduler: Any, steps: int, eps: Tensor, cond: Tensor | None
) -> Tensor:
    """Return what our DDIM samples on a scheduler's times, started where it starts.

    That is eps; for Euler's method on a chain, sigma eps.
    """
    sampler, timed = on_scheduler_grid(scheduler, denoiser, steps)
    if isinstance(scheduler, EulerDiscreteScheduler):
        return sampler(timed, eps, cond)
    return sampler.integrate(timed, eps, cond)[-1]


class Origin(NamedTuple):
    """What is known of the pipeline that a student was made from."""

    teacher: str  # its folder, "" if unknown
    base_model: str = ""  # its name on the hub, "" if unknown
    licence: dict[str, Any] = {}  # keys of a card about its licence
    labels: dict[str, str] | None = None  # names of its classes by number
    is_pipeline: bool = False  # the pipeline itself is exported, no student of it


def read_origin(run: Path) -> Origin:
    """Return what a run's configuration and its teacher's folder state about the teacher."""
    # The teacher's folder, which may be gone.
    teacher = str(run)
    if not (run / INDEX).is_file():
        config_path = newest_checkpoint(run).resolve().parent.parent / "config.yaml"
        if not config_path.is_file():
            return Origin("")
        with errors_named(config_path):
            denoiser = yaml.safe_load(config_path.read_text())["model"]["init_args"]["denoiser"]
            teacher = denoiser.get("init_args", {}).get("folder", "")
    folder = Path(teacher)
    if not teacher or not (folder / INDEX).is_file():
        if teacher:
            log.warning(
                "%s: no pipeline is there any more; its name, licence and names of classes are "
                "left out",
                folder,
            )
        return Origin(teacher)

    # Its name on the hub, if it was downloaded from there.
    index = read_config(folder / INDEX)
    name = str(index.get("_name_or_path") or "")
    found = HUB_FOLDER.search(str(folder.resolve())) or HUB_FOLDER.search(name)
    base_model = "/".join(found.groups()) if found else ""
    if not base_model and HUB_NAME.fullmatch(name) and not Path(name).exists():
        base_model = name

    licence = read_licence(folder / "README.md")
    return Origin(teacher, base_model, licence, index.get("id2label"), folder == run)


def read_licence(card: Path) -> dict[str, Any]:
    """Return what the header of a card states about its licence."""
    text = card.read_text("utf-8-sig", errors="replace") if card.is_file() else ""
    header = HEADER.match(text)
    entries = None
    try:
        entries = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        log.warning("%s: its header is not YAML, so its licence is left out", card)
    if not isinstance(entries, dict):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: entries[key] for key in keys if entries.get(key)}


def default_guidance(pipeline: Any) -> float | None:
    """Return the guidance scale that a class of pipelines has by default, if it has one."""
    parameter = inspect.signature(pipeline.__call__).parameters.get("guidance_scale")
    return parameter.default if parameter else None


def model_card(
    name: str,
    folder: Path,
    origin: Origin,
    steps: int,
    model: LoadedModel,
    worst: float,
    native: float,
) -> str:
    """Return the model card.

    Args:
        name: the exported folder's.
        folder: where the pipeline was written.
        origin: where the model comes from.
        steps: recommended number of steps.
        model: the exported one.
        worst: largest difference of images on the same grid.
        native: largest difference of images on our own grid.
    """
    # What the parts of the card depend on.
    net = model.denoiser.net
    pipeline = find_class(folder)
    guidance = default_guidance(pipeline)
    teacher = origin.base_model or Path(origin.teacher).name

    # The header.
    is_textual = isinstance(model.condition, Prompts)
    tag = "text-to-image" if is_textual else "unconditional-image-generation"
    header: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": tag}
    if origin.base_model:
        header["base_model"] = origin.base_model
    header |= origin.licence

    # The text.
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n# {name}",
        _describe_network(model.denoiser, origin),
        _describe_use(name, model.denoiser, steps, guidance, origin),
        _describe_other_programs(model.denoiser, origin),
        f"Its images equal those of rectify's DDIM on the same grid of times to {worst:.1g}.\n"
        f"On rectify's own uniform grid they differ by up to {native:.1g}.",
    ]
    if isinstance(net, Pretrained) and net.lora:
        parts.append(_describe_adapters(name, net, pipeline, teacher))
    if not origin.licence:
        parts.append(
            "No licence is stated. Before you publish this, add `license:` to the header: that of "
            f"{teacher or 'the data'} applies."
        )
    return "\n\n".join(parts) + "\n"


def _describe_network(denoiser: Denoiser, origin: Origin) -> str:
    """Return what the network is, and how it was trained."""
    net = denoiser.net
    method = f"{denoiser.interpolant!r} and {denoiser.prediction!r}"
    if not isinstance(net, Pretrained):
        count = sum(parameter.numel() for parameter in denoiser.parameters())
        return f"A DiT ({count:,} parameters, EMA weights) trained by `rectify` with {method}."
    if origin.is_pipeline:
        teacher = origin.base_model or Path(origin.teacher).name
        return f"The {net.kind} of {teacher}, with {method}."
    training = "as a whole"
    if net.lora:
        training = f"by adapters of rank {net.lora}, merged here and alone in lora/,"
    return f"A {net.kind} trained {training} by `rectify`, EMA weights, with {method}."


def _describe_other_programs(denoiser: Denoiser, origin: Origin) -> str:
    """Return the settings with which programs beside diffusers sample the network."""
    settings = "sampler DDIM or Euler, times `trailing` (`sgm_uniform`)"
    if isinstance(denoiser.interpolant, Linear):
        settings = "sampler Euler, equal steps (`sgm_uniform`), shift 1"
    if not origin.is_pipeline:
        settings += ", guidance (CFG) 1"
    return f"In other programs: {settings}."


def _describe_use(
    name: str, denoiser: Denoiser, steps: int, default: float | None, origin: Origin
) -> str:
    """Return how images are made, and the settings for it.

    Args:
        name: the exported folder's.
        denoiser: the exported one.
        steps: recommended number of steps.
        default: the pipeline's guidance scale by default, if it has one.
        origin: where the denoiser comes from.
    """
    # The guidance scale: a student was trained for one, or for a range of them.
    net = denoiser.net
    scale = 1.0
    recommended = "guidance_scale=1"
    if isinstance(denoiser.guidance, list) and denoiser.reads_guidance:
        scale, high = denoiser.guidance
        recommended = f"guidance_scale from {scale:g} to {high:g}"
    has_scale = default is not None and not origin.is_pipeline

    # The arguments of the call.
    arguments = ""
    if isinstance(net, Pretrained) and net.tokens:
        arguments = '["a prompt"], '
    elif isinstance(net, DiT) or (isinstance(net, Pretrained) and net.classes):
        arguments = "class_labels=[0, 1, 2], "
    if has_scale:
        arguments += f"guidance_scale={scale}, "
    if isinstance(net, Pretrained) and net.kind == "PixArtTransformer2DModel":
        arguments += "".join(f"{option}=False, " for option in PLAIN_OPTIONS)

    # What is recommended.
    settings = f"num_inference_steps={steps}"
    if has_scale:
        settings += (
            f" and {recommended} (without it the pipeline guides at {default:g}, which this "
            "network was not trained for)"
        )
    text = f"""Recommended: {settings}.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("{name}")
    images = pipe({arguments}num_inference_steps={steps}).images"""
    if isinstance(net, DiT):
        text += f'\n\nClass {NO_CLASS} (and any class it was not trained on) means "no class".'
    return text


def _describe_adapters(name: str, net: Pretrained, pipeline: Any, teacher: str) -> str:
    """Return how the adapters alone are loaded into the teacher."""
    part = component(net)
    load = (
        f'import peft\n    base.{part} = peft.PeftModel.from_pretrained(base.{part}, "{name}/lora")'
    )
    if hasattr(pipeline, "load_lora_weights"):
        load = f'base.load_lora_weights("{name}/lora")'
    return f"""The adapters alone, in the teacher or a fine-tune of it:

    base = DiffusionPipeline.from_pretrained("{teacher or "TEACHER"}", scheduler=pipe.scheduler)
    {load}"""
