"""How a network reads a number: its clock, a second clock, a scale of guidance."""

import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

FREQUENCIES = 256  # channels of the sinusoidal clock embedding, as in DiT's code and in diffusers


def waves(number: Tensor) -> Tensor:
    """Return cosines and sines of numbers (B,), shape (B, FREQUENCIES)."""
    return get_timestep_embedding(number, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1)


class Reading(nn.Module):
    """What a network is told of one more number: nothing at first, so that a teacher's weights still make the teacher.

    Args:
        width: channels of a token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.grow, self.out = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)
        nn.init.normal_(self.grow.weight, std=0.02)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, number: Tensor) -> Tensor:
        """Return (B, width) of numbers (B,)."""
        return self.out(F.silu(self.grow(waves(number).to(self.grow.weight.dtype))))
