"""Denoisers that read a second time jump from t to s; DDIM walks by their jumps."""

import pytest
import torch

from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Linear, Trigonometric, VariancePreserving
from models.nets.dit import DiT
from models.prediction import Angular, Velocity
from models.retimed import Retimed
from models.sampler import DDIM
from tests.forms import every_interpolant
from tests.oracle import Flow
from trainer.module import inherit


@every_interpolant
def test_two_states_of_a_chord_give_its_ends(interpolant):
    x, eps = torch.randn(2, 7, 2, 3, 3, dtype=torch.float64)
    t = torch.linspace(0.3, 0.9, 7, dtype=torch.float64)
    s = t - 0.25
    again = interpolant.unmix(interpolant.mix(x, eps, t), t, interpolant.mix(x, eps, s), s)
    torch.testing.assert_close(torch.stack(again), torch.stack([x, eps]), rtol=1e-8, atol=1e-8)


@every_interpolant
@pytest.mark.parametrize("steps", [1, 3])
def test_ddim_walks_by_exact_jumps(interpolant, steps):
    """Any number of jumps of the ODE's own map ends at the same states, guided by itself or not."""
    flow, times = Flow(interpolant), torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64)
    x_t = torch.randn(9, 1, 2, 2, dtype=torch.float64)
    expected = flow.map(x_t, times[:1].expand(9), times[-1:].expand(9))
    for denoiser in (flow, Guided(flow, 3.0)):
        torch.testing.assert_close(DDIM(steps, times.tolist()).walk(denoiser, x_t)[-1], expected)


def test_jumps_are_retimed():
    """Jumps of another interpolant are those of the same law, between times of equal SNR."""
    eps = torch.randn(9, 1, 2, 2, dtype=torch.float64)
    seen = DDIM(2, [0.9, 0.5, 0.2]).walk(Retimed(Flow(VariancePreserving()), Linear()), eps)[-1]
    torch.testing.assert_close(seen, DDIM(2, [0.9, 0.5, 0.2]).walk(Flow(Linear()), eps)[-1], rtol=1e-6, atol=1e-6)


def test_a_student_that_reads_more_begins_as_its_teacher():
    """At any second time and scale; and only what it alone reads may be missing in the teacher."""
    sizes = {"size": 4, "channels": 2, "patch": 2, "width": 16, "depth": 1, "heads": 2}
    teacher = Denoiser(DiT(**sizes), Trigonometric(), Angular())
    for weight in teacher.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    student = Denoiser(DiT(**sizes, jumps=True, scaled=True), Trigonometric(), Angular())
    inherit(student, teacher)
    x_t, t = torch.randn(5, 2, 4, 4), torch.linspace(0.2, 1, 5)
    for more in ({}, {"s": t / 2}, {"s": t / 3, "w": 2 * t}):
        torch.testing.assert_close(torch.stack(student(x_t, t, **more)), torch.stack(teacher(x_t, t)))
    with pytest.raises(RuntimeError, match="Missing key"):
        inherit(Denoiser(DiT(**{**sizes, "depth": 2}), Trigonometric(), Angular()), teacher)
    with pytest.raises(ValueError, match="does not read a second time"):
        teacher(x_t, t, s=t)


def test_a_network_reads_the_second_time_and_the_scale():
    net = DiT(size=4, channels=2, patch=2, width=16, depth=1, heads=2, jumps=True, scaled=True)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    denoiser, x_t, t = Denoiser(net, Linear(), Velocity()), torch.randn(5, 2, 4, 4), torch.full((5,), 0.8)
    plain = denoiser(x_t, t)[0]
    torch.testing.assert_close(denoiser(x_t, t, s=t, w=torch.ones(5))[0], plain)
    assert not torch.allclose(denoiser(x_t, t, s=t / 2)[0], plain, atol=1e-4)
    assert not torch.allclose(denoiser(x_t, t, w=3 * torch.ones(5))[0], plain, atol=1e-4)
