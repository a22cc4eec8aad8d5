"""The multilayer perceptron."""

import pytest
import torch

from models import teacher
from models.nets.mlp import MLP


def test_it_tells_all_times_apart_and_gives_the_shape_of_the_state():
    torch.manual_seed(0)
    net, t = MLP(size=2, channels=3, width=16, depth=2), torch.linspace(0, 1, 50)
    assert net(torch.ones(50, 3, 2, 2), t).abs().max() == 0, "it starts by predicting zero"
    torch.nn.init.normal_(net.out.weight)
    y = net(torch.ones(50, 3, 2, 2), t)
    assert y.shape == (50, 3, 2, 2)
    apart = torch.cdist(y.flatten(1), y.flatten(1)) + torch.eye(50)
    assert apart.min() > 1e-5


def test_it_is_described_by_its_arguments_and_says_what_it_cannot_do():
    net = MLP(channels=1, width=8)
    assert teacher.build(teacher.describe(net)).state_dict().keys() == net.state_dict().keys()
    with pytest.raises(ValueError, match="use Unconditional"):
        net(torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.zeros(2).long())
    with pytest.raises(ValueError, match="depth 0 must be at least 1"):
        MLP(depth=0)
