"""Flows: densities that integrate to one, closed forms, Jacobians by autograd, inverses, and what a checkpoint brings back."""

import inspect
import math
import sys

import pytest
import torch

from models import teacher
from models.flow import ContinuousFlow, Flow, SplineFlow, load

every_flow = pytest.mark.parametrize("cls", Flow.__subclasses__())


def made(cls, scale=0.2, **arguments):
    """Return a flow in float64 whose weights are all drawn anew, so that it is far from the identity."""
    flow = cls(**arguments, **({"tolerance": 1e-5} if cls is ContinuousFlow else {})).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in flow.parameters():
        weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return flow


def points(n, channels=2, size=1, seed=1):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standard(z):
    return -(z.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2


@every_flow
def test_the_density_integrates_to_one(cls):
    flow = made(cls, scale=0.1)
    axis = torch.linspace(-5, 5, 41, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    total = flow.log_prob(grid, exact=True).exp().sum() * (axis[1] - axis[0]) ** 2
    assert total.item() == pytest.approx(1, abs=5e-3)


@every_flow
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_the_density_is_that_of_the_inverse_map(cls, shape):
    """z = f(x) has the Jacobian that log p says, and f's inverse brings x back."""
    flow, x = made(cls, channels=shape[0], size=shape[1]), points(3, *shape)
    f = flow.flow().transform
    jacobian = torch.stack([torch.autograd.functional.jacobian(f, one.flatten()) for one in x])
    z = f(x.flatten(1))
    truth = standard(z) + jacobian.slogdet()[1]
    assert (flow.log_prob(x, exact=True) - truth).abs().max() < 5e-3
    assert (f.inv(z) - x.flatten(1)).abs().max() < 1e-3
    assert (z - x.flatten(1)).abs().max() > 0.1, "the flow is the identity: nothing was tested"


def test_an_affine_flow_has_the_density_of_its_normal_law():
    """dz/dt = A z + b carries N(0, 1) to N(m, C): with M = exp(A), C = (M^T M)^-1 and m = -M^-1 int exp((1 - t) A) b dt."""
    flow = made(ContinuousFlow, depth=0, frequencies=0)
    a, b = flow.flow.transform.ode[0].weight, flow.flow.transform.ode[0].bias
    block = torch.zeros(3, 3, dtype=torch.float64)
    block[:2, :2], block[:2, 2] = a, b
    whole = torch.linalg.matrix_exp(block)  # exp(A), and the integral beside it
    m, shift = whole[:2, :2], whole[:2, 2]
    law = torch.distributions.MultivariateNormal(-m.inverse() @ shift, (m.T @ m).inverse())
    x = points(50)
    assert (flow.log_prob(x, exact=True) - law.log_prob(x.flatten(1))).abs().max() < 1e-3


def test_splines_without_weights_leave_the_normal_law_as_it_is():
    flow, x = made(SplineFlow, scale=0.0), 3 * points(50)
    assert (flow.log_prob(x) - standard(x)).abs().max() < 1e-9


def test_the_estimate_of_the_trace_is_unbiased_and_drawn_from_torchs_generator():
    exact, rough = (made(ContinuousFlow, estimate=estimate, depth=1) for estimate in (False, True))
    x = points(1).expand(500, 2, 1, 1)
    torch.manual_seed(0)
    found = rough.log_prob(x)
    assert found.std() > 1e-3 and (found.mean() - exact.log_prob(x)[0]).abs() < 5 * found.std() / 500**0.5
    torch.manual_seed(0)
    assert torch.equal(found, rough.log_prob(x)) and not torch.equal(found, rough.log_prob(x))
    assert torch.equal(rough.log_prob(x, exact=True), exact.log_prob(x))


@every_flow
def test_it_is_measured_under_inference_mode(cls):
    flow, x = made(cls), points(3)
    with torch.inference_mode():
        inside = flow.log_prob(x.clone())
    assert torch.allclose(inside, flow.log_prob(x))


@every_flow
def test_gradients_of_the_loss_are_those_of_finite_differences(cls):
    flow, x = made(cls, scale=0.1), points(20)
    weight = next(w for w in flow.parameters() if w.ndim == 1).requires_grad_(True)
    flow.log_prob(x).mean().backward()
    place, step = weight.grad.abs().argmax(), 1e-3
    sides = []
    with torch.no_grad():
        for sign in (1, -1):
            weight[place] += sign * step
            sides.append(flow.log_prob(x).mean())
            weight[place] -= sign * step
    assert weight.grad[place].item() == pytest.approx(((sides[0] - sides[1]) / (2 * step)).item(), rel=5e-3)


@every_flow
def test_a_checkpoint_brings_it_back(cls, tmp_path):
    flow = made(cls, channels=1, size=2)
    flow = flow.float().double()  # whose weights float32 holds
    weights = {f"flow.{key}": value for key, value in flow.state_dict().items()}
    rectify = {"format": teacher.FORMAT, "flow": teacher.describe(flow)}
    torch.save({"rectify": rectify, "state_dict": weights, "global_step": 3}, tmp_path / "step=3.ckpt")
    again, x = load(tmp_path / "step=3.ckpt").double(), points(4, 1, 2)
    assert torch.equal(again.log_prob(x, exact=True), flow.log_prob(x, exact=True)) and again.shape == (1, 2, 2)
    assert {key: getattr(again, key) for key in inspect.signature(cls).parameters} == rectify["flow"]["init_args"]
    torch.save({"rectify": rectify, "state_dict": {}, "global_step": 3}, tmp_path / "step=3.ckpt")
    with pytest.raises(ValueError, match="do not make a flow here"):
        load(tmp_path / "step=3.ckpt")


@pytest.mark.parametrize(
    "build",
    [
        lambda: SplineFlow(transforms=0),
        lambda: SplineFlow(bins=1),
        lambda: SplineFlow(channels=1),
        lambda: ContinuousFlow(width=0),
        lambda: ContinuousFlow(depth=-1),
        lambda: ContinuousFlow(tolerance=0.0),
    ],
)
def test_what_is_no_flow_is_refused(build):
    with pytest.raises(ValueError, match="Flow: .* at least"):
        build()


@every_flow
def test_without_the_library_the_way_out_is_told(cls, monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ValueError, match=r"pip install 'rectify\[flows\]'"):
        cls()
