"""Interpolants `x_t = alpha(t) x + sigma(t) eps`: t = 0 is data, t = 1 is noise."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """View per-sample numbers t, shape (B,) or (), so that they multiply `like`, shape (B, ...), sample by sample.

    The one place where t is broadcast: a t that happened to match the last axis would give silently wrong numbers.
    """
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


class Interpolant(ABC):
    """A Gaussian probability path (Stochastic Interpolants, 2303.08797; Flow Matching, 2210.02747)."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) of t in [0, 1], each of t's shape and dtype; the signal-to-noise ratio falls with t."""

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha', sigma'), the derivatives with respect to t, by forward-mode differentiation."""
        flat = t.reshape(-1).clone()  # a tangent cannot be attached to an expanded t, and turns float64 on a scalar
        alpha, sigma = torch.func.jvp(self, (flat,), (torch.ones_like(flat),))[1]
        return alpha.reshape(t.shape), sigma.reshape(t.shape)

    def mix(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the state x_t of data x and noise eps, both (B, ...), at t of shape (B,) or ()."""
        alpha, sigma = self(t)
        return expand(alpha, x) * x + expand(sigma, x) * eps

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


class Linear(Interpolant):
    """alpha = 1 - t, sigma = sigma_min + (1 - sigma_min) t: rectified flow (2209.03003), flow matching (2210.02747).

    Args:
        sigma_min: noise left at t = 0, in [0, 1).
    """

    def __init__(self, sigma_min: float = 0.0):
        if not 0 <= sigma_min < 1:
            raise ValueError(f"Linear: sigma_min is {sigma_min}, it must lie in [0, 1)")
        self.sigma_min = sigma_min

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, self.sigma_min + (1 - self.sigma_min) * t


class Trigonometric(Interpolant):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): the generalised variance-preserving path of SiT (2401.08740)."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)


class VariancePreserving(Interpolant):
    """The VP SDE's marginals with a linear beta(t) (Score SDE, 2011.13456, eq. 29). alpha(1) = .0066 is not zero.

    Args:
        beta_min: rate of noising at t = 0, positive.
        beta_max: rate of noising at t = 1, at least beta_min.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"VariancePreserving: needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -(self.beta_max - self.beta_min) * t**2 / 4 - self.beta_min * t / 2
        # expm1: 1 - alpha^2 loses three digits near t = 0
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
