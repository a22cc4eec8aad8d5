"""Predictions: a network's output is one row, `y = a(t) x + b(t) eps`, and every conversion is one 2x2 solve."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand, seen


class Prediction(ABC):
    """What a network learns, as a row (a, b) over data x and noise eps."""

    @abstractmethod
    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, b) at t, each of t's shape."""

    def read(self, interpolant: Interpolant, x_t: Tensor, t: Tensor) -> Tensor:
        """Return what the network is shown of the state x_t, shape (B, ...): x_t itself, unless the row comes with a scaling."""
        return x_t

    def target(self, interpolant: Interpolant, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return y = a x + b eps, shape (B, ...), for x and eps of shape (B, ...) and t of shape (B,) or ()."""
        a, b = self.row(interpolant, t)
        return expand(a, x) * x + expand(b, x) * eps

    def solve(self, interpolant: Interpolant, y: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), the solution of `y = a x + b eps`, `x_t = alpha x + sigma eps`.

        The two rows must differ: Data is singular where sigma = 0, Noise and Score where alpha = 0.

        Raises:
            ValueError: they do not, as far as t can be seen without waiting for a device (`models.interpolant.seen`).
        """
        (alpha, sigma), (a, b) = interpolant(t), self.row(interpolant, t)
        d = alpha * b - sigma * a
        if seen(t):
            lost = ~(d.abs() > torch.finfo(d.dtype).eps * torch.hypot(alpha, sigma) * torch.hypot(a, b))
            if lost.any():
                raise ValueError(
                    f"{self!r} is singular on {interpolant!r} at t = {t[lost].flatten()[0].item():.6g}: it does not tell "
                    "x and eps apart there; take another prediction, or times off that end"
                )
        a, b, alpha, sigma = (expand(v / d, x_t) for v in (a, b, alpha, sigma))
        return b * x_t - sigma * y, alpha * y - a * x_t

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


class Data(Prediction):
    """y = x."""

    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


class Noise(Prediction):
    """y = eps (DDPM, 2006.11239)."""

    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


class Angular(Prediction):
    """y = alpha eps - sigma x: the v of Salimans & Ho (2202.00512)."""

    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = interpolant(t)
        return -sigma, alpha


class Velocity(Prediction):
    """y = dx_t/dt = alpha' x + sigma' eps; on Linear `eps - x`, flow matching (2210.02747)."""

    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        return interpolant.rates(t)


class Score(Prediction):
    """y = -eps / sigma, the gradient of log p_t (Score SDE, 2011.13456)."""

    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = interpolant(t)
        return torch.zeros_like(t), -1 / sigma


class Karras(Prediction):
    """EDM's preconditioning (2206.00364, eq. 7 and table 1): D = c_skip x_t + c_out F(c_in x_t), on any interpolant.

    With S = sqrt(sigma^2 + alpha^2 sigma_data^2), c_in = 1 / S on the input and y = F is the row (sigma, -alpha sigma_data^2)
    / (sigma_data S): never singular, and of unit variance where the data's deviation is sigma_data.

    Args:
        sigma_data: standard deviation of the data, positive.
    """

    def __init__(self, sigma_data: float = 0.5):
        if not 0 < sigma_data < float("inf"):
            raise ValueError(f"Karras: sigma_data is {sigma_data}, it must be positive (1 for latents of unit variance)")
        self.sigma_data = sigma_data

    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = interpolant(t)
        root = torch.hypot(sigma, alpha * self.sigma_data)
        return sigma / (self.sigma_data * root), -alpha * self.sigma_data / root

    def read(self, interpolant: Interpolant, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return x_t / expand(torch.hypot(sigma, alpha * self.sigma_data), x_t)
