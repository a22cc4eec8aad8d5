"""Exact denoisers: what a perfectly trained network would answer where the law of the data is known."""

import math

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand


class Mixture:
    """The exact denoiser of sum_k w_k N(m_k, s_k^2), the same law in every dimension but coupled by the mode.

    x_t given mode k is N(alpha m_k, v_k), v_k = alpha^2 s_k^2 + sigma^2, in every dimension; the modes' posterior r_k weighs
    E[x | x_t, k] = m_k + alpha s_k^2 / v_k (x_t - alpha m_k) and E[eps | x_t, k] = sigma / v_k (x_t - alpha m_k).

    Args:
        interpolant: of the states.
        means: m_k, standing for every dimension.
        stds: s_k, positive, one for each mean.
        weights: w_k, positive, one for each mean; their sum is 1.
    """

    def __init__(self, interpolant: Interpolant, means: list[float], stds: list[float], weights: list[float]):
        if not len(means) == len(stds) == len(weights) > 0:
            raise ValueError(f"Mixture: {len(means)} means, {len(stds)} stds and {len(weights)} weights; give as many of each")
        if not (min(stds) > 0 and min(weights) > 0 and math.isclose(sum(weights), 1, rel_tol=1e-6)):
            raise ValueError(f"Mixture: stds {stds} and weights {weights} must be positive, and the weights' sum 1")
        self.interpolant, self.means, self.stds, self.weights = interpolant, means, stds, weights
        self._modes = torch.tensor([means, stds, weights], dtype=torch.float64)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat) = (E[x | x_t], E[eps | x_t]), shapes (B, ...) and x_t's dtype, at t of shape (B,) or ()."""
        alpha, sigma = (expand(v.double(), x_t)[None] for v in self.interpolant(t))
        m, s, w = (v.view(-1, *(1,) * x_t.ndim) for v in self._modes)
        gap, v = x_t.double() - alpha * m, alpha**2 * s**2 + sigma**2  # (K, B, ...)
        log_r = (-(gap**2) / v / 2 - v.log() / 2).flatten(2).sum(2).view(*gap.shape[:2], *(1,) * (x_t.ndim - 1)) + w.log()
        r = log_r.softmax(0)
        x_hat = (r * (m + alpha * s**2 / v * gap)).sum(0)
        return x_hat.to(x_t.dtype), (r * sigma / v * gap).sum(0).to(x_t.dtype)

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return log p_t(x_t), (B,), float64, at t of shape (), of states (B, ...)."""
        m, v, w = self._at(t)
        gap, v = x_t.double().flatten(1) - m[:, None, None], v[:, None, None]
        return (-(gap**2 / v + (2 * torch.pi * v).log()) / 2).sum(2).add(w.log()[:, None]).logsumexp(0)

    def distribution(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the probability, of x_t's shape, float64, that one dimension of a state at t, of shape (), is at most x_t.

        On a line the flow keeps it constant along every trajectory: trajectories cannot cross.
        """
        m, v, w = self._at(t)
        return torch.special.ndtr((x_t.double()[..., None] - m) / v.sqrt()) @ w

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return data x of a shape (B, ...), float32."""
        m, s, w = self._modes
        k = torch.multinomial(w, shape[0], replacement=True, generator=generator)
        eps = torch.randn(shape, generator=generator)
        return expand(m[k].float(), eps) + expand(s[k].float(), eps) * eps

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return means, variances and weights of the states' modes, (K,) each, float64."""
        (alpha, sigma), (m, s, w) = self.interpolant(t.double()), self._modes
        return alpha * m, alpha**2 * s**2 + sigma**2, w
