"""Denoisers, guidance, conditions, the network, and what a checkpoint may rebuild."""

import json
import math

import pytest
import torch
from torch import nn

from models import teacher
from models.clock import Scaled, Tabulated
from models.condition import ClassLabel, Unconditional
from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear, VarianceExploding, VariancePreserving
from models.nets import Net
from models.nets.attention import Attention
from models.nets.dit import DiT
from models.nets.pretrained import Pretrained
from models.nets.unit import UnitNet
from models.prediction import Angular, Karras, Noise, Score, Velocity
from tests.forms import PREDICTIONS, every_interpolant, every_prediction, plain, public


class Told(nn.Module):
    """A network that answers with what it was told of the time."""

    def forward(self, x_t, clock, cond=None):
        return clock.view(-1, 1, 1, 1).expand_as(x_t)


def small(seed=0, **changes):
    torch.manual_seed(seed)
    net = DiT(**{"size": 4, "channels": 2, "patch": 2, "width": 16, "depth": 2, "heads": 2, "classes": 3, **changes})
    for parameter in net.parameters():  # adaLN-zero starts at zero: wake it up
        nn.init.normal_(parameter, std=0.2)
    return net


def test_float32_at_the_boundary():
    denoiser = Denoiser(small().bfloat16(), Linear(), Velocity())
    x_hat, eps_hat = denoiser(torch.randn(3, 2, 4, 4).bfloat16(), torch.rand(3).bfloat16())
    assert x_hat.dtype == eps_hat.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert Denoiser(small(), Linear(), Velocity())(torch.randn(3, 2, 4, 4), torch.rand(3))[0].dtype == torch.float32


def test_the_clock_is_apart_from_t():
    x_t, t = torch.zeros(2, 1, 2, 2), torch.tensor([0.25, 0.5])
    for clock, expected in [(None, t), (Scaled(1000.0), 1000 * t), (Tabulated([0.24, 0.51], [7, 9]), torch.tensor([7.0, 9.0]))]:
        eps_hat = Denoiser(Told(), VariancePreserving(), Noise(), clock)(x_t, t)[1]
        torch.testing.assert_close(eps_hat[:, 0, 0, 0], expected)
    assert isinstance(Denoiser(small(), Linear(), Velocity()).clock, Scaled) and small().clock.factor == 1000


ROWS = [prediction for prediction in PREDICTIONS if not isinstance(prediction, Karras)]


@every_interpolant
def test_a_unit_net_is_one_denoiser_in_every_form(interpolant):
    """At equal SNR it estimates the same data and noise, whatever the interpolant and the prediction."""
    net, t, cond = small().double(), torch.rand(6, dtype=torch.float64) * 0.98 + 0.01, torch.tensor([0, 1, 2, 0, 1, 2])
    alpha, sigma = interpolant(t)
    x_t, length = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.hypot(alpha, sigma)
    u, phi = x_t / length.view(-1, 1, 1, 1), torch.atan2(sigma, alpha)
    velocity = net(u, 1000 * phi / (math.pi / 2), cond)
    cos, sin = (part(phi).view(-1, 1, 1, 1) for part in (torch.cos, torch.sin))
    for prediction in ROWS:
        denoiser = Denoiser(UnitNet(net, interpolant, prediction), interpolant, prediction)
        x_hat, eps_hat = denoiser(x_t, t, cond)
        torch.testing.assert_close(x_hat, cos * u - sin * velocity, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(eps_hat, sin * u + cos * velocity, rtol=1e-9, atol=1e-9)
    assert denoiser.shape == (2, 4, 4) and len(list(denoiser.net.blocks)) == 2 and denoiser.net.classes == 3


def test_a_unit_net_is_rebuilt_from_its_description():
    denoiser = Denoiser(UnitNet(small(), VarianceExploding(), Score()), VarianceExploding(), Score())
    again = teacher.build(teacher.describe(denoiser))
    again.load_state_dict(denoiser.state_dict())
    x_t, t = torch.randn(2, 2, 4, 4), torch.rand(2)
    assert all(torch.equal(a, b) for a, b in zip(again(x_t, t), denoiser(x_t, t)))
    with pytest.raises(ValueError, match="UnitNet: the Karras prediction"):
        UnitNet(small(), VarianceExploding(), Karras())


def test_guidance_is_one_convention():
    """u + w (c - u) of any row: 1 is the denoiser, 0 is unconditional, 2 extrapolates."""
    denoiser = Denoiser(small(), Linear(), Velocity())
    x_t, t, cond = torch.randn(4, 2, 4, 4), torch.rand(4), torch.tensor([0, 1, 2, 0])
    c, u = denoiser(x_t, t, cond), denoiser(x_t, t, None)
    assert (c[0] - u[0]).abs().max() > 1e-3
    for part in (0, 1):
        torch.testing.assert_close(Guided(denoiser, 1.0)(x_t, t, cond)[part], c[part])
        torch.testing.assert_close(Guided(denoiser, 0.0)(x_t, t, cond)[part], u[part])
        torch.testing.assert_close(Guided(denoiser, 2.0)(x_t, t, cond)[part], 2 * c[part] - u[part])
    assert Guided(denoiser, 2.0).interpolant is denoiser.interpolant


def test_null_class_is_no_condition():
    net, x_t, clock = small(), torch.randn(2, 2, 4, 4), torch.tensor([10.0, 900.0])
    torch.testing.assert_close(net(x_t, clock, torch.tensor([3, 3])), net(x_t, clock, None))


def test_dit_starts_at_zero_and_sees_positions():
    assert DiT()(torch.randn(2, 4, 8, 8), torch.rand(2)).abs().max() == 0
    net, x_t = small(), torch.randn(1, 2, 4, 4)
    rolled = net(x_t.roll(2, -1), torch.tensor([5.0])).roll(-2, -1)
    assert (rolled - net(x_t, torch.tensor([5.0]))).abs().max() > 1e-3


def test_attention_is_softmax_attention():
    layer, tokens = Attention(8, 2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    q, k, v = (part.view(3, 5, 2, 4) for part in layer.qkv(tokens).chunk(3, -1))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) / 2).softmax(-1)
    torch.testing.assert_close(layer(tokens), layer.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)))


def test_labels_are_dropped_each_on_its_own():
    told = ClassLabel(10, dropout=0.25)(torch.zeros(20_000, dtype=torch.long), lambda: torch.rand(20_000))
    assert told.eq(10).float().mean().item() == pytest.approx(0.25, abs=0.015)
    assert ClassLabel(10, 0.25)(torch.tensor([4])).item() == 4
    assert Unconditional()(torch.tensor([4])) is None
    with pytest.raises(ValueError, match="no class labels"):
        ClassLabel(10)(None)


@every_interpolant
@every_prediction
def test_description_rebuilds_the_denoiser(interpolant, prediction):
    denoiser = Denoiser(small(), interpolant, prediction)
    again = teacher.build(teacher.describe(denoiser))
    again.load_state_dict(denoiser.state_dict())
    assert teacher.describe(again) == teacher.describe(denoiser)
    assert teacher.fingerprint(again) == teacher.fingerprint(denoiser)
    assert repr(again.interpolant) == repr(interpolant)


def test_every_network_is_described_by_its_arguments():
    kinds = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"], "block_out_channels": [8]}
    theirs = {"_class_name": "UNet2DModel", "sample_size": 4, "norm_num_groups": 4, "layers_per_block": 1, **kinds}
    nets = [*plain(Net), UnitNet(small(), Linear(), Velocity()), Pretrained(json.dumps(theirs))]
    assert {type(net) for net in nets} == set(public(Net))
    assert all(teacher.build(teacher.describe(net)).state_dict().keys() == net.state_dict().keys() for net in nets)


def test_an_argument_that_a_later_version_adds_changes_no_fingerprint():
    """The short description leaves out what has its default, and still builds the same; the whole one leaves out nothing."""
    denoiser = Denoiser(small(), Linear(0.1), Velocity())
    short, whole = teacher.describe(denoiser, whole=False), teacher.describe(denoiser)
    assert short["init_args"]["interpolant"]["init_args"] == {"sigma_min": 0.1} and "jumps" not in str(short)
    assert "jumps" in str(whole) and teacher.describe(teacher.build(short)) == whole


def test_a_checkpoint_names_no_other_code(tmp_path):
    with pytest.raises(ValueError, match="only name classes of `models`"):
        teacher.build({"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "owned")]}})
    assert not (tmp_path / "owned").exists()


def test_a_network_from_elsewhere_is_refused_before_it_is_saved():
    with pytest.raises(ValueError, match="models/nets"):
        teacher.describe(Denoiser(Told(), Linear(), Angular()))


def test_fingerprint_sees_one_bit():
    denoiser = Denoiser(small(), Linear(), Velocity())
    before = teacher.fingerprint(denoiser)
    denoiser.net.out.bias.data[0] += 1e-6
    assert teacher.fingerprint(denoiser) != before
