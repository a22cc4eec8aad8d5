"""Predictions: a network's output is one row, `y = a(t) x + b(t) eps`, and every conversion is one 2x2 solve."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand


class Prediction(ABC):
    """What a network learns, as a row (a, b) over data x and noise eps."""

    @abstractmethod
    def row(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, b) at t, each of t's shape."""

    def target(self, interpolant: Interpolant, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return y = a x + b eps, shape (B, ...), for x and eps of shape (B, ...) and t of shape (B,) or ()."""
        a, b = self.row(interpolant, t)
        return expand(a, x) * x + expand(b, x) * eps

    def solve(self, interpolant: Interpolant, y: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), the solution of `y = a x + b eps`, `x_t = alpha x + sigma eps`.

        The two rows must differ: Data is singular where sigma = 0, Noise and Score where alpha = 0.
        """
        (alpha, sigma), (a, b) = interpolant(t), self.row(interpolant, t)
        d = alpha * b - sigma * a
        a, b, alpha, sigma = (expand(v / d, x_t) for v in (a, b, alpha, sigma))
        return b * x_t - sigma * y, alpha * y - a * x_t

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


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
