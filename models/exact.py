"""Exact denoisers: what a perfectly trained network would return for a known data distribution."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand


class Modes(NamedTuple):
    """The modes of a state's distribution, (K,) each, float64."""

    means: Tensor
    variances: Tensor
    weights: Tensor


class Mixture:
    """The exact denoiser of the Gaussian mixture sum_k w_k N(m_k, s_k^2).

    All dimensions have the same distribution; they are coupled by the mode. Given mode k, x_t is
    N(alpha m_k, v_k) with v_k = alpha^2 s_k^2 + sigma^2 in every dimension. The posterior
    probabilities r_k of the modes weight
    E[x | x_t, k] = m_k + alpha s_k^2 / v_k (x_t - alpha m_k) and
    E[eps | x_t, k] = sigma / v_k (x_t - alpha m_k).

    Args:
        interpolant: of the states.
        means: m_k, the same for every dimension.
        stds: s_k, positive, one for each mean.
        weights: w_k, positive, one for each mean; their sum is 1.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        means: list[float],
        stds: list[float],
        weights: list[float],
    ):
        if not len(means) == len(stds) == len(weights) > 0:
            raise ValueError(
                f"Mixture: got {len(means)} means, {len(stds)} stds and {len(weights)} weights; "
                "pass equally many, at least one"
            )
        if not (min(stds) > 0 and min(weights) > 0 and math.isclose(sum(weights), 1, rel_tol=1e-6)):
            raise ValueError(
                f"Mixture: stds are {stds} and weights are {weights}; "
                "they must be positive, and the weights must sum to 1"
            )
        self.interpolant = interpolant
        self.means = means
        self.stds = stds
        self.weights = weights
        self._modes = torch.tensor([means, stds, weights], dtype=torch.float64)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat) = (E[x | x_t], E[eps | x_t]), with x_t's shape and dtype.

        Args:
            x_t: states, (B, ...).
            t: their times, (B,) or ().
            cond: ignored.
        """
        alpha, sigma = self.interpolant(t)
        alpha = expand(alpha.double(), x_t)[None]
        sigma = expand(sigma.double(), x_t)[None]
        m, s, w = (parameter.view(-1, *(1,) * x_t.ndim) for parameter in self._modes)
        gap = x_t.double() - alpha * m  # (K, B, ...)
        v = alpha**2 * s**2 + sigma**2
        # posterior probabilities of the modes
        log_density = -(gap**2) / v / 2 - v.log() / 2
        log_joint = log_density.flatten(2).sum(2)
        log_r = log_joint.view(*gap.shape[:2], *(1,) * (x_t.ndim - 1)) + w.log()
        r = log_r.softmax(0)
        # posterior means
        x_hat = (r * (m + alpha * s**2 / v * gap)).sum(0)
        eps_hat = (r * sigma / v * gap).sum(0)
        return x_hat.to(x_t.dtype), eps_hat.to(x_t.dtype)

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return log p_t(x_t), (B,), float64, for states x_t (B, ...) at t of shape ()."""
        modes = self._modes_at(t)
        gap = x_t.double().flatten(1) - modes.means[:, None, None]
        v = modes.variances[:, None, None]
        log_density = (-(gap**2 / v + (2 * torch.pi * v).log()) / 2).sum(2)
        return log_density.add(modes.weights.log()[:, None]).logsumexp(0)

    def distribution(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the cumulative distribution of one dimension at t, float64, with x_t's shape.

        In one dimension the flow keeps it constant along every trajectory, so that trajectories
        cannot cross.

        Args:
            x_t: values of one dimension of the state.
            t: their time, ().
        """
        modes = self._modes_at(t)
        standardised = (x_t.double()[..., None] - modes.means) / modes.variances.sqrt()
        return torch.special.ndtr(standardised) @ modes.weights

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return data x of shape (B, ...), float32."""
        m, s, w = self._modes
        k = torch.multinomial(w, shape[0], replacement=True, generator=generator)
        eps = torch.randn(shape, generator=generator)
        return expand(m[k].float(), eps) + expand(s[k].float(), eps) * eps

    def _modes_at(self, t: Tensor) -> Modes:
        """Return the modes of the states at t."""
        alpha, sigma = self.interpolant(t.double())
        m, s, w = self._modes
        return Modes(alpha * m, alpha**2 * s**2 + sigma**2, w)
