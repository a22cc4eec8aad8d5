"""Attention: torch's scaled-dot-product kernels, or xformers where its CUDA kernel works."""

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
def xformers_kernel(
    device: str, dtype: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Return xformers' attention if it works on this kind of device and dtype, else None.

    It is run once to find out. One log line names the kernel that is used.
    """
    kernel = None
    if device == "cuda":
        try:
            kernel = importlib.import_module("xformers.ops").memory_efficient_attention
            probe = torch.zeros(1, 8, 1, 16, device=device, dtype=dtype)
            kernel(probe, probe, probe)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            log.debug("xformers probe: %s", error)
            kernel = None
    name = "xformers" if kernel else "torch scaled_dot_product_attention"
    log.info("attention on %s in %s: %s", device, dtype, name)
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
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the attended tokens, shape (B, N, width)."""
        # (B, N, heads, width / heads) each
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        # Only the plain kernel has a forward-mode derivative.
        has_tangent = not torch.compiler.is_compiling() and unpack_dual(q).tangent is not None
        kernel = None
        if not has_tangent:
            kernel = xformers_kernel(q.device.type, q.dtype)
        if kernel:
            mixed = kernel(q, k, v)
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            with sdpa_kernel(SDPBackend.MATH) if has_tangent else nullcontext():
                mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(mixed.flatten(-2))
