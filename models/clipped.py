"""A denoiser with limited estimates of the data, as some schedulers of diffusers have them."""

import torch
from torch import Tensor, nn

from models.denoiser import DenoiserLike, cost, first_level, is_two_time, jump
from models.interpolant import Interpolant


class Clipped(nn.Module):
    """The same denoiser, with x_hat clipped to [-limit, limit]; eps_hat is left as it is.

    So DDIM steps are those of diffusers' DDIMScheduler with `clip_sample`.

    Args:
        denoiser: called as denoiser(x_t, t, cond), guided already.
        limit: largest |x_hat|, positive.
    """

    def __init__(self, denoiser: DenoiserLike, limit: float = 1.0):
        super().__init__()
        if not limit > 0:
            raise ValueError(f"Clipped: limit is {limit}; it must be positive")
        self.denoiser = denoiser
        self.limit = limit

    @property
    def interpolant(self) -> Interpolant:
        """The denoiser's interpolant."""
        return self.denoiser.interpolant

    @property
    def two_time(self) -> bool:
        """Whether the denoiser takes a second time."""
        return is_two_time(self.denoiser)

    @property
    def first_level(self) -> float:
        """The denoiser's own."""
        return first_level(self.denoiser)

    def evaluations(self, t: Tensor) -> int:
        """Return the network evaluations of one call at t, per sample: the denoiser's own."""
        return cost(self.denoiser, t)

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W)."""
        x_hat, eps_hat = jump(self.denoiser, x_t, t, cond, s)
        return torch.clamp(x_hat, -self.limit, self.limit), eps_hat
