"""Weightings of the loss: how much each noise level counts.

Each is defined for errors of the data and is converted to the errors of any other prediction.
"""

import math
from abc import ABC, abstractmethod

from torch import Tensor

from models.interpolant import Interpolant
from models.prediction import Prediction


class Weighting(ABC):
    """The weight w(t) in `w |x_hat - x|^2`.

    For one x_t, the error of y = a x + b eps is `a - b alpha / sigma` times the error of x.
    The same loss, measured in that prediction, therefore has the weight
    `w / (a - b alpha / sigma)^2`: w / SNR for NoisePrediction, and on variance-preserving
    interpolants w / (SNR + 1) for VPrediction.
    """

    @abstractmethod
    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        """Return the weight of squared errors of data at t in (0, 1), of t's shape."""

    def __call__(self, interpolant: Interpolant, prediction: Prediction, t: Tensor) -> Tensor:
        """Return the weight of squared errors of a prediction at t in (0, 1), of t's shape."""
        alpha, sigma = interpolant(t)
        a, b = prediction.coefficients(interpolant, t)
        return self.of_data(interpolant, t) / (a - b * alpha / sigma).square()


class SNR(Weighting):
    """(alpha / sigma)^2, the weight of the unweighted noise loss.

    That is DDPM's simple loss (Ho et al. 2020, arXiv 2006.11239, eq. 14).
    """

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return (alpha / sigma).square()


class MinSNR(Weighting):
    """min((alpha / sigma)^2, gamma) (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    Clean states, which are easy to denoise, count no more than states of SNR gamma.

    Args:
        gamma: largest weight, positive.
    """

    def __init__(self, gamma: float = 5.0):
        if not 0 < gamma < math.inf:
            raise ValueError(f"MinSNR: gamma is {gamma}; it must be positive")
        self.gamma = gamma

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return (alpha / sigma).square().clamp(max=self.gamma)


class TruncatedSNR(Weighting):
    """max((alpha / sigma)^2, 1) (Salimans & Ho 2022, arXiv 2202.00512, section 4).

    Noisy states count no less than states of SNR 1.
    """

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return (alpha / sigma).square().clamp(min=1)


class EDM(Weighting):
    """(s^2 + d^2) / (s d)^2 for s = sigma / alpha (Karras et al. 2022, arXiv 2206.00364, table 1).

    With EDM's preconditioning, every noise level then has the same loss at initialisation.

    Args:
        sigma_data: d, the standard deviation of the data, positive.
    """

    def __init__(self, sigma_data: float = 0.5):
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"EDM: sigma_data is {sigma_data}; it must be positive")
        self.sigma_data = sigma_data

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        alpha, sigma = interpolant(t)
        return (alpha / sigma).square() + self.sigma_data**-2


class InverseVariance(Weighting):
    """sigma^-2 (Esser et al. 2024, arXiv 2403.03206).

    It is the unweighted loss of the velocity on Linear, and on variance-preserving interpolants
    the unweighted loss of VPrediction.
    """

    def of_data(self, interpolant: Interpolant, t: Tensor) -> Tensor:
        _, sigma = interpolant(t)
        return sigma.pow(-2)
