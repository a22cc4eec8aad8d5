"""Any network made one of any prediction: its own input and output are of unit size, whatever the form."""

import math

import torch
from torch import Tensor, nn

from models.clock import Scaled
from models.interpolant import Interpolant, expand
from models.nets import Net
from models.prediction import Karras, Prediction


class UnitNet(Net):
    """y = a x_hat + b eps_hat of x_hat = cos(phi) u - sin(phi) F, eps_hat = sin(phi) u + cos(phi) F, where F = net(u, phi).

    u = x_t / hypot(alpha, sigma) is the state at unit variance and phi = atan2(sigma, alpha) its noise level; F is the velocity
    du / dphi (2202.00512, appendix D), of unit size at every level, for data of variance one EDM's c_in, c_skip and c_out
    (2206.00364, table 1). Without it a network that predicts noise must copy its input to many digits before it says anything
    of the data in very noisy states, and one that predicts scores must span their four orders of magnitude.

    The inner network knows nothing of the interpolant and the prediction: the same weights are the same denoiser in every form.
    With `EDM(sigma_data=1)` as the loss's weight all noise levels count alike in F.

    Args:
        net: reads states of unit variance, and 2 phi / pi in [0, 1] by its own clock.
        interpolant: the denoiser's own.
        prediction: the denoiser's own, whose row is (a, b).
    """

    def __init__(self, net: Net, interpolant: Interpolant, prediction: Prediction):
        super().__init__()
        if isinstance(prediction, Karras):
            raise ValueError("UnitNet: the Karras prediction scales its network's input and output itself; give it the net alone")
        self.net, self.interpolant, self.prediction, self.clock = net, interpolant, prediction, Scaled(1.0)
        self.channels, self.size, self.classes = net.channels, net.size, getattr(net, "classes", None)

    @property
    def blocks(self) -> nn.Module:
        """The network's own blocks."""
        return getattr(self.net, "blocks", nn.ModuleList())

    def forward(self, x_t: Tensor, clock: Tensor, cond: Tensor | None = None) -> Tensor:
        (alpha, sigma), (a, b) = self.interpolant(clock), self.prediction.row(self.interpolant, clock)
        length, phi = torch.hypot(alpha, sigma), torch.atan2(sigma, alpha)
        u = x_t / expand(length, x_t)
        velocity = self.net(u, self.net.clock(2 / math.pi * phi), cond)
        cos, sin = alpha / length, sigma / length
        return expand(a * cos + b * sin, u) * u + expand(b * cos - a * sin, u) * velocity
