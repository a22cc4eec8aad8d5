"""A multilayer perceptron on small states: points of a line or a plane."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.nets import Net
from models.time_input import ScaledTime

TIME_WAVES = 8  # cosines of t, one-to-one on [0, 1]
# Frequencies of waves of a state of order one (Tancik et al. 2020, arXiv 2006.10739): they learn
# the edges of a distribution in a tenth of the updates.
STATE_FREQUENCIES = (1.5, 3.0)


class MLP(Net):
    """A multilayer perceptron that starts by predicting zero; its inputs are the state and t.

    Args:
        size: height and width of the state.
        channels: channels of the state.
        width: units of a hidden layer.
        depth: number of hidden layers, at least 1.
    """

    def __init__(self, size: int = 1, channels: int = 2, width: int = 128, depth: int = 3):
        super().__init__()
        if depth < 1 or width < 1:
            raise ValueError(f"MLP: width {width} and depth {depth} must be at least 1")
        self.size = size
        self.channels = channels
        self.width = width
        self.depth = depth
        self.time_input = ScaledTime(1.0)
        # hidden layers and output
        dimensions = channels * size**2
        features = (1 + 2 * len(STATE_FREQUENCIES)) * dimensions + TIME_WAVES
        layers: list[nn.Module] = []
        hidden = []
        for inputs, outputs in pairwise([features, *[width] * depth]):
            hidden.append(nn.Linear(inputs, outputs))
            layers += [hidden[-1], nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(width, dimensions)
        # initialisation
        for layer in hidden:
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        if cond is not None:
            raise ValueError("MLP: got a condition, but it takes none; use Unconditional")
        state = x_t.flatten(1)
        multiples = torch.arange(1, TIME_WAVES + 1, device=time.device)
        angles = math.pi * time[:, None] * multiples
        features = [state, angles.cos()]
        for frequency in STATE_FREQUENCIES:
            features += [torch.sin(frequency * state), torch.cos(frequency * state)]
        # sines and cosines of the time are float32, also where the weights have 16 bits
        joined = torch.cat(features, 1).to(self.out.weight.dtype)
        return self.out(self.layers(joined)).view(x_t.shape)
