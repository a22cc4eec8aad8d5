"""Teachers and students of every kind of diffusers pipeline, without training."""

from pathlib import Path

import torch
import yaml
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DModel
from torch import Tensor, nn

from deploy.export import sample_on_grid
from models.checkpoint import TEXTS, load_checkpoint
from models.codec import KL
from models.condition import ClassLabel
from models.diffusers.pipeline import pretrained
from models.diffusers.text import Prompts
from tests.deploy.test_teacher_parts import small_dit, small_vae
from tests.helpers.teachers import save_teacher

SEED = 7


def save_pretrained(kind: str, folder: Path) -> Path:
    """Write a teacher as it is published, in the layout of transformers 4; return its folder."""
    if kind == "dit":
        DiTPipeline(small_dit(), small_vae(), DDIMScheduler(clip_sample=False)).save_pretrained(
            folder
        )
    elif kind == "unet":
        torch.manual_seed(0)
        sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1}
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        net = UNet2DModel(**sizes, **blocks, block_out_channels=(16,), norm_num_groups=8)
        DDPMPipeline(net, DDPMScheduler(clip_sample=False)).save_pretrained(folder)
    else:
        from tests import published  # it needs transformers

        published.pipeline(kind, folder.parent).save_pretrained(folder)
        published.rewrite_for_transformers_4(folder)
    return folder


def save_student(run: Path, teacher: Path, lora: int = 0) -> Path:
    """Write the run of a teacher's student whose weights were changed at random; return it."""
    _, codec, condition = load_checkpoint(teacher)
    denoiser = pretrained(str(teacher), lora)
    torch.manual_seed(1)
    for name, value in denoiser.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(value.data, std=0.1)
        elif not lora:
            value.data.add_(0.02 * torch.randn_like(value))
    save_teacher(run, denoiser, condition, codec if isinstance(codec, KL) else None)
    if isinstance(condition, Prompts):
        (run / TEXTS).mkdir()
        condition.save(run / TEXTS)
    arguments = {"denoiser": {"init_args": {"folder": str(teacher), "lora": lora}}}
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": arguments}}))
    return run


@torch.inference_mode()
def sample_with_rectify(
    run: Path, scheduler: object, texts: list[str], steps: list[int]
) -> dict[int, Tensor]:
    """Return what our DDIM samples on a scheduler's times: two images in [0, 1], by steps."""
    denoiser, codec, condition = load_checkpoint(run)
    cond = None
    if isinstance(condition, Prompts):
        cond = condition.encode(texts, torch.device("cpu"))
    elif isinstance(condition, ClassLabel):
        cond = torch.tensor([1, 7])
    images = {}
    for n in steps:
        eps = torch.randn(2, *denoiser.shape, generator=torch.manual_seed(SEED))
        x = sample_on_grid(denoiser, scheduler, n, eps, cond)
        images[n] = (codec.decode(x) / 2 + 0.5).clamp(0, 1)
    return images
