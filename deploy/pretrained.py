"""Export of students of diffusers' own networks: the pipeline that their teacher was, adapters merged, and the adapters alone."""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
from torch import Tensor

from models.clock import Tabulated
from models.codec import KL, Codec
from models.condition import Condition
from models.denoiser import Denoiser
from models.interpolant import Discrete, Linear
from models.nets.pretrained import LORA, TARGETS, Pretrained
from models.pipeline import ROWS
from models.prediction import Velocity
from models.sampler import DDIM
from models.text import INDEX, Prompts

CHECKED = (1, 2, 4, 8)  # step counts at which the folder is compared, beside the recommended; of those that divide its chain
ASKED: list[Any] = ["a red bird", "two houses by the sea", "", "zebra"]  # then, of a pipeline that is told texts


def schedule(denoiser: Denoiser) -> DDIMScheduler:
    """Return the scheduler that walks a chain of noising steps as our DDIM does: trailing, and to the data itself."""
    chain = denoiser.interpolant
    assert isinstance(chain, Discrete)
    return DDIMScheduler(
        num_train_timesteps=len(chain.betas),
        trained_betas=chain.betas,
        prediction_type=next(name for name, row in ROWS.items() if type(denoiser.prediction) is row),
        timestep_spacing="trailing",
        rescale_betas_zero_snr=chain.zero_terminal_snr,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # of no effect on trailing times; StableDiffusionPipeline asks for it
    )


def flow_scheduler() -> DPMSolverMultistepScheduler:
    """Return the scheduler that walks Linear + Velocity by DDIM: its grid starts at sigma = .999."""
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=1)


def on_grid_of(scheduler: Any, denoiser: Denoiser, steps: int) -> tuple[DDIM, Denoiser]:
    """Return our sampler and denoiser on a scheduler's own sigmas, its integer timesteps being the network's clock."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=[1 - step / steps for step in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    clock = Tabulated(sigmas[:-1], scheduler.timesteps.tolist())
    return DDIM(steps, sigmas), Denoiser(denoiser.net, denoiser.interpolant, denoiser.prediction, clock)


def plain_vae(codec: KL) -> AutoencoderKL:
    """Return a codec's autoencoder, whose configuration does not tell where it was read from."""
    vae = AutoencoderKL.from_config({key: value for key, value in codec.vae.config.items() if not key.startswith("_")})
    vae.load_state_dict(codec.vae.state_dict())
    return vae


def pipeline(denoiser: Denoiser, codec: Codec, condition: Condition) -> DiffusionPipeline:
    """Return the diffusers pipeline of a denoiser.

    Raises:
        ValueError: diffusers has none for its form, codec and classes.
    """
    net = denoiser.net
    assert isinstance(net, Pretrained)
    chain = isinstance(denoiser.interpolant, Discrete) and type(denoiser.prediction) in ROWS.values()
    if net.kind == "UNet2DModel" and chain and not net.classes and not isinstance(codec, KL):
        return DDIMPipeline(net.merged(), schedule(denoiser))
    flow = isinstance(denoiser.interpolant, Linear) and isinstance(denoiser.prediction, Velocity)
    if (chain or flow) and isinstance(codec, KL) and isinstance(condition, Prompts):
        pipe = copy.copy(condition.pipe)
        name = "unet" if "unet" in pipe.components else "transformer"
        even = FlowMatchEulerDiscreteScheduler()  # which Flux gives even steps
        walk = schedule(denoiser) if chain else even if isinstance(pipe, FluxPipeline) else flow_scheduler()
        pipe.register_modules(**{name: net.merged()}, vae=plain_vae(codec), scheduler=walk)
        return pipe
    if net.kind == "DiTTransformer2DModel" and (chain or flow) and isinstance(codec, KL):
        return DiTPipeline(net.merged(), plain_vae(codec), schedule(denoiser) if chain else flow_scheduler())
    raise ValueError(
        f"diffusers has no pipeline for a {net.kind} of {net.classes} classes with {denoiser.interpolant!r}, "
        f"{denoiser.prediction!r} and codec {type(codec).__name__}; `rectify consolidate` writes its weights as one file"
    )


def ours(denoiser: Denoiser, scheduler: Any, steps: int, eps: Tensor, told: Tensor | None) -> Tensor:
    """Return what our DDIM draws on a scheduler's own times, from where it starts: eps, of variance one."""
    if isinstance(denoiser.interpolant, Discrete):
        scheduler.set_timesteps(steps)
        times = [(index + 1) / len(denoiser.interpolant.betas) for index in scheduler.timesteps.tolist()]
        return DDIM(steps, [*times, 0.0]).walk(denoiser, eps, told)[-1]
    walk, timed = on_grid_of(scheduler, denoiser, steps)
    return walk.walk(timed, eps, told)[-1]


@torch.inference_mode()
def compare(
    folder: Path, denoiser: Denoiser, codec: Codec, condition: Condition, steps: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return, by steps, how far a loaded pipeline's images lie from ours, on its grid and on our native uniform one.

    In units of the largest number in our sample where that is over 1: a noise prediction's first step divides by alpha(1).
    """
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    raw = None if isinstance(condition, Prompts) else condition.asked(range(4))
    labels = ASKED if isinstance(condition, Prompts) else [] if raw is None else raw.tolist()
    told = condition.encode(ASKED, torch.device("cpu")) if isinstance(condition, Prompts) else condition(raw)
    takes = inspect.signature(type(pipe).__call__).parameters
    plain = {key: False for key in ("use_resolution_binning", "clean_caption") if key in takes}  # PixArt's, of sizes and of texts
    found = {}
    for n in sorted(n for n in {*CHECKED, steps} if pipe.scheduler.config["num_train_timesteps"] % n == 0):
        asked = {"num_inference_steps": n, "output_type": "np", "generator": torch.manual_seed(seed), **plain}
        theirs = pipe(labels, guidance_scale=1.0, **asked) if labels else pipe(4, **asked)
        drawn = torch.from_numpy(theirs.images).permute(0, 3, 1, 2)
        eps = torch.randn(4, *denoiser.shape, generator=torch.manual_seed(seed))
        latents = {"same_grid": ours(denoiser, pipe.scheduler, n, eps, told), "native_grid": DDIM(n)(denoiser, eps, told)}
        images = {name: (codec.decode(x) / 2 + 0.5).clamp(0, 1) for name, x in latents.items()}
        size = max(1.0, latents["same_grid"].abs().max().item())
        found[str(n)] = {name: (drawn - image).abs().max().item() / size for name, image in images.items()}
    return found


def whole(folder: Path, denoiser: Denoiser, codec: Codec, condition: Condition, steps: int) -> dict[str, dict[str, float]]:
    """Write a run as the pipeline that its teacher was, and return how far its images lie from ours."""
    pipeline(denoiser, codec, condition).save_pretrained(folder)
    index = json.loads((folder / INDEX).read_bytes())
    index.pop("_name_or_path", None)  # where its texts were read from
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    assert isinstance(denoiser.net, Pretrained)
    if denoiser.net.lora:
        adapters(denoiser.net, folder / "lora")
    return compare(folder, denoiser, codec, condition, steps)


def adapters(net: Pretrained, folder: Path) -> None:
    """Write a network's adapters as peft's folder: for the same teacher, or a fine-tune of it."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    LoraConfig(r=net.lora, lora_alpha=net.lora, target_modules=TARGETS).save_pretrained(str(folder))
    own = {key: value.contiguous() for key, value in net.model.state_dict().items() if LORA in key}
    named = {f"base_model.model.{key}".replace(".default.", "."): value for key, value in own.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})


def card(run: Path, steps: int, denoiser: Denoiser, worst: float, native: float) -> str:
    """Return the model card."""
    net = denoiser.net
    assert isinstance(net, Pretrained)
    plain = "use_resolution_binning=False, clean_caption=False, " if net.kind == "PixArtTransformer2DModel" else ""
    asked = f'["a prompt"], guidance_scale=1.0, {plain}' if net.tokens else "[0, 1], guidance_scale=1.0, " if net.classes else ""
    how = f"by adapters of rank {net.lora}, merged here and alone in lora/ (peft)" if net.lora else "whole"
    return f"""---
library_name: diffusers
---
# {run.name}

A {net.kind} trained {how} by `rectify`, EMA weights, with {denoiser.interpolant!r} and {denoiser.prediction!r}.
Recommended: num_inference_steps={steps}, without guidance.

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("{run.name}")
    images = pipe({asked}num_inference_steps={steps}).images

Its images equal those of rectify's DDIM on the same grid to {worst:.1g} (on rectify's own uniform grid they differ by up to
{native:.1g}).
"""
