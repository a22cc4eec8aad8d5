"""Classifier-free guidance (2207.12598) in one convention: `u + w (c - u)`; w = 1 is none."""

from torch import Tensor, nn

from models.interpolant import Interpolant
from models.sampler import DenoiserLike


class Guided(nn.Module):
    """A denoiser pushed from what it says unconditionally (u) towards, and past, what it says of cond (c).

    Args:
        denoiser: called as denoiser(x_t, t, cond) and, without a condition, denoiser(x_t, t, None).
        scale: w; 0 is unconditional, 1 is the denoiser itself at its own cost.
    """

    def __init__(self, denoiser: DenoiserLike, scale: float):
        super().__init__()
        self.denoiser, self.scale = denoiser, scale
        self.evaluations = 1 if scale == 1 else 2

    @property
    def interpolant(self) -> Interpolant:
        """The guided denoiser's own interpolant."""
        return self.denoiser.interpolant  # type: ignore[attr-defined]

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the guided (x_hat, eps_hat); they are linear in the output, so that any row gives the same."""
        c = self.denoiser(x_t, t, cond)
        if self.scale == 1:
            return c
        u = self.denoiser(x_t, t, None)
        return u[0] + self.scale * (c[0] - u[0]), u[1] + self.scale * (c[1] - u[1])
