"""A small codec with random weights."""

from typing import Any

import torch
from diffusers import AutoencoderKL


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
            latent_channels=4,
            **{"scaling_factor": 0.5, **changes},
        ).eval()
