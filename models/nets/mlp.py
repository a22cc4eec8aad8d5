"""A multilayer perceptron over small states: points of a line or a plane."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.clock import Scaled
from models.nets import Net

WAVES = 8  # cosines of t, one-to-one on [0, 1]
FREQUENCIES = (1.5, 3.0)  # of waves over a state of order one (2006.10739): the edges of a law, in a tenth of the updates


class MLP(Net):
    """A multilayer perceptron that starts by predicting zero, reads t and is told nothing else.

    Args:
        size: height and width of the state.
        channels: channels of the state.
        width: numbers between two layers.
        depth: number of hidden layers, at least 1.
    """

    def __init__(self, size: int = 1, channels: int = 2, width: int = 128, depth: int = 3):
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"MLP: width {width} and depth {depth} must be at least 1")
        self.size, self.channels, self.width, self.depth, self.clock = size, channels, width, depth, Scaled(1.0)
        inputs = channels * size**2
        seen = (1 + 2 * len(FREQUENCIES)) * inputs + WAVES
        hidden = [(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise([seen, *[width] * depth])]
        self.layers, self.out = nn.Sequential(*[layer for pair in hidden for layer in pair]), nn.Linear(width, inputs)
        for layer, _ in hidden:
            nn.init.kaiming_normal_(layer.weight), nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def forward(self, x_t: Tensor, clock: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond is not None:
            raise ValueError("MLP: it was told a condition, but reads none; use Unconditional")
        state, turns = x_t.flatten(1), math.pi * clock[:, None] * torch.arange(1, WAVES + 1, device=clock.device)
        waves = [wave(f * state) for f in FREQUENCIES for wave in (torch.sin, torch.cos)]
        return self.out(self.layers(torch.cat([state, turns.cos(), *waves], 1))).view(x_t.shape)
