"""Time laws: how t is drawn in training. t = 1 is noise."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from models.interpolant import Interpolant, Linear

EDGE = 1e-5  # t is kept in [EDGE, 1 - EDGE]: rows are singular at the ends


class Times(ABC):
    """A law of t in (0, 1), given by its quantiles, so that stratified uniforms give stratified times."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the t below which the law has probability u, for u in [0, 1)."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Return the law's probability density at t in (0, 1)."""

    def on(self, interpolant: Interpolant) -> "Times":
        """Return the law of t for this interpolant: itself, unless it is a law of the noise level."""
        return self

    def __call__(self, u: Tensor) -> Tensor:
        """Return times of uniform numbers u, of their dtype, off the ends of [0, 1]."""
        return self.quantile(u).clamp(EDGE, 1 - EDGE)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return n independent times, float32, on the generator's device."""
        if n < 0:
            raise ValueError(f"{type(self).__name__}.sample: n is {n}, it must not be negative")
        return self(torch.rand(n, generator=generator, device=generator.device if generator else None))


def inverse(rising: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Return the t in [0, 1] where a rising function takes the values, to 2^-48: each round keeps one of 16 parts."""
    low, width = torch.zeros_like(values, dtype=torch.float64), 1.0
    for _ in range(12):
        width /= 16
        ends = low[..., None] + width * torch.arange(1, 16, dtype=low.dtype, device=low.device)
        low = low + width * (rising(ends) <= values[..., None]).sum(-1)
    return low.to(values.dtype)


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
        if not 0 < std < math.inf:
            raise ValueError(f"LogitNormal: std is {std}, it must be positive")
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        return torch.exp(-(z**2) / 2) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))


class LogNormalSigma(Times):
    """log(sigma / alpha) is normal (EDM, 2206.00364, table 1): a law of the noise level, which the interpolant makes one of t.

    Levels that the interpolant does not reach are left out (the normal is truncated). On Linear it is LogitNormal.

    Args:
        mean: of log(sigma / alpha), sigma in units in which the data have a variance of about one; positive leans to noise.
        std: of log(sigma / alpha), positive.
        interpolant: that makes it a law of t; by default the denoiser's own in training, and Linear elsewhere.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, interpolant: Interpolant | None = None):
        if not 0 < std < math.inf:
            raise ValueError(f"LogNormalSigma: std is {std}, it must be positive")
        self.mean, self.std, self.interpolant = mean, std, interpolant
        ends = self._level(torch.tensor([0.0, 1.0], dtype=torch.float64))
        self.below, self.within = torch.special.ndtr(ends[0]).item(), torch.special.ndtr(ends).diff().item()
        if self.within < 1e-3:
            low, high = (ends * std + mean).exp().tolist()
            raise ValueError(
                f"LogNormalSigma: mean {mean} and std {std} lie outside the levels of {interpolant}, whose sigma / alpha "
                f"runs from {low:.3g} to {high:.3g}: choose a mean between {math.log(low or EDGE):.3g} and {math.log(high):.3g}"
            )

    def _level(self, t: Tensor) -> Tensor:
        """Return log(sigma / alpha) in standard deviations from the mean; it rises with t."""
        alpha, sigma = (self.interpolant or Linear())(t)
        return ((sigma / alpha).log() - self.mean) / self.std

    def on(self, interpolant: Interpolant) -> Times:
        return self if self.interpolant else LogNormalSigma(self.mean, self.std, interpolant)

    def quantile(self, u: Tensor) -> Tensor:
        return inverse(self._level, torch.special.ndtri(self.below + self.within * u.double())).to(u.dtype)

    def density(self, t: Tensor) -> Tensor:
        interpolant = self.interpolant or Linear()
        (alpha, sigma), (da, ds) = interpolant(t), interpolant.rates(t)
        slope = (ds / sigma - da / alpha) / self.std
        return torch.exp(-(self._level(t) ** 2) / 2) / math.sqrt(2 * math.pi) * slope / self.within


class Mode(Times):
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u) with u uniform (SD3, 2403.03206, eq. 20).

    Args:
        s: in [-1, 1.752]; positive favours the middle, negative the ends, 0 is Uniform.
    """

    def __init__(self, s: float = 1.29):
        if not -1 <= s <= 1.752:
            raise ValueError(f"Mode: s is {s}, it must lie in [-1, 1.752], where t is monotone in u")
        self.s = s
        self.slope = min(s, 2 / (math.pi - 2))  # the exact bound, 1.75194: beyond it t would turn back by a hair

    def quantile(self, u: Tensor) -> Tensor:
        return u - self.slope * (torch.sin(math.pi / 2 * u).square() - u)  # the paper's u is 1 - u: this one rises

    def density(self, t: Tensor) -> Tensor:
        u = inverse(self.quantile, t)
        return 1 / (1 - self.slope * (math.pi / 2 * torch.sin(math.pi * u) - 1))


class CosMap(Times):
    """p(t) = 2 / (pi (1 - 2t + 2t^2)): log SNR on Linear is that of the cosine schedule (SD3, 2403.03206, eq. 21)."""

    def quantile(self, u: Tensor) -> Tensor:
        sin, cos = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        return sin / (sin + cos)

    def density(self, t: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


class UShaped(Times):
    """p(t) proportional to cosh(a (t - 1/2)): the ends matter in stage two (2405.20320).

    Args:
        a: how much, in (0, 80].
    """

    def __init__(self, a: float = 4.0):
        if not 0 < a <= 80:
            raise ValueError(f"UShaped: a is {a}, it must be positive and at most 80")
        self.a = a

    def quantile(self, u: Tensor) -> Tensor:
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a

    def density(self, t: Tensor) -> Tensor:
        return self.a * torch.cosh(self.a * (t - 0.5)) / (2 * math.sinh(self.a / 2))


class Exponential(Times):
    """p(t) = a exp(a t) / (exp(a) - 1): one half of UShaped (2405.20320, section 4.1).

    Args:
        a: how much, not 0 (that is Uniform) and within [-80, 80]; positive leans to noise, negative to data.
    """

    def __init__(self, a: float = 4.0):
        if not 0 < abs(a) <= 80:
            raise ValueError(f"Exponential: a is {a}, it must lie in [-80, 80] and not be 0, which is Uniform")
        self.a = a

    def quantile(self, u: Tensor) -> Tensor:
        return torch.logaddexp(u.log() + self.a, torch.log1p(-u)) / self.a

    def density(self, t: Tensor) -> Tensor:
        return self.a * torch.exp(self.a * t) / math.expm1(self.a)
