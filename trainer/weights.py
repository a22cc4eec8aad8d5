"""Weights of the loss: how much each noise level counts. Each is stated for the data row and carried to any other."""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from models.interpolant import Interpolant
from models.prediction import Prediction


class Weight(ABC):
    """w(t) of `w |x_hat - x|^2`.

    At one x_t an error of y = a x + b eps is `(a - b alpha / sigma)` times the error of x, so that the same loss, measured in
    that row, has the weight `w / (a - b alpha / sigma)^2`: w / SNR for Noise, on VP w / (SNR + 1) for Angular.
    """

    @abstractmethod
    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        """Return w of squared errors of data at t in (0, 1), of t's shape."""

    def __call__(self, interpolant: Interpolant, row: Prediction, t: Tensor) -> Tensor:
        """Return the weight of squared errors measured in a row at t in (0, 1), of t's shape."""
        (alpha, sigma), (a, b) = interpolant(t), row.row(interpolant, t)
        return self.of_data(interpolant, t) / (a - b * alpha / sigma).square()


class SNR(Weight):
    """(alpha / sigma)^2: what the plain loss of noise weighs (DDPM's simple loss, 2006.11239, eq. 14)."""

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return (alpha / sigma).square()


class MinSNR(Weight):
    """min((alpha / sigma)^2, gamma) (2303.09556, section 3.4): clean states, which are easy, count no more than at gamma.

    Args:
        gamma: positive.
    """

    def __init__(self, gamma: float = 5.0):
        if not 0 < gamma < math.inf:
            raise ValueError(f"MinSNR: gamma is {gamma}, it must be positive")
        self.gamma = gamma

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return (alpha / sigma).square().clamp(max=self.gamma)


class TruncatedSNR(Weight):
    """max((alpha / sigma)^2, 1): noisy states count no less than at SNR 1 (2202.00512, section 4)."""

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return (alpha / sigma).square().clamp(min=1)


class EDM(Weight):
    """(s^2 + d^2) / (s d)^2 for s = sigma / alpha (2206.00364, table 1): a network with EDM's preconditioning starts even.

    Args:
        sigma_data: d, the standard deviation of the data, positive.
    """

    def __init__(self, sigma_data: float = 0.5):
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"EDM: sigma_data is {sigma_data}, it must be positive")
        self.sigma_data = sigma_data

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return (alpha / sigma).square() + self.sigma_data**-2


class InverseVariance(Weight):
    """sigma^-2 (SD3, 2403.03206): on Linear the plain loss of the velocity, on VP that of Angular."""

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        return interpolant(t)[1].pow(-2)
