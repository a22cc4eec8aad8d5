"""Predictions: a network outputs `y = a(t) x + b(t) eps`; every conversion is one 2x2 solve."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand, is_inspectable


class Prediction(ABC):
    """What a network learns to output, as coefficients (a, b) of data x and noise eps."""

    @abstractmethod
    def coefficients(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, b) at t, each with t's shape."""

    def scale_input(self, interpolant: Interpolant, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's input for the state x_t, shape (B, ...): by default x_t itself."""
        return x_t

    def target(self, interpolant: Interpolant, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return y = a x + b eps for x and eps of shape (B, ...) and t of shape (B,) or ()."""
        a, b = self.coefficients(interpolant, t)
        return expand(a, x) * x + expand(b, x) * eps

    def solve(
        self, interpolant: Interpolant, y: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (x_hat, eps_hat), the solution of `y = a x + b eps`, `x_t = alpha x + sigma eps`.

        The two equations must be independent: Data is singular where sigma = 0,
        NoisePrediction and Score where alpha = 0.

        Raises:
            ValueError: they are not. This is checked only where it needs no device sync (see
                `models.interpolant.is_inspectable`).
        """
        alpha, sigma = interpolant(t)
        a, b = self.coefficients(interpolant, t)
        determinant = alpha * b - sigma * a
        if is_inspectable(t):
            rounding = torch.finfo(determinant.dtype).eps
            threshold = rounding * torch.hypot(alpha, sigma) * torch.hypot(a, b)
            singular = ~(determinant.abs() > threshold)
            if singular.any():
                first = t[singular].flatten()[0].item()
                raise ValueError(
                    f"{self!r} is singular on {interpolant!r} at t = {first:.6g}: data and noise "
                    "cannot be separated there; use another prediction, or times away from "
                    "that end"
                )
        a = expand(a / determinant, x_t)
        b = expand(b / determinant, x_t)
        alpha = expand(alpha / determinant, x_t)
        sigma = expand(sigma / determinant, x_t)
        return b * x_t - sigma * y, alpha * y - a * x_t

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value}" for key, value in vars(self).items())
        return f"{type(self).__name__}({arguments})"


class Data(Prediction):
    """y = x (`sample` in diffusers)."""

    def coefficients(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


class NoisePrediction(Prediction):
    """y = eps: DDPM (Ho et al. 2020, arXiv 2006.11239; `epsilon` in diffusers)."""

    def coefficients(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


class VPrediction(Prediction):
    """y = alpha eps - sigma x (`v_prediction` in diffusers).

    Salimans & Ho 2022 (arXiv 2202.00512).
    """

    def coefficients(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = interpolant(t)
        return -sigma, alpha


class Velocity(Prediction):
    """y = dx_t/dt = alpha' x + sigma' eps; on Linear `eps - x`.

    Flow matching (Lipman et al. 2022, arXiv 2210.02747).
    """

    def coefficients(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        return interpolant.derivatives(t)


class Score(Prediction):
    """y = -eps / sigma, the gradient of log p_t (Song et al. 2020, arXiv 2011.13456)."""

    def coefficients(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        _, sigma = interpolant(t)
        return torch.zeros_like(t), -1 / sigma


class EDMPreconditioned(Prediction):
    """EDM's preconditioning on any interpolant: D = c_skip x_t + c_out F(c_in x_t).

    Karras et al. 2022 (arXiv 2206.00364), eq. 7 and table 1. With S = sqrt(sigma^2 + alpha^2
    sigma_data^2), the input is scaled by c_in = 1 / S and y = F has the coefficients
    (sigma, -alpha sigma_data^2) / (sigma_data S). They are never singular, and F has unit variance
    where the data's standard deviation is sigma_data.

    Args:
        sigma_data: standard deviation of the data, positive.
    """

    def __init__(self, sigma_data: float = 0.5):
        if not 0 < sigma_data < float("inf"):
            raise ValueError(
                f"EDMPreconditioned: sigma_data is {sigma_data}; it must be positive "
                "(1 for latents of unit variance)"
            )
        self.sigma_data = sigma_data

    def coefficients(self, interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = interpolant(t)
        root = torch.hypot(sigma, alpha * self.sigma_data)
        return sigma / (self.sigma_data * root), -alpha * self.sigma_data / root

    def scale_input(self, interpolant: Interpolant, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return x_t / expand(torch.hypot(sigma, alpha * self.sigma_data), x_t)
