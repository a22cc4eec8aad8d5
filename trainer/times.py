"""Time laws: how t is drawn in training. t = 1 is noise."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

EDGE = 1e-5  # t is kept in [EDGE, 1 - EDGE]: rows are singular at the ends


class Times(ABC):
    """A law of t in (0, 1), given by its quantiles, so that stratified uniforms give stratified times."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the t below which the law has probability u, for u in [0, 1)."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Return the law's probability density at t."""

    def __call__(self, u: Tensor) -> Tensor:
        """Return times of uniform numbers u, float32, off the ends of [0, 1]."""
        return self.quantile(u).clamp(EDGE, 1 - EDGE)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return n independent times, float32."""
        return self(torch.rand(n, generator=generator))


class Uniform(Times):
    """Every t alike."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class LogitNormal(Times):
    """logit t is normal (SD3, 2403.03206); EDM's log-normal sigma, seen on Linear, is this law.

    Args:
        mean: of logit t; positive leans to noise.
        std: of logit t, positive.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        if std <= 0:
            raise ValueError(f"LogitNormal: std is {std}, it must be positive")
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-(z**2) / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


class UShaped(Times):
    """p(t) proportional to cosh(a (t - 1/2)): the ends matter in stage two (2405.20320).

    Args:
        a: how much, positive.
    """

    def __init__(self, a: float = 4.0):
        if a <= 0:
            raise ValueError(f"UShaped: a is {a}, it must be positive")
        self.a = a

    def quantile(self, u: Tensor) -> Tensor:
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a

    def density(self, t: Tensor) -> Tensor:
        return self.a * torch.cosh(self.a * (t - 0.5)) / (2 * math.sinh(self.a / 2))
