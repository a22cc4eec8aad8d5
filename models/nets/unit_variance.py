"""A network for any prediction whose own input and output have unit variance."""

import math

import torch
from torch import Tensor, nn

from models.interpolant import Interpolant, expand
from models.nets import Net
from models.prediction import EDMPreconditioned, Prediction
from models.time_input import ScaledTime


class UnitVariance(Net):
    """y = a x_hat + b eps_hat, where x_hat and eps_hat follow from a network F of unit variance.

    x_hat = cos(phi) u - sin(phi) F and eps_hat = sin(phi) u + cos(phi) F, where F = net(u, phi).
    u = x_t / hypot(alpha, sigma) is the state at unit variance and phi = atan2(sigma, alpha) its
    noise level. F is the velocity du / dphi (Salimans & Ho 2022, arXiv 2202.00512, appendix D), of
    unit variance at every level. For data of variance one this is EDM's c_in, c_skip and c_out
    (Karras et al. 2022, arXiv 2206.00364, table 1).

    Without it, a network that predicts noise must copy its input to many digits before it learns
    anything about the data in very noisy states, and one that predicts scores must span four orders
    of magnitude.

    The inner network does not depend on the interpolant and the prediction: the same weights give
    the same denoiser with all of them. With `EDM(sigma_data=1)` as the loss's weighting, all noise
    levels have equal weight in F.

    Args:
        net: takes states of unit variance, and 2 phi / pi in [0, 1] by its own time input.
        interpolant: the denoiser's own.
        prediction: the denoiser's own, with the coefficients (a, b).
    """

    def __init__(self, net: Net, interpolant: Interpolant, prediction: Prediction):
        super().__init__()
        if isinstance(prediction, EDMPreconditioned):
            raise ValueError(
                "UnitVariance: EDMPreconditioned scales its network's input and output itself; "
                "use the net alone"
            )
        self.net = net
        self.interpolant = interpolant
        self.prediction = prediction
        self.time_input = ScaledTime(1.0)
        self.channels = net.channels
        self.size = net.size
        self.size_multiple = net.size_multiple
        self.classes = net.classes

    def list_blocks(self) -> list[nn.Module]:
        return self.net.list_blocks()

    def null_condition(self, cond: Tensor) -> Tensor | None:
        return self.net.null_condition(cond)

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        alpha, sigma = self.interpolant(time)
        a, b = self.prediction.coefficients(self.interpolant, time)
        # the state at unit variance, and its velocity du / dphi
        length = torch.hypot(alpha, sigma)
        phi = torch.atan2(sigma, alpha)
        u = x_t / expand(length, x_t)
        velocity = self.net(u, self.net.time_input(2 / math.pi * phi), cond)
        # a x_hat + b eps_hat
        cos = alpha / length
        sin = sigma / length
        return expand(a * cos + b * sin, u) * u + expand(b * cos - a * sin, u) * velocity
