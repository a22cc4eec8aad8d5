"""Interpolants `x_t = alpha(t) x + sigma(t) eps`: t = 0 is data, t = 1 is noise."""

import hashlib
import math
from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """View per-sample numbers t, shape (B,) or (), so that they multiply `like`, shape (B, ...), sample by sample.

    The one place where t is broadcast: a t that happened to match the last axis would give silently wrong numbers.
    """
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def seen(t: Tensor) -> bool:
    """Tell whether t can be looked at for free: on a device it would make every step wait, in a trace it has no value."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not torch._C._functorch.is_batchedtensor(t)


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

    def time(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the t at which alpha(t) : sigma(t) is alpha : sigma, of their shape; the nearer end of [0, 1] where none is.

        Each round narrows [0, 1] by 256, down to the rounding of t.
        """
        t, inner = torch.zeros_like(alpha), torch.arange(1, 256, dtype=alpha.dtype, device=alpha.device)
        for power in range(1, 9 if alpha.dtype == torch.float64 else 6):
            a, s = self(t[..., None] + inner / 256.0**power)
            t = t + (s * alpha[..., None] <= a * sigma[..., None]).sum(-1) / 256.0**power
        return t

    def mix(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the state x_t of data x and noise eps, both (B, ...), at t of shape (B,) or ()."""
        alpha, sigma = self(t)
        return expand(alpha, x) * x + expand(sigma, x) * eps

    def unmix(self, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (x, eps) that make up both states, `x_t = mix(x, eps, t)` and `x_s = mix(x, eps, s)`: a chord's ends.

        On a first-order trajectory they are its data and noise (Rectified Diffusion, 2410.07303). t and s, of shape (B,) or
        (), must differ; alpha = 0 at either is no harm.
        """
        (alpha, sigma), (beta, tau) = self(t), self(s)
        alpha, sigma, beta, tau = (expand(v / (alpha * tau - beta * sigma), x_t) for v in (alpha, sigma, beta, tau))
        return tau * x_t - sigma * x_s, alpha * x_s - beta * x_t

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

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(t, -1.0), torch.full_like(t, 1 - self.sigma_min)


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


class SubVariancePreserving(Interpolant):
    """The sub-VP SDE's marginals: alpha as VP, sigma = 1 - alpha^2 (Score SDE, 2011.13456, eq. 29).

    Args:
        beta_min: rate of noising at t = 0, positive.
        beta_max: rate of noising at t = 1, at least beta_min.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"SubVariancePreserving: needs 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -(self.beta_max - self.beta_min) * t**2 / 4 - self.beta_min * t / 2
        return log_alpha.exp(), -torch.expm1(2 * log_alpha)


class VarianceExploding(Interpolant):
    """alpha = 1, sigma geometric from sigma_min to sigma_max: the VE SDE (Score SDE, 2011.13456, eq. 29 and appendix C).

    Args:
        sigma_min: noise left at t = 0, positive.
        sigma_max: noise at t = 1, where the data is still there: above it, far above the data's own spread.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        _rising("VarianceExploding", sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * torch.exp(math.log(self.sigma_max / self.sigma_min) * t)


class ImprovedCosine(Interpolant):
    """alpha = cos(phi) / cos(phi_0), phi = (t + s) / (1 + s) pi / 2, alpha^2 + sigma^2 = 1 (2102.09672, eq. 17).

    Args:
        s: offset that keeps the first steps from being too small, positive.
    """

    def __init__(self, s: float = 0.008):
        if not 0 < s < math.inf:
            raise ValueError(f"ImprovedCosine: s is {s}, it must be positive (without an offset it is Trigonometric)")
        self.s = s

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        unit = math.pi / 2 / (1 + self.s)
        first = unit * self.s
        # sines of small angles: 1 - alpha^2 loses three digits near t = 0, and cos(pi / 2) is not zero in floating point
        square = torch.sin(unit * t) * torch.sin(unit * t + 2 * first)
        return torch.sin(unit * (1 - t)) / math.cos(first), square.sqrt() / math.cos(first)


class Karras(Interpolant):
    """alpha = 1, sigma^(1/rho) linear in t: EDM's grid (2206.00364, eq. 5) is uniform in t.

    Args:
        sigma_min: noise left at t = 0, positive.
        sigma_max: noise at t = 1, where the data is still there: above sigma_min, far above the data's own spread.
        rho: how much more finely low noise is divided; 1 is even.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        _rising("Karras", sigma_min, sigma_max)
        if not 0 < rho < math.inf:
            raise ValueError(f"Karras: rho is {rho}, it must be positive")
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (low + (high - low) * t) ** self.rho


def _rising(name: str, sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"{name}: needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")


class Shifted(Interpolant):
    """Another interpolant at a shifted time, logit t' = logit t + log shift (SD3, 2403.03206, eq. 23).

    Args:
        interpolant: of t'; not itself shifted: shifts multiply, so give the product once.
        shift: positive; above 1 spends more of t on noise.
    """

    def __init__(self, interpolant: Interpolant, shift: float):
        if isinstance(interpolant, Shifted):
            raise ValueError(f"Shifted: {interpolant!r} is shifted already; shifts multiply, give their product once")
        if not 0 < shift < math.inf:
            raise ValueError(f"Shifted: shift is {shift}, it must be positive")
        self.interpolant, self.shift = interpolant, shift

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.interpolant(self.shift * t / (1 + (self.shift - 1) * t))


class Discrete(Interpolant):
    """A chain of N noising steps (DDPM, 2006.11239, eq. 4): alpha^2 = alphas_cumprod[i] = 1 - sigma^2 at t = (i + 1) / N.

    Between indices lambda = log(alpha / sigma) is a monotone cubic, so that rates are continuous. Where lambda is infinite a
    ratio is linear in t: sigma / alpha from 0 at t = 0 to index 0, alpha / sigma to 0 at t = 1 when the terminal SNR is zero.

    Args:
        betas: variance added by each of at least 3 steps, in (0, 1).
        zero_terminal_snr: rescale alpha so that t = 1 is pure noise (2305.08891, algorithm 1).
    """

    def __init__(self, betas: list[float], zero_terminal_snr: bool = False):
        if len(betas) < 3:
            raise ValueError(f"Discrete: {len(betas)} betas, it needs at least 3 (Discrete.scaled_linear() makes 1000)")
        if wrong := [(i, beta) for i, beta in enumerate(betas) if not 0 < beta < 1]:
            hint = "for a last beta of 1 set zero_terminal_snr" if wrong[0][1] == 1 else "give variances, not alphas"
            raise ValueError(f"Discrete: betas[{wrong[0][0]}] is {wrong[0][1]}, it must lie in (0, 1); {hint}")
        self.betas, self.zero_terminal_snr = [float(beta) for beta in betas], zero_terminal_snr
        log_alpha = torch.log1p(-torch.tensor(self.betas, dtype=torch.float64)).cumsum(0) / 2
        if zero_terminal_snr:  # the last lambda is -inf: no knot
            first, last = log_alpha[0].exp(), log_alpha[-1].exp()
            log_alpha = ((log_alpha[:-1].exp() - last) * first / (first - last)).log()
        self._knots = _monotone(log_alpha - torch.log(-torch.expm1(2 * log_alpha)) / 2)
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def linear(
        cls, n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal_snr: bool = False
    ) -> "Discrete":
        """Return DDPM's schedule: n betas evenly spaced (2006.11239, section 4)."""
        return cls(_even(beta_start, beta_end, n), zero_terminal_snr)

    @classmethod
    def scaled_linear(
        cls, n: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, zero_terminal_snr: bool = False
    ) -> "Discrete":
        """Return n betas with evenly spaced roots (2112.10752); Stable Diffusion's run from .00085 to .012."""
        return cls([root * root for root in _even(math.sqrt(beta_start), math.sqrt(beta_end), n)], zero_terminal_snr)

    @classmethod
    def squaredcos_cap_v2(cls, n: int = 1000, zero_terminal_snr: bool = False) -> "Discrete":
        """Return the cosine schedule with betas capped at .999 (2102.09672, eq. 17)."""
        bars = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        return cls([min(1 - later / bar, 0.999) for bar, later in pairwise(bars)], zero_terminal_snr)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table, n = self._on(t), len(self.betas)
        place = t * n - 1  # the index, not rounded
        i = place.detach().floor().long().clamp(0, table.shape[1] - 2)
        f = (place - i).clamp(0, 1)
        (y, m), (z, k) = table[:, i], table[:, i + 1]
        log_snr = 2 * (y + f * (m + f * (3 * (z - y) - 2 * m - k + f * (m + k - 2 * (z - y)))))
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt() * (place + 1).clamp(max=1)
        if self.zero_terminal_snr:
            alpha = alpha * (n - 1 - place).clamp(max=1)
        norm = torch.hypot(alpha, sigma)
        return alpha / norm, sigma / norm

    def _on(self, t: Tensor) -> Tensor:
        """Return the knots where t is, copied once: a copy in every call would make the device wait."""
        key = t.device, t.dtype
        if key not in self._tables:
            with torch.inference_mode(False):
                self._tables[key] = self._knots.to(*key)
        return self._tables[key]

    def __repr__(self) -> str:
        digest = hashlib.sha256(repr(self.betas).encode()).hexdigest()[:8]
        zero = ", zero_terminal_snr=True" if self.zero_terminal_snr else ""
        return f"Discrete({len(self.betas)} betas {self.betas[0]:.6g} to {self.betas[-1]:.6g}, sha256 {digest}{zero})"


def _even(first: float, last: float, n: int) -> list[float]:
    """Return n numbers, evenly spaced: the same bits on every processor, which vectorised sums do not have."""
    return [first + (last - first) * i / (n - 1) for i in range(n)]


def _monotone(y: Tensor) -> Tensor:
    """Return (values, slopes), shape (2, K), of a falling cubic: a spline's slopes, limited (Fritsch & Carlson, 1980)."""
    from scipy.interpolate import CubicSpline  # slow to import

    slopes = torch.from_numpy(CubicSpline(range(len(y)), y.numpy())(range(len(y)), 1))
    steps = y.diff()  # all negative
    flattest = torch.maximum(torch.cat([steps[:1], steps]), torch.cat([steps, steps[-1:]]))
    return torch.stack([y, torch.minimum(torch.maximum(slopes, 3 * flattest), torch.zeros_like(y))])
