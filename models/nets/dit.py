"""Diffusion transformer (DiT, 2212.09748) with adaLN-zero, over latents or pixels."""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor, nn

from models.clock import Scaled
from models.nets import Net
from models.nets.attention import Attention
from models.nets.reading import FREQUENCIES, Reading, waves


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return layer-normalised tokens (B, N, width), scaled and shifted per sample, (B, width)."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """One transformer block with adaLN-zero: it starts as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, told: Tensor) -> Tensor:
        """Return tokens (B, N, width), given what the block is told (clock and condition), (B, width)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(F.silu(told)).chunk(6, dim=-1)
        tokens = tokens + gate_a[:, None] * self.attention(modulate(tokens, shift_a, scale_a))
        hidden = F.gelu(self.grow(modulate(tokens, shift_m, scale_m)), approximate="tanh")
        return tokens + gate_m[:, None] * self.shrink(hidden)


class DiT(Net):
    """A DiT that starts by predicting zero and reads 1000 t.

    Args:
        size: height and width of the state.
        channels: channels of the state.
        patch: side of a patch, a divisor of size.
        width: channels of a token, a multiple of heads and of 4.
        depth: number of blocks.
        heads: attention heads.
        classes: number of classes; class `classes` (and no condition at all) means "not told". 0: never told.
        jumps: reads a second clock, that of the time to jump to (2505.13447); without one, the first again.
        scaled: reads a scale of guidance (2210.03142); without one, 1.
    """

    def __init__(
        self,
        size: int = 8,
        channels: int = 4,
        patch: int = 2,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        jumps: bool = False,
        scaled: bool = False,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"DiT: size {size} is not a multiple of patch {patch}")
        self.size, self.channels, self.patch, self.width = size, channels, patch, width
        self.depth, self.heads, self.classes, self.clock = depth, heads, classes, Scaled(1000.0)
        self.jumps, self.scaled = jumps, scaled
        self.embed = nn.Conv2d(channels, width, patch, patch)
        grid = get_2d_sincos_pos_embed(width, size // patch, base_size=size // patch, output_type="pt")
        self.register_buffer("position", grid.float(), persistent=False)
        self.clock_in, self.clock_out = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, patch**2 * channels)
        self.jump = Reading(width) if jumps else None
        self.scale = Reading(width) if scaled else None
        for embedding in (self.label, self.clock_in, self.clock_out):
            nn.init.normal_(embedding.weight, std=0.02)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)

    def told(self, clock: Tensor, cond: Tensor | None, until: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Return what the blocks are told, (B, width), of clock readings (B,), labels (B,) or None, and the readings below."""
        label = torch.full_like(clock, self.classes, dtype=torch.long) if cond is None else cond
        hidden = F.silu(self.clock_in(waves(clock).to(self.clock_in.weight.dtype)))
        told = self.clock_out(hidden) + self.label(label)
        if self.jump is not None:
            told = told + self.jump(torch.zeros_like(clock) if until is None else clock - until)
        if self.scale is not None:
            told = told + self.scale(torch.zeros_like(clock) if scale is None else 100 * (scale - 1))
        return told

    def forward(
        self,
        x_t: Tensor,
        clock: Tensor,
        cond: Tensor | None = None,
        until: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        tokens = self.embed(x_t.to(self.embed.weight.dtype)).flatten(2).transpose(1, 2) + self.position
        told = self.told(clock, cond, until, scale)
        for block in self.blocks:
            tokens = block(tokens, told)
        patches = self.out(modulate(tokens, *self.modulation(F.silu(told)).chunk(2, dim=-1)))
        side = self.size // self.patch
        patches = patches.unflatten(1, (side, side)).unflatten(-1, (self.patch, self.patch, self.channels))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x_t.shape)  # (B, h, w, p, q, C) -> (B, C, h p, w q)
