"""Attention, in one place: torch's scaled-dot-product kernels, or xformers where its CUDA kernel is really there."""

import importlib
import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)


@cache
def xformers_kernel(device: str) -> bool:
    """Tell, by running it once, whether xformers attends on this kind of device; says so in one log line."""
    found = False
    if device == "cuda":
        try:
            probe = torch.zeros(1, 8, 1, 16, device=device, dtype=torch.bfloat16)
            importlib.import_module("xformers.ops").memory_efficient_attention(probe, probe, probe)
            found = True
        except (ImportError, NotImplementedError, RuntimeError) as error:
            log.debug("xformers probe: %s", error)
    log.info("attention on %s: %s", device, "xformers" if found else "torch scaled_dot_product_attention")
    return found


class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, width).

    Args:
        width: channels of a token, a multiple of heads.
        heads: number of heads.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"Attention: width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the attended tokens, shape (B, N, width)."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (B, N, heads, width / heads)
        if xformers_kernel(tokens.device.type):
            mixed = importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v)
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(mixed.flatten(-2))
