"""Denoisers, guidance, conditions, networks, and the descriptions that checkpoints hold."""

import json
import math

import pytest
import torch
from torch import nn

from models.checkpoint import fingerprint
from models.condition import ClassLabel, Unconditional
from models.denoiser import Denoiser
from models.description import build, describe
from models.diffusers.networks import Pretrained
from models.guidance import Guided
from models.interpolant import Linear, VarianceExploding, VariancePreserving
from models.nets import Net
from models.nets.attention import Attention
from models.nets.dit import DiT
from models.nets.unit_variance import UnitVariance
from models.prediction import EDMPreconditioned, NoisePrediction, Score, Velocity, VPrediction
from models.time_input import InterpolatedTime, ScaledTime, TabulatedTime
from tests.examples import (
    PREDICTIONS,
    default_instances,
    every_interpolant,
    every_prediction,
    public_subclasses,
)
from tests.helpers.refusals import refused


class TimeNetwork(nn.Module):
    """A network whose output is its time input."""

    def forward(self, x_t, time, cond=None):
        return time.view(-1, 1, 1, 1).expand_as(x_t)


def small_dit(seed=0):
    """Return a small DiT with random weights: as initialised, adaLN-zero predicts zero."""
    torch.manual_seed(seed)
    net = DiT(size=4, channels=2, patch=2, width=16, depth=2, heads=2, classes=3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def test_outputs_of_a_bfloat16_network_are_float32():
    denoiser = Denoiser(small_dit().bfloat16(), Linear(), Velocity())
    x_hat, eps_hat = denoiser(torch.randn(3, 2, 4, 4).bfloat16(), torch.rand(3).bfloat16())
    assert x_hat.dtype == torch.float32
    assert eps_hat.dtype == torch.float32


def test_outputs_under_autocast_are_float32():
    denoiser = Denoiser(small_dit(), Linear(), Velocity())
    with torch.autocast("cpu", torch.bfloat16):
        x_hat, _ = denoiser(torch.randn(3, 2, 4, 4), torch.rand(3))
    assert x_hat.dtype == torch.float32


@pytest.mark.parametrize(
    ("time_input", "expected"),
    [
        (None, [0.25, 0.5]),
        (ScaledTime(1000.0), [250.0, 500.0]),
        (TabulatedTime([0.24, 0.51], [7, 9]), [7.0, 9.0]),
        (InterpolatedTime([0.9, 0.3, 0.2], [50.0, 20.0, 10.0]), [15.0, 30.0]),
        (InterpolatedTime([0.4], [7.0]), [7.0, 7.0]),
    ],
    ids=["default", "scaled", "tabulated", "interpolated", "one time"],
)
def test_the_network_reads_its_time_input(time_input, expected):
    denoiser = Denoiser(TimeNetwork(), VariancePreserving(), NoisePrediction(), time_input)
    _, eps_hat = denoiser(torch.zeros(2, 1, 2, 2), torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(eps_hat[:, 0, 0, 0], torch.tensor(expected))


def test_the_default_time_input_is_the_networks():
    assert small_dit().time_input.factor == 1000
    denoiser = Denoiser(small_dit(), Linear(), Velocity())
    assert isinstance(denoiser.time_input, ScaledTime)
    assert denoiser.time_input.factor == 1000


PLAIN_PREDICTIONS = [
    prediction for prediction in PREDICTIONS if not isinstance(prediction, EDMPreconditioned)
]


@every_interpolant
def test_a_unit_net_is_one_denoiser_under_every_prediction(interpolant):
    """At equal SNR it estimates the same data and noise for every interpolant and prediction."""
    net = small_dit().double()
    t = torch.rand(6, dtype=torch.float64) * 0.98 + 0.01
    cond = torch.tensor([0, 1, 2, 0, 1, 2])
    x_t = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    # The expected estimates: a rotation of the unit state and the network's output.
    alpha, sigma = interpolant(t)
    length = torch.hypot(alpha, sigma)
    phi = torch.atan2(sigma, alpha)
    u = x_t / length.view(-1, 1, 1, 1)
    velocity = net(u, 1000 * phi / (math.pi / 2), cond)
    cos = torch.cos(phi).view(-1, 1, 1, 1)
    sin = torch.sin(phi).view(-1, 1, 1, 1)
    for prediction in PLAIN_PREDICTIONS:
        denoiser = Denoiser(UnitVariance(net, interpolant, prediction), interpolant, prediction)
        x_hat, eps_hat = denoiser(x_t, t, cond)
        torch.testing.assert_close(x_hat, cos * u - sin * velocity, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(eps_hat, sin * u + cos * velocity, rtol=1e-9, atol=1e-9)


def test_a_unit_net_has_the_attributes_of_its_network():
    denoiser = Denoiser(UnitVariance(small_dit(), Linear(), Velocity()), Linear(), Velocity())
    assert denoiser.shape == (2, 4, 4)
    assert len(denoiser.net.list_blocks()) == 2
    assert denoiser.net.classes == 3


def test_a_unit_net_is_rebuilt_from_its_description():
    net = UnitVariance(small_dit(), VarianceExploding(), Score())
    denoiser = Denoiser(net, VarianceExploding(), Score())
    rebuilt = build(describe(denoiser))
    rebuilt.load_state_dict(denoiser.state_dict())
    x_t = torch.randn(2, 2, 4, 4)
    t = torch.rand(2)
    for found, expected in zip(rebuilt(x_t, t), denoiser(x_t, t)):
        assert torch.equal(found, expected)


def test_a_unit_net_with_preconditioning_is_refused():
    with refused(UnitVariance.__name__, EDMPreconditioned.__name__):
        UnitVariance(small_dit(), VarianceExploding(), EDMPreconditioned())


@pytest.mark.parametrize("output", [0, 1], ids=["x_hat", "eps_hat"])
def test_the_scale_has_one_convention(output):
    """u + w (c - u) for every prediction: w = 1 is the denoiser, 0 is unconditional."""
    denoiser = Denoiser(small_dit(), Linear(), Velocity())
    x_t = torch.randn(4, 2, 4, 4)
    t = torch.rand(4)
    cond = torch.tensor([0, 1, 2, 0])
    c = denoiser(x_t, t, cond)[output]
    u = denoiser(x_t, t, None)[output]
    assert (c - u).abs().max() > 1e-3
    for w, expected in ((1.0, c), (0.0, u), (2.0, 2 * c - u)):
        found = Guided(denoiser, w)(x_t, t, cond)[output]
        torch.testing.assert_close(found, expected)


def test_a_guided_denoiser_has_the_interpolant_of_its_denoiser():
    denoiser = Denoiser(small_dit(), Linear(), Velocity())
    assert Guided(denoiser, 2.0).interpolant is denoiser.interpolant


def test_the_null_class_is_no_condition():
    net = small_dit()
    x_t = torch.randn(2, 2, 4, 4)
    time = torch.tensor([10.0, 900.0])
    torch.testing.assert_close(net(x_t, time, torch.tensor([3, 3])), net(x_t, time, None))


def test_a_new_dit_predicts_zero():
    assert DiT()(torch.randn(2, 4, 8, 8), torch.rand(2)).abs().max() == 0


def test_a_dit_depends_on_positions():
    net = small_dit()
    x_t = torch.randn(1, 2, 4, 4)
    time = torch.tensor([5.0])
    rolled = net(x_t.roll(2, -1), time).roll(-2, -1)
    assert (rolled - net(x_t, time)).abs().max() > 1e-3


def test_attention_is_softmax_attention():
    layer = Attention(8, 2).double()
    tokens = torch.randn(3, 5, 8, dtype=torch.float64)
    q, k, v = (part.view(3, 5, 2, 4) for part in layer.qkv(tokens).chunk(3, -1))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(-1)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    torch.testing.assert_close(layer(tokens), layer.out(mixed))


def test_labels_are_dropped_independently():
    labels = torch.zeros(20_000, dtype=torch.long)
    cond = ClassLabel(10, dropout=0.25)(labels, lambda: torch.rand(20_000))
    assert cond.eq(10).float().mean().item() == pytest.approx(0.25, abs=0.015)


def test_labels_are_kept_when_sampling():
    assert ClassLabel(10, 0.25)(torch.tensor([4])).item() == 4


def test_unconditional_ignores_labels():
    assert Unconditional()(torch.tensor([4])) is None


def test_missing_labels_are_refused():
    with refused("ClassLabel", "Unconditional"):
        ClassLabel(10)(None)


@every_interpolant
@every_prediction
def test_a_description_rebuilds_the_denoiser(interpolant, prediction):
    denoiser = Denoiser(small_dit(), interpolant, prediction)
    rebuilt = build(describe(denoiser))
    rebuilt.load_state_dict(denoiser.state_dict())
    assert describe(rebuilt) == describe(denoiser)
    assert fingerprint(rebuilt) == fingerprint(denoiser)
    assert repr(rebuilt.interpolant) == repr(interpolant)


def test_every_network_is_described_by_its_arguments():
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 4,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"],
        "block_out_channels": [8],
    }
    nets = [
        *default_instances(Net),
        UnitVariance(small_dit(), Linear(), Velocity()),
        Pretrained(json.dumps(config)),
    ]
    assert {type(net) for net in nets} == set(public_subclasses(Net))
    for net in nets:
        assert build(describe(net)).state_dict().keys() == net.state_dict().keys()


def test_a_short_description_leaves_out_defaults():
    """An argument that a later version adds then changes no fingerprint."""
    denoiser = Denoiser(small_dit(), Linear(0.1), Velocity())
    short = describe(denoiser, defaults=False)
    whole = describe(denoiser)
    assert short["init_args"]["interpolant"]["init_args"] == {"sigma_min": 0.1}
    assert "two_time" not in str(short)
    assert "two_time" in str(whole)


def test_a_short_description_rebuilds_the_same():
    denoiser = Denoiser(small_dit(), Linear(0.1), Velocity())
    rebuilt = build(describe(denoiser, defaults=False))
    assert describe(rebuilt) == describe(denoiser)


def test_a_description_builds_only_classes_of_models(tmp_path):
    arguments = {"args": ["touch", str(tmp_path / "owned")]}
    with refused("class_path", "subprocess.Popen"):
        build({"class_path": "subprocess.Popen", "init_args": arguments})
    assert not (tmp_path / "owned").exists()


def test_a_network_outside_models_is_refused_before_it_is_saved():
    with refused("TimeNetwork", "models/nets/"):
        describe(Denoiser(TimeNetwork(), Linear(), VPrediction()))


def test_the_fingerprint_changes_with_one_bit():
    denoiser = Denoiser(small_dit(), Linear(), Velocity())
    before = fingerprint(denoiser)
    denoiser.net.out.bias.data[0] += 1e-6
    assert fingerprint(denoiser) != before
