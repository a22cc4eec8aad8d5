"""A network whose output has the size of a score."""

import torch
from torch import Tensor, nn

from models.clock import Scaled
from models.interpolant import Interpolant, expand
from models.nets import Net


class ScoreNet(Net):
    """Any network as a model of scores: y = net(x_t / sqrt(alpha^2 + sigma^2)) / sigma.

    A score has the size of 1 / sigma, on VarianceExploding over four orders of magnitude, which no network finds by itself:
    NCSN++ divides its output by sigma (Score SDE, 2011.13456, `scale_by_sigma` in its code). States are shown at unit variance,
    EDM's c_in for data of deviation 1 (2206.00364, table 1); NCSN++, whose first layer is followed by a normalisation, reads
    them as they are.

    Args:
        net: reads states of unit variance and its own clock.
        interpolant: the denoiser's own; y is infinite where its sigma is 0.
    """

    def __init__(self, net: Net, interpolant: Interpolant):
        super().__init__()
        self.net, self.interpolant, self.clock = net, interpolant, Scaled(1.0)
        self.channels, self.size, self.classes = net.channels, net.size, getattr(net, "classes", None)

    @property
    def blocks(self) -> nn.Module:
        """The network's own blocks."""
        return getattr(self.net, "blocks", nn.ModuleList())

    def forward(self, x_t: Tensor, clock: Tensor, cond: Tensor | None = None) -> Tensor:
        alpha, sigma = self.interpolant(clock)
        y = self.net(x_t / expand(torch.hypot(alpha, sigma), x_t), self.net.clock(clock), cond)
        return y / expand(sigma, y)
