"""Small codecs with random weights."""

from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny


def small_vae(**changes: Any) -> AutoencoderKL:
    """Return an autoencoder of RGB images, of 4 channels and half the height and width.

    Args:
        changes: other arguments of AutoencoderKL.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            **{"latent_channels": 4, "scaling_factor": 0.5, **changes},
        ).eval()


def small_dc(**changes: Any) -> AutoencoderDC:
    """Return a deep-compression autoencoder of RGB images: 8 channels, a quarter of the height.

    Args:
        changes: other arguments of AutoencoderDC.
    """
    sizes: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        sizes[f"{part}_block_types"] = ("ResBlock", "ResBlock", "EfficientViTBlock")
        sizes[f"{part}_block_out_channels"] = (8, 8, 16)
        sizes[f"{part}_layers_per_block"] = (1, 1, 1)
        sizes[f"{part}_qkv_multiscales"] = ((), (), (5,))
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return AutoencoderDC(
            latent_channels=8,
            attention_head_dim=8,
            **{"scaling_factor": 0.4, **sizes, **changes},
        ).eval()


def small_tiny(**changes: Any) -> AutoencoderTiny:
    """Return a tiny autoencoder of RGB images, of 4 channels and a quarter of the height.

    Args:
        changes: other arguments of AutoencoderTiny.
    """
    sizes: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        sizes[f"{part}_block_out_channels"] = (8, 8, 8)
        sizes[f"num_{part}_blocks"] = (1, 1, 1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoencoderTiny(**{"scaling_factor": 0.8, **sizes, **changes}).eval()


# One of each architecture, by diffusers' name.
SMALL_CODECS = {
    "AutoencoderKL": small_vae,
    "AutoencoderDC": small_dc,
    "AutoencoderTiny": small_tiny,
}
