"""A trained denoiser seen through another interpolant: at equal SNR the states are the same up to scale."""

import torch
from torch import Tensor, nn

from models.interpolant import Interpolant, expand
from models.sampler import DenoiserLike, cost


class Retimed(nn.Module):
    """The same denoiser for the states of another interpolant, so that a VP teacher is sampled as a flow (2206.00364, app. C).

    A state at t is scaled and handed to the denoiser at the time of equal SNR. Where the other interpolant is more noise, or
    more data, than the denoiser knows, the nearer end of its [0, 1] stands in, as long as that is off by no more than `gap`.

    Args:
        denoiser: called as denoiser(x_t, t, cond), with an attribute `interpolant`.
        interpolant: of the states that are given to the result.
        gap: how far the interpolant's ends may lie outside the denoiser's, as an angle atan2(sigma, alpha) in radians.
    """

    def __init__(self, denoiser: DenoiserLike, interpolant: Interpolant, gap: float = 0.1):
        super().__init__()
        self.denoiser, self.interpolant, self.gap = denoiser, interpolant, gap
        own: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        (low, high), (first, last) = (torch.atan2(*reversed(i(ends))).tolist() for i in (own, interpolant))
        if not max(low - first, last - high) <= gap:
            raise ValueError(
                f"Retimed: {interpolant!r} runs from angle {first:.4g} to {last:.4g}, the denoiser's {own!r} only from {low:.4g} "
                f"to {high:.4g}, which is more than gap {gap} short; raise gap, or take an interpolant within it"
            )

    def evaluations(self, t: Tensor) -> int:
        """Return the network evaluations of one call at t, per sample: the denoiser's own."""
        return cost(self.denoiser, self._there(t)[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of the states."""
        return self.denoiser.shape  # type: ignore[attr-defined]

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W), of the state x_t at t of shape (B,) or () of the other interpolant."""
        time, scale = self._there(t)
        return self.denoiser(expand(scale, x_t) * x_t, time, cond)

    def _there(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the denoiser's own time of equal SNR, and its states' scale over ours."""
        own: Interpolant = self.denoiser.interpolant  # type: ignore[attr-defined]
        here = self.interpolant(t.to(torch.promote_types(t.dtype, torch.float32)))
        time = own.time(*here)
        return time, torch.hypot(*own(time)) / torch.hypot(*here)
