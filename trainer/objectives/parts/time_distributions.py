"""Time distributions: how t is drawn in training. t = 0 is data, t = 1 is noise."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.interpolant import Interpolant, Linear, find_last

END_MARGIN = 1e-5  # t is kept this far off 0 and 1, where some predictions are singular


class TimeDistribution(ABC):
    """A distribution of t in (0, 1).

    It is given by its quantiles, so that stratified uniform numbers give stratified times.
    """

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Return the t at which the cumulative probability is u, for u in [0, 1)."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """Return the probability density at t in (0, 1)."""

    def for_interpolant(self, interpolant: Interpolant) -> "TimeDistribution":
        """Return the distribution of t on this interpolant.

        It is this one itself, unless this is a distribution of the noise level.
        """
        return self

    def for_shape(self, shape: Sequence[int]) -> "TimeDistribution":
        """Return the distribution of t for states of a shape (..., H, W).

        It is this one itself, unless this depends on the resolution.
        """
        return self

    def __call__(self, u: Tensor) -> Tensor:
        """Return the times for uniform numbers u, of their dtype, off the ends of [0, 1]."""
        return self.quantile(u).clamp(END_MARGIN, 1 - END_MARGIN)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return n independent times, float32, on the generator's device."""
        if n < 0:
            raise ValueError(f"{type(self).__name__}.sample: n is {n}; it must be at least 0")
        device = generator.device if generator else None
        return self(torch.rand(n, generator=generator, device=device))


def invert_increasing(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Return the t in [0, 1] at which an increasing function takes the values, to 2^-48."""

    def is_below(t: Tensor) -> Tensor:
        return function(t) <= values[..., None]

    return find_last(is_below, values.double(), parts=16, rounds=12).to(values.dtype)


class Uniform(TimeDistribution):
    """Every t is equally likely."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class LogitNormal(TimeDistribution):
    """logit t is normal (Stable Diffusion 3, Esser et al. 2024, arXiv 2403.03206).

    On Linear it is also the distribution of EDM's log-normal sigma.

    Args:
        mean: of logit t; positive favours noise.
        std: of logit t, positive.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        if not 0 < std < math.inf:
            raise ValueError(f"LogitNormal: std is {std}; it must be positive")
        self.mean = mean
        self.std = std

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        norm = self.std * math.sqrt(2 * math.pi) * t * (1 - t)
        return torch.exp(-(z**2) / 2) / norm


class LogNormalSigma(TimeDistribution):
    """log(sigma / alpha) is normal (EDM, Karras et al. 2022, arXiv 2206.00364, table 1).

    It is a distribution of the noise level, from which the interpolant makes one of t. Levels
    that the interpolant does not reach are left out: the normal is truncated. On Linear it is
    LogitNormal.

    Args:
        mean: of log(sigma / alpha), for data scaled to a variance of about one; positive
            favours noise.
        std: of log(sigma / alpha), positive.
        interpolant: converts noise levels to t; by default the denoiser's in training, and
            Linear elsewhere.
    """

    def __init__(
        self, mean: float = -1.2, std: float = 1.2, interpolant: Interpolant | None = None
    ):
        if not 0 < std < math.inf:
            raise ValueError(f"LogNormalSigma: std is {std}; it must be positive")
        self.mean = mean
        self.std = std
        self.interpolant = interpolant
        # The normal's probability below the least level, and within the levels reached.
        ends = self._level(torch.tensor([0.0, 1.0], dtype=torch.float64))
        self.below = torch.special.ndtr(ends[0]).item()
        self.within = torch.special.ndtr(ends).diff().item()
        if self.within < 1e-3:
            low, high = (ends * std + mean).exp().tolist()
            least = math.log(low or END_MARGIN)
            largest = math.log(high)
            raise ValueError(
                f"LogNormalSigma: mean {mean} and std {std} lie outside the levels of "
                f"{interpolant}, where sigma / alpha runs from {low:.3g} to {high:.3g}; "
                f"choose a mean between {least:.3g} and {largest:.3g}"
            )

    def _level(self, t: Tensor) -> Tensor:
        """Return log(sigma / alpha) in standard deviations from the mean; it increases with t."""
        alpha, sigma = (self.interpolant or Linear())(t)
        return ((sigma / alpha).log() - self.mean) / self.std

    def for_interpolant(self, interpolant: Interpolant) -> TimeDistribution:
        if self.interpolant:
            return self
        return LogNormalSigma(self.mean, self.std, interpolant)

    def quantile(self, u: Tensor) -> Tensor:
        levels = torch.special.ndtri(self.below + self.within * u.double())
        return invert_increasing(self._level, levels).to(u.dtype)

    def density(self, t: Tensor) -> Tensor:
        interpolant = self.interpolant or Linear()
        alpha, sigma = interpolant(t)
        d_alpha, d_sigma = interpolant.derivatives(t)
        slope = (d_sigma / sigma - d_alpha / alpha) / self.std
        level = self._level(t)
        return torch.exp(-(level**2) / 2) / math.sqrt(2 * math.pi) * slope / self.within


class Mode(TimeDistribution):
    """t = 1 - u - s (cos^2(pi u / 2) - 1 + u), u uniform.

    Esser et al. 2024 (arXiv 2403.03206), eq. 20.

    Args:
        s: in [-1, 1.752]; positive favours the middle, negative the ends, 0 is Uniform.
    """

    def __init__(self, s: float = 1.29):
        if not -1 <= s <= 1.752:
            raise ValueError(
                f"Mode: s is {s}; it must lie in [-1, 1.752], where t is monotone in u"
            )
        self.s = s
        # The exact bound of monotonicity is 2 / (pi - 2) = 1.75194.
        self.slope = min(s, 2 / (math.pi - 2))

    def quantile(self, u: Tensor) -> Tensor:
        # Here u is 1 - u of the paper, so that t increases with u.
        bend = torch.sin(math.pi / 2 * u).square() - u
        return u - self.slope * bend

    def density(self, t: Tensor) -> Tensor:
        u = invert_increasing(self.quantile, t)
        bend_slope = math.pi / 2 * torch.sin(math.pi * u) - 1
        return 1 / (1 - self.slope * bend_slope)


class CosMap(TimeDistribution):
    """p(t) = 2 / (pi (1 - 2t + 2t^2)) (Esser et al. 2024, arXiv 2403.03206, eq. 21).

    On Linear it has the log SNR of the cosine schedule.
    """

    def quantile(self, u: Tensor) -> Tensor:
        sin = torch.sin(math.pi / 2 * u)
        cos = torch.cos(math.pi / 2 * u)
        return sin / (sin + cos)

    def density(self, t: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


class UShaped(TimeDistribution):
    """p(t) proportional to cosh(a (t - 1/2)) (Lee et al. 2024, arXiv 2405.20320).

    It favours both ends, which matter most when a student learns from pairs.

    Args:
        a: how strongly, in (0, 80].
    """

    def __init__(self, a: float = 4.0):
        if not 0 < a <= 80:
            raise ValueError(f"UShaped: a is {a}; it must be positive and at most 80")
        self.a = a

    def quantile(self, u: Tensor) -> Tensor:
        end = math.sinh(self.a / 2)
        return 0.5 + torch.asinh((2 * u - 1) * end) / self.a

    def density(self, t: Tensor) -> Tensor:
        norm = 2 * math.sinh(self.a / 2)
        return self.a * torch.cosh(self.a * (t - 0.5)) / norm


class Exponential(TimeDistribution):
    """p(t) = a exp(a t) / (exp(a) - 1), one half of UShaped.

    Lee et al. 2024 (arXiv 2405.20320), section 4.1.

    Args:
        a: how strongly one end is favoured, within [-80, 80] and not 0 (which is Uniform);
            positive favours noise, negative data.
    """

    def __init__(self, a: float = 4.0):
        if not 0 < abs(a) <= 80:
            raise ValueError(
                f"Exponential: a is {a}; it must lie in [-80, 80] and not be 0, which is Uniform"
            )
        self.a = a

    def quantile(self, u: Tensor) -> Tensor:
        return torch.logaddexp(u.log() + self.a, torch.log1p(-u)) / self.a

    def density(self, t: Tensor) -> Tensor:
        return self.a * torch.exp(self.a * t) / math.expm1(self.a)


class ShiftedTimes(TimeDistribution):
    """Times of another distribution, shifted: t' = s t / (1 + (s - 1) t).

    Esser et al. 2024 (arXiv 2403.03206), eq. 23.

    Args:
        times: the distribution of t; Uniform by default.
        shift: s, positive; above 1 favours noise.
    """

    def __init__(self, times: TimeDistribution | None = None, shift: float = 3.0):
        if not 0 < shift < math.inf:
            raise ValueError(f"ShiftedTimes: shift is {shift}; it must be positive")
        self.times = times or Uniform()
        self.shift = shift

    def for_interpolant(self, interpolant: Interpolant) -> TimeDistribution:
        return ShiftedTimes(self.times.for_interpolant(interpolant), self.shift)

    def for_shape(self, shape: Sequence[int]) -> TimeDistribution:
        return ShiftedTimes(self.times.for_shape(shape), self.shift)

    def quantile(self, u: Tensor) -> Tensor:
        t = self.times.quantile(u)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def density(self, t: Tensor) -> Tensor:
        # t = t' / (s - (s - 1) t'), with the slope s / (s - (s - 1) t')^2
        divisor = self.shift - (self.shift - 1) * t
        return self.times.density(t / divisor) * self.shift / divisor.square()


class ShiftedByResolution(TimeDistribution):
    """Times of another distribution, shifted towards noise for larger states.

    The same noise hides less of a larger image. It is `ShiftedTimes` with the shift
    sqrt(height x width) / base_size (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).

    Args:
        times: the distribution of t at the base size; Uniform by default.
        base_size: height and width of states without a shift, in numbers of latents, or in pixels
            without a codec. The default is that of 256 pixels with a codec of factor 8.
    """

    def __init__(self, times: TimeDistribution | None = None, base_size: int = 32):
        if base_size < 1:
            raise ValueError(
                f"ShiftedByResolution: base_size is {base_size}; it must be at least 1"
            )
        self.times = times or Uniform()
        self.base_size = base_size

    def for_interpolant(self, interpolant: Interpolant) -> TimeDistribution:
        return ShiftedByResolution(self.times.for_interpolant(interpolant), self.base_size)

    def for_shape(self, shape: Sequence[int]) -> TimeDistribution:
        height, width = shape[-2:]
        return ShiftedTimes(self.times, math.sqrt(height * width) / self.base_size)

    def quantile(self, u: Tensor) -> Tensor:
        return self.times.quantile(u)

    def density(self, t: Tensor) -> Tensor:
        return self.times.density(t)
