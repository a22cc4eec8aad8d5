"""Embeddings of numbers: the time, a second time, a guidance scale."""

import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256  # channels of the sinusoidal embedding, as in DiT's code and in diffusers


def sinusoidal_embedding(number: Tensor) -> Tensor:
    """Return cosines and sines of numbers (B,), shape (B, FREQUENCIES)."""
    from diffusers.models.embeddings import get_timestep_embedding  # slow to import

    return get_timestep_embedding(number, FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1)


class ScalarEmbedding(nn.Module):
    """Embeds one more number.

    Its output is zero at first, so that a teacher's weights still make the teacher.

    Args:
        width: channels of a token.
    """

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(FREQUENCIES, width)
        self.fc2 = nn.Linear(width, width)
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, number: Tensor) -> Tensor:
        """Return (B, width) for numbers (B,)."""
        waves = sinusoidal_embedding(number).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(waves)))
