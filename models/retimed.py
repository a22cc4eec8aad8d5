"""A trained denoiser on another interpolant: at equal SNR the states differ only in scale."""

import torch
from torch import Tensor, nn

from models.denoiser import DenoiserLike, cost, first_level, is_two_time, jump
from models.interpolant import Interpolant, expand


class Retimed(nn.Module):
    """The same denoiser for the states of another interpolant: it samples a VP teacher as a flow.

    Karras et al. 2022 (arXiv 2206.00364), appendix C. A state at t is rescaled and passed to the
    denoiser at the time of equal SNR. Where the new interpolant reaches more noise, or more data,
    than the denoiser's, the nearer end of the denoiser's [0, 1] is used, if the difference is at
    most `gap`.

    Args:
        denoiser: called as denoiser(x_t, t, cond), with an attribute `interpolant`.
        interpolant: of the states that the result receives.
        gap: how far the interpolant's ends may lie outside the denoiser's, as an angle
            atan2(sigma, alpha) in radians.
    """

    def __init__(self, denoiser: DenoiserLike, interpolant: Interpolant, gap: float = 0.1):
        super().__init__()
        self.denoiser = denoiser
        self.interpolant = interpolant
        self.gap = gap
        inner = denoiser.interpolant
        inner_low, inner_high = _end_angles(inner)
        low, high = _end_angles(interpolant)
        if not max(inner_low - low, high - inner_high) <= gap:
            raise ValueError(
                f"Retimed: the angles of {interpolant!r} run from {low:.4g} to {high:.4g}, those "
                f"of the denoiser's {inner!r} only from {inner_low:.4g} to {inner_high:.4g}, more "
                f"than gap {gap} short; use an interpolant within it, or another gap"
            )

    def evaluations(self, t: Tensor) -> int:
        """Return the network evaluations of one call at t, per sample: the denoiser's own."""
        time, _ = self._equal_snr(t)
        return cost(self.denoiser, time)

    @property
    def two_time(self) -> bool:
        """Whether the denoiser takes a second time."""
        return is_two_time(self.denoiser)

    @property
    def first_level(self) -> float:
        """The least t that the denoiser's network is trained on, on our interpolant."""
        level = first_level(self.denoiser)
        if level > 0:
            alpha, sigma = self.denoiser.interpolant(torch.tensor(level, dtype=torch.float64))
            level = self.interpolant.time_of_snr(alpha, sigma).item()
        return max(level, self.interpolant.first_level)

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), shapes (B, C, H, W), for the state x_t of the new interpolant.

        Args:
            x_t: states, (B, C, H, W).
            t: their times, (B,) or ().
            cond: the network's condition.
            s: times to jump to, (B,) or (), if the denoiser takes a second time.
        """
        time, scale = self._equal_snr(t)
        scaled = expand(scale, x_t) * x_t
        t_end = None
        if s is not None:
            t_end, _ = self._equal_snr(s)
        return jump(self.denoiser, scaled, time, cond, t_end)

    def _equal_snr(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the denoiser's time of equal SNR, and the scale of its states relative to ours."""
        inner = self.denoiser.interpolant
        alpha, sigma = self.interpolant(t.to(torch.promote_types(t.dtype, torch.float32)))
        time = inner.time_of_snr(alpha, sigma)
        return time, torch.hypot(*inner(time)) / torch.hypot(alpha, sigma)


def _end_angles(interpolant: Interpolant) -> tuple[float, float]:
    """Return the angles atan2(sigma, alpha) at t = 0 and t = 1."""
    alpha, sigma = interpolant(torch.tensor([0.0, 1.0], dtype=torch.float64))
    low, high = torch.atan2(sigma, alpha).tolist()
    return low, high
