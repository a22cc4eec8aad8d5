"""Interpolants `x_t = alpha(t) x + sigma(t) eps`: t = 0 is data, t = 1 is noise.

In diffusers this is a schedule, in flow matching a path.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from data.files import digest


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Reshape per-sample numbers t, shape (B,) or (), so that they multiply `like`, shape (B, ...).

    This is the one function that broadcasts t: a t that happened to match the last axis would
    silently give wrong numbers.
    """
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def is_inspectable(t: Tensor) -> bool:
    """Whether t's values can be read without a device sync.

    It is False on a GPU, under torch.compile and under vmap.
    """
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.is_batchedtensor(t)
    )


def find_last(holds: Callable[[Tensor], Tensor], like: Tensor, parts: int, rounds: int) -> Tensor:
    """Return the last t in [0, 1) of a fine grid at which a condition holds, or 0.

    It inverts monotone functions: let the condition be that the function has not passed a value.
    Each round divides an interval into equal parts and keeps one of them.

    Args:
        holds: returns whether the condition holds at times, shape (..., parts - 1); wherever it
            holds, it holds at all earlier times.
        like: has the shape, dtype and device of the result.
        parts: of the interval in each round, a power of 2.
        rounds: the grid has parts^rounds steps.
    """
    t = torch.zeros_like(like)
    inner = torch.arange(1, parts, dtype=like.dtype, device=like.device)
    width = 1.0
    for _ in range(rounds):
        width /= parts
        t = t + width * holds(t[..., None] + width * inner).sum(-1)
    return t


class Interpolant(ABC):
    """A Gaussian probability path.

    Stochastic interpolants (Albergo et al. 2023, arXiv 2303.08797); flow matching (Lipman et al.
    2022, arXiv 2210.02747).
    """

    @property
    def first_level(self) -> float:
        """The least t that a network is trained on; 0 if there are networks for every t > 0."""
        return 0.0

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at t in [0, 1], each with t's shape and dtype.

        The signal-to-noise ratio (alpha / sigma)^2 falls with t.
        """

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha', sigma'), the derivatives in t, by forward-mode differentiation."""
        # A tangent cannot be attached to an expanded t, and becomes float64 for a scalar.
        flat = t.reshape(-1).clone()
        alpha, sigma = torch.func.jvp(self, (flat,), (torch.ones_like(flat),))[1]
        return alpha.reshape(t.shape), sigma.reshape(t.shape)

    def time_of_snr(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the t at which alpha(t) : sigma(t) equals alpha : sigma, of their shape.

        Where no t has this ratio, return the nearer end of [0, 1]. It is as accurate as the
        rounding of t.
        """

        def is_cleaner(t: Tensor) -> Tensor:
            a, s = self(t)
            return s * alpha[..., None] <= a * sigma[..., None]

        rounds = 8 if alpha.dtype == torch.float64 else 5
        return find_last(is_cleaner, alpha, 256, rounds)

    def mix(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the state x_t of data x and noise eps, both (B, ...), at t of shape (B,) or ()."""
        alpha, sigma = self(t)
        return expand(alpha, x) * x + expand(sigma, x) * eps

    def solve_pair(self, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (x, eps) for which `x_t = mix(x, eps, t)` and `x_s = mix(x, eps, s)`.

        On a first-order trajectory these are its data and noise (Wang et al. 2024, arXiv
        2410.07303).

        Args:
            x_t: states at t, (B, ...).
            t: of shape (B,) or ().
            x_s: states at s, (B, ...).
            s: of shape (B,) or (), different from t. alpha may be 0 at either time.
        """
        alpha_t, sigma_t = self(t)
        alpha_s, sigma_s = self(s)
        determinant = alpha_t * sigma_s - alpha_s * sigma_t
        alpha_t = expand(alpha_t / determinant, x_t)
        sigma_t = expand(sigma_t / determinant, x_t)
        alpha_s = expand(alpha_s / determinant, x_t)
        sigma_s = expand(sigma_s / determinant, x_t)
        return sigma_s * x_t - sigma_t * x_s, alpha_t * x_s - alpha_s * x_t

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class Linear(Interpolant):
    """alpha = 1 - t, sigma = sigma_min + (1 - sigma_min) t.

    With sigma_min = 0: rectified flow (Liu et al. 2022, arXiv 2209.03003); flow matching (Lipman et
    al. 2022, arXiv 2210.02747).

    Args:
        sigma_min: noise left at t = 0, in [0, 1).
    """

    def __init__(self, sigma_min: float = 0.0):
        if not 0 <= sigma_min < 1:
            raise ValueError(f"Linear: sigma_min is {sigma_min}; it must lie in [0, 1)")
        self.sigma_min = sigma_min

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, self.sigma_min + (1 - self.sigma_min) * t

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(t, -1.0), torch.full_like(t, 1 - self.sigma_min)


class Trigonometric(Interpolant):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): SiT's GVP path.

    Ma et al. 2024 (arXiv 2401.08740).
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)


def _log_alpha(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """Return log alpha of VP and sub-VP, `-int_0^t beta / 2`, where beta(t) is linear."""
    return -(beta_max - beta_min) * t**2 / 4 - beta_min * t / 2


class VariancePreserving(Interpolant):
    """The marginals of the VP SDE with a linear beta(t).

    Song et al. 2020 (arXiv 2011.13456), eq. 29. alpha(1) = .0066 is not zero, so t = 1 is not pure
    noise.

    Args:
        beta_min: noising rate at t = 0, positive.
        beta_max: noising rate at t = 1, at least beta_min.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        _check_betas("VariancePreserving", beta_min, beta_max)
        self.beta_min = beta_min
        self.beta_max = beta_max

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = _log_alpha(t, self.beta_min, self.beta_max)
        # expm1: 1 - alpha^2 loses three digits near t = 0
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


class SubVariancePreserving(Interpolant):
    """The marginals of the sub-VP SDE: VP's alpha, sigma = 1 - alpha^2.

    Song et al. 2020 (arXiv 2011.13456), eq. 29.

    Args:
        beta_min: noising rate at t = 0, positive.
        beta_max: noising rate at t = 1, at least beta_min.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        _check_betas("SubVariancePreserving", beta_min, beta_max)
        self.beta_min = beta_min
        self.beta_max = beta_max

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = _log_alpha(t, self.beta_min, self.beta_max)
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)


class VarianceExploding(Interpolant):
    """The marginals of the VE SDE: alpha = 1, sigma geometric from sigma_min to sigma_max.

    Song et al. 2020 (arXiv 2011.13456), eq. 29 and appendix C.

    Args:
        sigma_min: noise left at t = 0, positive.
        sigma_max: noise at t = 1, far above the data's standard deviation, because the data is
            still in the state there.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        _check_sigmas("VarianceExploding", sigma_min, sigma_max)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_ratio = math.log(self.sigma_max / self.sigma_min)
        return torch.ones_like(t), self.sigma_min * torch.exp(log_ratio * t)


class ImprovedCosine(Interpolant):
    """alpha = cos(phi) / cos(phi_0), phi = (t + s) / (1 + s) pi / 2, alpha^2 + sigma^2 = 1.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17.

    Args:
        s: offset that keeps the first steps from being too small, positive.
    """

    def __init__(self, s: float = 0.008):
        if not 0 < s < math.inf:
            raise ValueError(
                f"ImprovedCosine: s is {s}; it must be positive (for s = 0 use Trigonometric)"
            )
        self.s = s

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        unit = math.pi / 2 / (1 + self.s)
        first = unit * self.s
        # Products of sines: 1 - alpha^2 loses three digits near t = 0, and cos(pi / 2) is not
        # exactly zero in floating point.
        square = torch.sin(unit * t) * torch.sin(unit * t + 2 * first)
        return torch.sin(unit * (1 - t)) / math.cos(first), square.sqrt() / math.cos(first)


class EDMPath(Interpolant):
    """alpha = 1, sigma^(1 / rho) linear in t: EDM's grid is uniform in t.

    Karras et al. 2022 (arXiv 2206.00364), eq. 5.

    Args:
        sigma_min: noise left at t = 0, positive.
        sigma_max: noise at t = 1, far above the data's standard deviation, because the data is
            still in the state there.
        rho: the larger, the finer a uniform grid divides low noise levels; 1 divides evenly.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        _check_sigmas("EDMPath", sigma_min, sigma_max)
        if not 0 < rho < math.inf:
            raise ValueError(f"EDMPath: rho is {rho}; it must be positive")
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.rho = rho

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low = self.sigma_min ** (1 / self.rho)
        high = self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (low + (high - low) * t) ** self.rho


def _check_betas(name: str, beta_min: float, beta_max: float) -> None:
    if not 0 < beta_min <= beta_max:
        raise ValueError(
            f"{name}: beta_min is {beta_min} and beta_max is {beta_max}; "
            "they must satisfy 0 < beta_min <= beta_max"
        )


def _check_sigmas(name: str, sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"{name}: sigma_min is {sigma_min} and sigma_max is {sigma_max}; "
            "they must satisfy 0 < sigma_min < sigma_max"
        )


class Shifted(Interpolant):
    """Another interpolant at a shifted time, logit t' = logit t + log shift.

    Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206), eq. 23.

    Args:
        interpolant: evaluated at t'. It must not be shifted itself: shifts multiply, so pass their
            product once.
        shift: positive; above 1 spends more of t on noise.
    """

    def __init__(self, interpolant: Interpolant, shift: float):
        if isinstance(interpolant, Shifted):
            raise ValueError(
                f"Shifted: {interpolant!r} is shifted already; "
                "shifts multiply, so pass their product once"
            )
        if not 0 < shift < math.inf:
            raise ValueError(f"Shifted: shift is {shift}; it must be positive")
        self.interpolant = interpolant
        self.shift = shift

    @property
    def first_level(self) -> float:
        level = self.interpolant.first_level
        return level / (self.shift - (self.shift - 1) * level)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.interpolant(self.shift * t / (1 + (self.shift - 1) * t))


class Discrete(Interpolant):
    """A chain of N noising steps: alpha^2 = alphas_cumprod[i] = 1 - sigma^2 at t = (i + 1) / N.

    DDPM (Ho et al. 2020, arXiv 2006.11239), eq. 4. Between the indices, lambda = log(alpha / sigma)
    is a monotone cubic, so that the derivatives are continuous. Where lambda is infinite, a ratio
    is linear in t: sigma / alpha from 0 at t = 0 to its value at index 0, and alpha / sigma to 0 at
    t = 1 when the terminal SNR is zero.

    Args:
        betas: variances added by the steps, at least 3, each in (0, 1).
        zero_terminal_snr: rescale alpha so that t = 1 is pure noise (Lin et al. 2023, arXiv
            2305.08891, algorithm 1).
    """

    def __init__(self, betas: list[float], zero_terminal_snr: bool = False):
        _check_chain(betas)
        self.betas = [float(beta) for beta in betas]
        self.zero_terminal_snr = zero_terminal_snr
        variances = torch.tensor(self.betas, dtype=torch.float64)
        log_alpha = torch.log1p(-variances).cumsum(0) / 2
        if zero_terminal_snr:  # the last lambda is -inf, so it is not a knot
            first = log_alpha[0].exp()
            last = log_alpha[-1].exp()
            rescaled = (log_alpha[:-1].exp() - last) * first / (first - last)
            log_alpha = rescaled.log()
        log_variance = torch.log(-torch.expm1(2 * log_alpha))
        self._knots = _monotone_cubic(log_alpha - log_variance / 2)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def first_level(self) -> float:
        return 1 / len(self.betas)

    @classmethod
    def linear(
        cls,
        n: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
    ) -> "Discrete":
        """Return DDPM's schedule: n evenly spaced betas (arXiv 2006.11239, section 4)."""
        return cls(_evenly_spaced(beta_start, beta_end, n), zero_terminal_snr)

    @classmethod
    def scaled_linear(
        cls,
        n: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
    ) -> "Discrete":
        """Return n betas with evenly spaced square roots (Rombach et al. 2021, arXiv 2112.10752).

        Stable Diffusion's betas run from .00085 to .012.
        """
        roots = _evenly_spaced(math.sqrt(beta_start), math.sqrt(beta_end), n)
        return cls([root * root for root in roots], zero_terminal_snr)

    @classmethod
    def squaredcos_cap_v2(cls, n: int = 1000, zero_terminal_snr: bool = False) -> "Discrete":
        """Return the cosine schedule with betas capped at .999 (arXiv 2102.09672, eq. 17)."""
        angles = [(i / n + 0.008) / 1.008 * math.pi / 2 for i in range(n + 1)]
        bars = [math.cos(angle) ** 2 for angle in angles]
        betas = [min(1 - later / bar, 0.999) for bar, later in pairwise(bars)]
        return cls(betas, zero_terminal_snr)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._knots_like(t)
        n = len(self.betas)
        # lambda by the cubic Hermite polynomial between two indices
        index = t * n - 1  # not rounded
        i = index.detach().floor().long().clamp(0, table.shape[1] - 2)
        f = (index - i).clamp(0, 1)
        y, m = table[:, i]
        z, k = table[:, i + 1]
        rise = z - y
        log_snr = 2 * (y + f * (m + f * (3 * rise - 2 * m - k + f * (m + k - 2 * rise))))
        # alpha and sigma, with a linear ratio where lambda is infinite
        alpha = torch.sigmoid(log_snr).sqrt()
        sigma = torch.sigmoid(-log_snr).sqrt() * (index + 1).clamp(max=1)
        if self.zero_terminal_snr:
            alpha = alpha * (n - 1 - index).clamp(max=1)
        norm = torch.hypot(alpha, sigma)
        return alpha / norm, sigma / norm

    def _knots_like(self, t: Tensor) -> Tensor:
        """Return the knots on t's device, copied once: a copy in every call would synchronise."""
        key = t.device, t.dtype
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = self._knots.to(*key)
        return self._tables[key]

    def __repr__(self) -> str:
        count = len(self.betas)
        sha256 = digest(repr(self.betas).encode())[:8]
        zero = ", zero_terminal_snr=True" if self.zero_terminal_snr else ""
        ends = f"{self.betas[0]:.6g} to {self.betas[-1]:.6g}"
        return f"Discrete({count} betas {ends}, sha256 {sha256}{zero})"


def _check_chain(betas: list[float]) -> None:
    """Check that betas are at least three variances in (0, 1)."""
    if len(betas) < 3:
        raise ValueError(
            f"Discrete: got {len(betas)} betas; it needs at least 3 "
            "(Discrete.scaled_linear() makes 1000)"
        )
    for i, beta in enumerate(betas):
        if not 0 < beta < 1:
            hint = "pass variances, not alphas"
            if beta == 1:
                hint = "for a last beta of 1 set zero_terminal_snr"
            raise ValueError(f"Discrete: betas[{i}] is {beta}; it must lie in (0, 1); {hint}")


def _evenly_spaced(first: float, last: float, n: int) -> list[float]:
    """Return n evenly spaced numbers, with the same bits on every processor.

    Vectorised functions such as linspace do not guarantee the same bits.
    """
    return [first + (last - first) * i / (n - 1) for i in range(n)]


def _monotone_cubic(y: Tensor) -> Tensor:
    """Return (values, slopes), shape (2, K), of a falling cubic through y at equal distances.

    The slopes are those of a spline, limited so that it falls everywhere (Fritsch & Carlson 1980).
    """
    from scipy.interpolate import CubicSpline  # slow to import

    knots = range(len(y))
    slopes = torch.from_numpy(CubicSpline(knots, y.numpy())(knots, 1))
    steps = y.diff()  # all negative
    flattest = torch.maximum(torch.cat([steps[:1], steps]), torch.cat([steps, steps[-1:]]))
    limited = torch.minimum(torch.maximum(slopes, 3 * flattest), torch.zeros_like(y))
    return torch.stack([y, limited])
