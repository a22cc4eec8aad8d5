"""The multilayer perceptron."""

import torch

from models.description import build, describe
from models.nets.mlp import MLP
from tests.helpers.refusals import refused


def test_a_new_mlp_predicts_zero():
    net = MLP(size=2, channels=3, width=16, depth=2)
    assert net(torch.ones(50, 3, 2, 2), torch.linspace(0, 1, 50)).abs().max() == 0


def test_the_output_has_the_shape_of_the_state_and_differs_at_all_times():
    torch.manual_seed(0)
    net = MLP(size=2, channels=3, width=16, depth=2)
    torch.nn.init.normal_(net.out.weight)
    y = net(torch.ones(50, 3, 2, 2), torch.linspace(0, 1, 50))
    assert y.shape == (50, 3, 2, 2)
    distances = torch.cdist(y.flatten(1), y.flatten(1)) + torch.eye(50)
    assert distances.min() > 1e-5


def test_it_is_described_by_its_arguments():
    net = MLP(channels=1, width=8)
    assert build(describe(net)).state_dict().keys() == net.state_dict().keys()


def test_a_condition_is_refused():
    net = MLP(channels=1, width=8)
    with refused("MLP", "Unconditional"):
        net(torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.zeros(2).long())


def test_no_hidden_layers_are_refused():
    with refused("MLP", "depth", 0):
        MLP(depth=0)
