"""Diffusion transformer (DiT) with adaLN-zero, on latents or pixels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.nets import Net
from models.nets.attention import Attention
from models.nets.embedding import FREQUENCIES, ScalarEmbedding, sinusoidal_embedding
from models.time_input import ScaledTime


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return layer-normalised tokens (B, N, width), scaled and shifted per sample, (B, width)."""
    normalised = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    return normalised * (1 + scale[:, None]) + shift[:, None]


def embed_positions(height: int, width: int, side: int, channels: int) -> Tensor:
    """Return the sine-cosine positions of a grid of patches, (height x width, channels) float32.

    Patches are one apart; the centre of the grid is that of a square of `side` patches.

    Args:
        height: patches in a column.
        width: patches in a row.
        side: patches in a row and in a column of the square.
        channels: of a position, a multiple of 4.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid  # slow to import

    rows = torch.arange(height, dtype=torch.float32) + (side - height) / 2
    columns = torch.arange(width, dtype=torch.float32) + (side - width) / 2
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
    return get_2d_sincos_pos_embed_from_grid(channels, grid).float()


class Block(nn.Module):
    """One transformer block with adaLN-zero: it starts as the identity."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """Return tokens (B, N, width).

        Args:
            tokens: (B, N, width).
            conditioning: embedding of time and condition, (B, width).
        """
        modulation = self.modulation(F.silu(conditioning))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        tokens = tokens + gate_a[:, None] * self.attention(modulate(tokens, shift_a, scale_a))
        hidden = F.gelu(self.fc1(modulate(tokens, shift_m, scale_m)), approximate="tanh")
        return tokens + gate_m[:, None] * self.fc2(hidden)


class DiT(Net):
    """A diffusion transformer that starts by predicting zero; its time input is 1000 t.

    Peebles & Xie 2022 (arXiv 2212.09748). It takes states of any height and width that are
    multiples of the patch. As in Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, section
    5.3.2), neighbouring patches are one apart at every size, and the centre keeps its position.

    Args:
        size: height and width of the states that samplers start from.
        channels: channels of the state.
        patch: side of a patch, a divisor of size.
        width: channels of a token, a multiple of heads and of 4.
        depth: number of blocks.
        heads: attention heads.
        classes: number of classes; class `classes` (and no condition at all) means "no class". 0:
            the network has no classes.
        two_time: take a second time, of the jump's end (Geng et al. 2025, arXiv 2505.13447); by
            default it equals the first.
        guidance_embedded: take a guidance scale (Meng et al. 2022, arXiv 2210.03142); by default it
            is 1.
    """

    classes: int
    position: Tensor  # of the patches at the nominal size

    def __init__(
        self,
        size: int = 8,
        channels: int = 4,
        patch: int = 2,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        two_time: bool = False,
        guidance_embedded: bool = False,
    ):
        super().__init__()
        if size % patch:
            raise ValueError(f"DiT: size {size} is not a multiple of patch {patch}")
        self.size = size
        self.channels = channels
        self.patch = patch
        self.size_multiple = patch
        self.width = width
        self.depth = depth
        self.heads = heads
        self.classes = classes
        self.two_time = two_time
        self.guidance_embedded = guidance_embedded
        self.time_input = ScaledTime(1000.0)
        # patches and their positions
        self.embed = nn.Conv2d(channels, width, patch, patch)
        side = size // patch
        self.register_buffer("position", embed_positions(side, side, side, width), persistent=False)
        self._positions: dict[tuple[int, int], Tensor] = {}  # of other sizes
        # embeddings of time and class
        fc1 = nn.Linear(FREQUENCIES, width)
        fc2 = nn.Linear(width, width)
        self.t_embedder = nn.Sequential(fc1, nn.SiLU(), fc2)
        self.y_embedder = nn.Embedding(classes + 1, width)
        # blocks and output
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch**2 * channels)
        # optional inputs
        self.t_end_embedder = ScalarEmbedding(width) if two_time else None
        self.guidance_embedder = ScalarEmbedding(width) if guidance_embedded else None
        # initialisation
        nn.init.normal_(self.y_embedder.weight, std=0.02)
        nn.init.normal_(fc1.weight, std=0.02)
        nn.init.normal_(fc2.weight, std=0.02)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def conditioning(
        self,
        time: Tensor,
        cond: Tensor | None,
        t_end: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return the embedding that modulates the blocks, (B, width).

        Args:
            time: time inputs, (B,).
            cond: class labels, (B,), or None.
            t_end: time inputs of the jumps' ends, (B,); `time` by default.
            guidance: guidance scales, (B,); 1 by default.
        """
        label = cond
        if label is None:
            label = torch.full_like(time, self.classes, dtype=torch.long)
        waves = sinusoidal_embedding(time).to(self.embed.weight.dtype)
        embedding = self.t_embedder(waves) + self.y_embedder(label)
        if self.t_end_embedder is not None:
            length = torch.zeros_like(time) if t_end is None else time - t_end
            embedding = embedding + self.t_end_embedder(length)
        if self.guidance_embedder is not None:
            excess = torch.zeros_like(time) if guidance is None else 100 * (guidance - 1)
            embedding = embedding + self.guidance_embedder(excess)
        return embedding

    def positions(self, height: int, width: int) -> Tensor:
        """Return the positions of the patches of a state, (height x width, channels of a token).

        Args:
            height: patches in a column.
            width: patches in a row.
        """
        side = self.size // self.patch
        if (height, width) == (side, side):
            return self.position
        found = self._positions.get((height, width))
        like = self.position
        if found is None or found.device != like.device or found.dtype != like.dtype:
            with torch.inference_mode(False):  # training may use it later
                found = embed_positions(height, width, side, self.width).to(like)
            self._positions[height, width] = found
        return found

    def list_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def null_condition(self, cond: Tensor) -> Tensor:
        return torch.full_like(cond, self.classes)

    def forward(
        self,
        x_t: Tensor,
        time: Tensor,
        cond: Tensor | None = None,
        t_end: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        # tokens
        patches = self.embed(x_t.to(self.embed.weight.dtype))
        height, width = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2) + self.positions(height, width)
        conditioning = self.conditioning(time, cond, t_end, guidance)
        for block in self.blocks:
            tokens = block(tokens, conditioning)
        # patches of the output
        shift, scale = self.modulation(F.silu(conditioning)).chunk(2, dim=-1)
        patches = self.out(modulate(tokens, shift, scale))
        patches = patches.unflatten(1, (height, width))
        patches = patches.unflatten(-1, (self.patch, self.patch, self.channels))
        # (B, h, w, p, q, C) -> (B, C, h p, w q)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x_t.shape)
