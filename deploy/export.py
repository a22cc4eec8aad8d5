"""Export: a run as a diffusers folder that plain `DiffusionPipeline.from_pretrained` loads."""

import inspect
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from data.files import atomic_folder, checksummed_json, read_json
from models.checkpoint import LoadedModel, fingerprint, load_checkpoint
from models.codec import KL
from models.condition import ClassLabel
from models.denoiser import Denoiser
from models.diffusers.dit import NO_CLASS, to_diffusers_dit
from models.diffusers.networks import LORA_LAYER, LORA_TARGETS, Pretrained
from models.diffusers.pipeline import to_diffusers_pipeline, to_diffusers_vae
from models.diffusers.scheduler import flow_scheduler, on_scheduler_grid
from models.diffusers.text import INDEX, Prompts
from models.interpolant import Discrete, Linear
from models.nets.dit import DiT
from models.prediction import Velocity
from models.sampler import DDIM

log = logging.getLogger(__name__)
# Step counts at which images are compared, besides the recommended one.
DIT_STEPS = (1, 2, 3, 4, 8, 32)
PRETRAINED_STEPS = (1, 2, 4, 8)  # those that divide the chain
TEST_PROMPTS = ["a red bird", "two houses by the sea", "", "zebra"]
TOLERANCE = 1e-4  # of images in [0, 1]
# PixArt would resize images and clean texts.
PLAIN_OPTIONS = ("use_resolution_binning", "clean_caption")


def export(run: Path, out: Path, steps: int = 4) -> None:
    """Write a run's EMA weights as a diffusers folder, if its images equal those of our sampler.

    A student of a diffusers network becomes a pipeline of its teacher's kind. Its adapters are
    merged into the network, and also written alone into OUT/lora, for peft.

    Args:
        run: run folder or checkpoint: of a DiT with Linear and Velocity, in latents, or of a
            `Pretrained` network.
        out: the folder to write; it is replaced as a whole.
        steps: recommended number of steps, for the model card.
    """
    disable_progress_bar()
    model = load_checkpoint(run)
    check_exportable(run, model)
    weights = fingerprint(model.denoiser)
    if _is_finished(out, weights, steps):
        log.info("%s is finished", out)
        return
    with atomic_folder(out) as folder:
        write_pipeline(folder, model)
        # Compare its images with ours.
        gaps = compare_images(folder, model, steps)
        worst = max(gap["same_grid"] for gap in gaps.values())
        if not worst <= TOLERANCE:
            raise ValueError(
                f"{run}: the exported folder's images differ from ours by {worst:.2g}, more than "
                f"{TOLERANCE}; nothing was written"
            )
        # The model card, and a record of this export.
        native = max(gap["native_grid"] for gap in gaps.values())
        (folder / "README.md").write_text(model_card(run, steps, model.denoiser, worst, native))
        record = {
            "format": 1,
            "denoiser": weights,
            "max_abs_diff": worst,
            "gaps": gaps,
            "steps": steps,
        }
        (folder / "export.json").write_bytes(checksummed_json(record))


def _is_finished(out: Path, weights: str, steps: int) -> bool:
    """Whether a folder is the same export already.

    Raises:
        ValueError: it is something else, which must not be replaced.
    """
    path = out / "export.json"
    if path.exists():
        record = read_json(path)
        return record.get("denoiser") == weights and record.get("steps") == steps
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
    if not (isinstance(model.codec, KL) and isinstance(denoiser.net, DiT)):
        raise ValueError(
            f"{run}: its network is a {type(denoiser.net).__name__} with codec "
            f"{type(model.codec).__name__}; export needs a DiT in the latents of an AutoencoderKL"
        )


def write_pipeline(folder: Path, model: LoadedModel) -> None:
    """Write a model as a diffusers pipeline."""
    denoiser, codec, condition = model
    net = denoiser.net
    if isinstance(net, Pretrained):
        to_diffusers_pipeline(denoiser, codec, condition).save_pretrained(folder)
        _remove_source(folder / INDEX)
        if net.lora:
            write_adapters(folder / "lora", net)
        return
    assert isinstance(net, DiT) and isinstance(codec, KL)
    labels = {i: str(i) for i in range(net.classes)} or None
    vae = to_diffusers_vae(codec)
    DiTPipeline(to_diffusers_dit(net), vae, flow_scheduler(), labels).save_pretrained(folder)


def _remove_source(index: Path) -> None:
    """Remove the folder that the text encoders were read from."""
    parts = json.loads(index.read_bytes())
    parts.pop("_name_or_path", None)
    index.write_text(json.dumps(parts, indent=2) + "\n")


def write_adapters(folder: Path, net: Pretrained) -> None:
    """Write a network's adapters as a folder of peft: for its teacher, or a fine-tune of it."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    config = LoraConfig(r=net.lora, lora_alpha=net.lora, target_modules=LORA_TARGETS)
    config.save_pretrained(str(folder))
    adapters = {}
    for key, value in net.model.state_dict().items():
        if LORA_LAYER in key:
            name = f"base_model.model.{key}".replace(".default.", ".")
            adapters[name] = value.contiguous()
    save_file(adapters, folder / "adapter_model.safetensors", {"format": "pt"})


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


@torch.inference_mode()
def compare_images(
    folder: Path, model: LoadedModel, steps: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return, by number of steps, the largest difference of a pipeline's images from ours.

    `same_grid` is on the pipeline's own grid of times, `native_grid` on our uniform one. For
    networks of diffusers it is relative to the largest number in our sample if that is above 1: the
    first step of a noise prediction divides by alpha(1).

    Args:
        folder: the pipeline's.
        model: ours.
        steps: recommended number of steps, compared too.
        seed: of the noise.
    """
    denoiser, codec, _ = model
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    request = _make_request(pipe, model)
    gaps: dict[str, dict[str, float]] = {}
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
        gaps[str(n)] = {}
        for name, x in latents.items():
            ours = (codec.decode(x) / 2 + 0.5).clamp(0, 1)
            gaps[str(n)][name] = (theirs - ours).abs().max().item() / largest
    return gaps


def _step_counts(pipe: DiffusionPipeline, denoiser: Denoiser, steps: int) -> list[int]:
    """Return the step counts at which images are compared."""
    if isinstance(denoiser.net, DiT):
        return sorted({*DIT_STEPS, steps})
    levels = pipe.scheduler.config["num_train_timesteps"]
    return sorted(n for n in {*PRETRAINED_STEPS, steps} if levels % n == 0)


def sample_on_grid(
    denoiser: Denoiser, scheduler: Any, steps: int, eps: Tensor, cond: Tensor | None
) -> Tensor:
    """Return what our DDIM samples on a scheduler's times, started where it starts: from eps."""
    if isinstance(denoiser.interpolant, Discrete):
        scheduler.set_timesteps(steps)
        levels = len(denoiser.interpolant.betas)
        times = [(index + 1) / levels for index in scheduler.timesteps.tolist()]
        return DDIM(steps, [*times, 0.0]).integrate(denoiser, eps, cond)[-1]
    sampler, timed = on_scheduler_grid(scheduler, denoiser, steps)
    return sampler.integrate(timed, eps, cond)[-1]


def model_card(run: Path, steps: int, denoiser: Denoiser, worst: float, native: float) -> str:
    """Return the model card.

    Args:
        run: the run's folder, which gives the name.
        steps: recommended number of steps.
        denoiser: the exported one.
        worst: largest difference of images on the same grid.
        native: largest difference of images on our own grid.
    """
    if isinstance(denoiser.net, Pretrained):
        return _pretrained_card(run, steps, denoiser, worst, native)
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---
# {run.name}

A DiT ({count:,} parameters, EMA weights) trained by `rectify` with {denoiser.interpolant!r} and
{denoiser.prediction!r}.
Recommended: num_inference_steps={steps} and guidance_scale=1 (the pipeline's default is 4).

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("{run.name}")
    images = pipe(class_labels=[0, 1, 2], guidance_scale=1.0, num_inference_steps={steps}).images

Class {NO_CLASS} (and any class it was not trained on) means "no class". The scheduler samples from
sigma .999 to 0 by DDIM.
Its images equal those of rectify's sampler on the same grid to {worst:.1g}.
On rectify's own uniform grid, from t = 1, they differ by up to {native:.1g}.
"""


def _pretrained_card(run: Path, steps: int, denoiser: Denoiser, worst: float, native: float) -> str:
    """Return the model card of a network of diffusers."""
    net = denoiser.net
    assert isinstance(net, Pretrained)
    arguments = ""
    if net.tokens:
        arguments = '["a prompt"], guidance_scale=1.0, '
    elif net.classes:
        arguments = "[0, 1], guidance_scale=1.0, "
    if net.kind == "PixArtTransformer2DModel":
        arguments += "".join(f"{option}=False, " for option in PLAIN_OPTIONS)
    training = "as a whole"
    if net.lora:
        training = f"by adapters of rank {net.lora}, merged here and alone in lora/ (peft)"
    return f"""---
library_name: diffusers
---
# {run.name}

A {net.kind} trained {training} by `rectify`, EMA weights, with {denoiser.interpolant!r} and
{denoiser.prediction!r}.
Recommended: num_inference_steps={steps}, without guidance.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("{run.name}")
    images = pipe({arguments}num_inference_steps={steps}).images

Its images equal those of rectify's DDIM on the same grid to {worst:.1g}.
On rectify's own uniform grid they differ by up to {native:.1g}.
"""
