"""Export: a run as a diffusers folder that plain `DiffusionPipeline.from_pretrained` loads."""

import logging
from pathlib import Path

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from data.files import atomic_folder, read_json, sealed
from deploy import pretrained
from deploy.pretrained import flow_scheduler, on_grid_of, plain_vae
from models import teacher as teachers
from models.codec import KL, Codec
from models.condition import ClassLabel, Condition
from models.denoiser import Denoiser
from models.interpolant import Linear
from models.nets.dit import DiT
from models.nets.pretrained import Pretrained
from models.prediction import Velocity
from models.sampler import DDIM

log = logging.getLogger(__name__)
NULL = 1000  # the class that DiTPipeline takes for "not told"
CHECKED = (1, 2, 3, 4, 8, 32)  # step counts at which the folder is compared with our sampler, beside the recommended
TOLERANCE = 1e-4  # of images in [0, 1]


def transformer(net: DiT) -> DiTTransformer2DModel:
    """Return our DiT as diffusers' class: the same function, with one embedder per block and 1,001 label rows."""
    if net.classes > NULL:
        raise ValueError(f"export: {net.classes} classes; DiTPipeline holds at most {NULL}")
    theirs = DiTTransformer2DModel(
        num_attention_heads=net.heads,
        attention_head_dim=net.width // net.heads,
        in_channels=net.channels,
        out_channels=net.channels,
        num_layers=net.depth,
        sample_size=net.size,
        patch_size=net.patch,
        num_embeds_ada_norm=NULL,
        norm_eps=1e-6,
    )
    theirs.load_state_dict(renamed(net))
    return theirs.eval()


def renamed(net: DiT) -> dict[str, Tensor]:
    """Return our DiT's weights under diffusers' names."""
    ours = net.state_dict()
    table = ours["label.weight"][-1].repeat(NULL + 1, 1)  # unknown classes are "not told"
    table[: net.classes] = ours["label.weight"][:-1]
    out = {}

    layers = {"pos_embed.proj": "embed", "proj_out_1": "modulation", "proj_out_2": "out"}
    for i in range(net.depth):
        theirs, mine = f"transformer_blocks.{i}", f"blocks.{i}"
        out[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = table
        layers[f"{theirs}.norm1.emb.timestep_embedder.linear_1"] = "clock_in"
        layers[f"{theirs}.norm1.emb.timestep_embedder.linear_2"] = "clock_out"
        layers[f"{theirs}.norm1.linear"] = f"{mine}.modulation"
        layers[f"{theirs}.attn1.to_out.0"] = f"{mine}.attention.out"
        layers[f"{theirs}.ff.net.0.proj"], layers[f"{theirs}.ff.net.2"] = f"{mine}.grow", f"{mine}.shrink"
        for kind in ("weight", "bias"):
            for part, rows in zip("qkv", ours[f"{mine}.attention.qkv.{kind}"].chunk(3)):
                out[f"{theirs}.attn1.to_{part}.{kind}"] = rows.clone()
    for name, layer in layers.items():
        out[f"{name}.weight"], out[f"{name}.bias"] = ours[f"{layer}.weight"], ours[f"{layer}.bias"]
    return out


@torch.inference_mode()
def compare(
    folder: Path, denoiser: Denoiser, codec: KL, condition: Condition, steps: int, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Return, by steps, how far a loaded pipeline's images lie from ours, on its grid and on our native uniform one."""
    pipe = DiTPipeline.from_pretrained(folder, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    classes = condition.classes if isinstance(condition, ClassLabel) else 1
    labels = [i % classes for i in range(max(10, min(classes, 20)))]
    told = condition(torch.tensor(labels))
    result = {}
    for n in sorted({*CHECKED, steps}):
        theirs = pipe(labels, guidance_scale=1.0, num_inference_steps=n, output_type="pt", generator=torch.manual_seed(seed))
        eps = torch.randn(len(labels), *denoiser.shape, generator=torch.manual_seed(seed))
        walk, timed = on_grid_of(flow_scheduler(), denoiser, n)
        gaps = {}
        for name, x in (("same_grid", walk.walk(timed, eps, told)[-1]), ("native_grid", DDIM(n)(denoiser, eps, told))):
            ours = (codec.decode(x) / 2 + 0.5).clamp(0, 1)
            gaps[name] = (theirs.images - ours).abs().max().item()
        result[str(n)] = gaps
    return result


def whole(folder: Path, denoiser: Denoiser, codec: KL, condition: Condition, steps: int) -> dict[str, dict[str, float]]:
    """Write a run of ours as a pipeline, and return how far its images lie from ours."""
    assert isinstance(denoiser.net, DiT)
    names = {i: str(i) for i in range(denoiser.net.classes)} or None
    DiTPipeline(transformer(denoiser.net), plain_vae(codec), flow_scheduler(), names).save_pretrained(folder)
    return compare(folder, denoiser, codec, condition, steps)


def known(run: Path, denoiser: Denoiser, codec: Codec) -> None:
    """Refuse what no pipeline of diffusers draws from."""
    linear = isinstance(denoiser.interpolant, Linear) and denoiser.interpolant.sigma_min == 0
    if not (linear and isinstance(denoiser.prediction, Velocity)):
        raise ValueError(
            f"{run}: is trained with {denoiser.interpolant!r} and {denoiser.prediction!r}; export knows Linear and Velocity"
        )
    if not (isinstance(codec, KL) and isinstance(denoiser.net, DiT)):
        raise ValueError(f"{run}: export knows a DiT in the latents of an AutoencoderKL")


def export(run: Path, out: Path, steps: int = 4) -> None:
    """Write a run's EMA weights as a diffusers folder, after comparing its images with our own sampler's.

    A student of a diffusers network becomes a pipeline of its teacher's kind; its adapters are merged, and stand alone in
    OUT/lora as well, for peft.

    Args:
        run: run folder or checkpoint of a DiT with Linear and Velocity, in latents, or of a `Pretrained` network.
        out: the folder to write (replaced as a whole).
        steps: recommended number of steps, for the model card.
    """
    disable_progress_bar()
    denoiser, codec, condition = teachers.load(run)
    theirs = isinstance(denoiser.net, Pretrained)
    if not theirs:
        known(run, denoiser, codec)
    weights, before = teachers.fingerprint(denoiser), out / "export.json"
    if out.exists() and not before.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and is no export of ours; choose another --out")
    if before.exists() and (record := read_json(before)).get("denoiser") == weights and record.get("steps") == steps:
        log.info("%s is finished", out)
        return
    with atomic_folder(out) as folder:
        gaps = (pretrained.whole if theirs else whole)(folder, denoiser, codec, condition, steps)  # type: ignore[arg-type]
        worst = max(gap["same_grid"] for gap in gaps.values())
        if not worst <= TOLERANCE:
            raise ValueError(
                f"{run}: the exported folder's images differ from ours by {worst:.2g}, over {TOLERANCE}; not written"
            )
        tell = pretrained.card if theirs else card
        (folder / "README.md").write_text(tell(run, steps, denoiser, worst, max(gap["native_grid"] for gap in gaps.values())))
        record = {"format": 1, "denoiser": weights, "max_abs_diff": worst, "gaps": gaps, "steps": steps}
        (folder / "export.json").write_bytes(sealed(record))


def card(run: Path, steps: int, denoiser: Denoiser, worst: float, native: float) -> str:
    """Return the model card."""
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---
# {run.name}

A DiT ({sum(p.numel() for p in denoiser.parameters()):,} parameters, EMA weights) trained by `rectify` with
{denoiser.interpolant!r} and {denoiser.prediction!r}.
Recommended: num_inference_steps={steps} and guidance_scale=1 (the pipeline's default is 4).

    from diffusers import DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained("{run.name}")
    images = pipe(class_labels=[0, 1, 2], guidance_scale=1.0, num_inference_steps={steps}).images

Class {NULL} (and any class it was not trained on) means "not told". The scheduler walks from sigma .999 to 0 by DDIM;
its images equal those of rectify's sampler on the same grid to {worst:.1g} (on rectify's own uniform grid, from t = 1, they
differ by up to {native:.1g}).
"""
