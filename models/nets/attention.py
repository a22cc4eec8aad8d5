"""Attention, in one place: torch's scaled-dot-product kernels, or xformers where its CUDA kernel is really there."""

import importlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger(__name__)


@cache
def xformers_kernel(device: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Return xformers' attention if, run once, it works on this kind of device and dtype; says so in one log line."""
    kernel = None
    if device == "cuda":
        try:
            kernel = importlib.import_module("xformers.ops").memory_efficient_attention
            probe = torch.zeros(1, 8, 1, 16, device=device, dtype=dtype)
            kernel(probe, probe, probe)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            log.debug("xformers probe: %s", error)
            kernel = None
    log.info("attention on %s in %s: %s", device, dtype, "xformers" if kernel else "torch scaled_dot_product_attention")
    return kernel


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
        moving = not torch.compiler.is_compiling() and unpack_dual(q).tangent is not None  # only plain sums carry tangents
        if not moving and (kernel := xformers_kernel(q.device.type, q.dtype)):
            mixed = kernel(q, k, v)
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            with sdpa_kernel(SDPBackend.MATH) if moving else nullcontext():
                mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(mixed.flatten(-2))
