"""Normalizing flows: densities, Jacobians, inverses, gradients, and loading from a checkpoint."""

import inspect
import math
import re
import sys

import pytest
import torch

from models.checkpoint import FORMAT
from models.description import describe
from models.normalizing_flow import ContinuousFlow, Flow, SplineFlow, load_flow
from tests.helpers.refusals import refused

every_flow = pytest.mark.parametrize("cls", Flow.__subclasses__())


def random_flow(cls, scale=0.2, **arguments):
    """Return a flow in float64 with random weights, so that it is far from the identity."""
    if cls is ContinuousFlow:
        arguments["tolerance"] = 1e-5
    flow = cls(**arguments).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in flow.parameters():
        values = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.copy_(scale * values)
    return flow


def points(n, channels=2, size=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, size, size, generator=generator, dtype=torch.float64)


def standard_normal_density(z):
    """Return the log-density of N(0, 1) at z."""
    return -(z.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2


@every_flow
def test_the_density_integrates_to_one(cls):
    flow = random_flow(cls, scale=0.1)
    axis = torch.linspace(-5, 5, 41, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis).view(-1, 2, 1, 1)
    area = (axis[1] - axis[0]) ** 2
    total = flow.log_prob(grid, exact=True).exp().sum() * area
    assert total.item() == pytest.approx(1, abs=5e-3)


@every_flow
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_the_density_follows_from_the_jacobian_of_the_map(cls, shape):
    """log p(x) = log N(f(x); 0, 1) + log |det df/dx|."""
    flow = random_flow(cls, channels=shape[0], size=shape[1])
    x = points(3, *shape)
    f = flow.flow().transform
    z = f(x.flatten(1))
    jacobians = [torch.autograd.functional.jacobian(f, sample.flatten()) for sample in x]
    log_determinant = torch.stack(jacobians).slogdet()[1]
    expected = standard_normal_density(z) + log_determinant
    assert (flow.log_prob(x, exact=True) - expected).abs().max() < 5e-3


@every_flow
@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_the_map_is_inverted(cls, shape):
    flow = random_flow(cls, channels=shape[0], size=shape[1])
    x = points(3, *shape).flatten(1)
    f = flow.flow().transform
    z = f(x)
    assert (z - x).abs().max() > 0.1, "the flow is the identity: nothing was tested"
    assert (f.inv(z) - x).abs().max() < 1e-3


def test_an_affine_flow_has_a_normal_density():
    """dz/dt = A z + b carries N(0, 1) to N(m, C).

    With M = exp(A): C = (M^T M)^-1 and m = -M^-1 int exp((1 - t) A) b dt.
    """
    flow = random_flow(ContinuousFlow, depth=0, frequencies=0)
    layer = flow.flow.transform.ode[0]
    # One matrix exponential gives exp(A), and the integral beside it.
    generator = torch.zeros(3, 3, dtype=torch.float64)
    generator[:2, :2] = layer.weight
    generator[:2, 2] = layer.bias
    exponential = torch.linalg.matrix_exp(generator)
    m = exponential[:2, :2]
    shift = exponential[:2, 2]
    mean = -m.inverse() @ shift
    covariance = (m.T @ m).inverse()
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    x = points(50)
    difference = flow.log_prob(x, exact=True) - normal.log_prob(x.flatten(1))
    assert difference.abs().max() < 1e-3


def test_splines_with_zero_weights_are_the_identity():
    flow = random_flow(SplineFlow, scale=0.0)
    x = 3 * points(50)
    assert (flow.log_prob(x) - standard_normal_density(x)).abs().max() < 1e-9


def estimating_flow():
    return random_flow(ContinuousFlow, estimate=True, depth=1)


def exact_flow():
    return random_flow(ContinuousFlow, estimate=False, depth=1)


def test_the_estimate_of_the_trace_is_unbiased():
    x = points(1).expand(500, 2, 1, 1)
    torch.manual_seed(0)
    found = estimating_flow().log_prob(x)
    expected = exact_flow().log_prob(x)[0]
    assert found.std() > 1e-3
    assert (found.mean() - expected).abs() < 5 * found.std() / 500**0.5


def test_the_estimate_of_the_trace_uses_the_global_generator():
    flow = estimating_flow()
    x = points(1).expand(500, 2, 1, 1)
    torch.manual_seed(0)
    first = flow.log_prob(x)
    torch.manual_seed(0)
    same_seed = flow.log_prob(x)
    next_draw = flow.log_prob(x)
    assert torch.equal(first, same_seed)
    assert not torch.equal(first, next_draw)


def test_an_estimating_flow_can_measure_exactly():
    x = points(1).expand(500, 2, 1, 1)
    found = estimating_flow().log_prob(x, exact=True)
    assert torch.equal(found, exact_flow().log_prob(x))


@every_flow
def test_inference_mode_changes_nothing(cls):
    flow = random_flow(cls)
    x = points(3)
    with torch.inference_mode():
        found = flow.log_prob(x.clone())
    assert torch.allclose(found, flow.log_prob(x))


@every_flow
def test_gradients_are_those_of_finite_differences(cls):
    flow = random_flow(cls, scale=0.1)
    x = points(20)
    weight = next(w for w in flow.parameters() if w.ndim == 1).requires_grad_(True)
    flow.log_prob(x).mean().backward()
    # Move the entry of the largest gradient to both sides.
    index = weight.grad.abs().argmax()
    step = 1e-3
    sides = []
    with torch.no_grad():
        for sign in (1, -1):
            weight[index] += sign * step
            sides.append(flow.log_prob(x).mean())
            weight[index] -= sign * step
    difference = (sides[0] - sides[1]) / (2 * step)
    assert weight.grad[index].item() == pytest.approx(difference.item(), rel=5e-3)


def save_flow(flow, path, weights):
    """Write a flow's checkpoint with the given weights."""
    rectify = {"format": FORMAT, "flow": describe(flow)}
    torch.save({"rectify": rectify, "state_dict": weights, "global_step": 3}, path)


@every_flow
def test_loading_keeps_the_flow(cls, tmp_path):
    flow = random_flow(cls, channels=1, size=2)
    flow = flow.float().double()  # weights that float32 represents exactly
    weights = {f"flow.{key}": value for key, value in flow.state_dict().items()}
    path = tmp_path / "step=3.ckpt"
    save_flow(flow, path, weights)
    loaded = load_flow(path).double()
    x = points(4, 1, 2)
    assert torch.equal(loaded.log_prob(x, exact=True), flow.log_prob(x, exact=True))
    assert loaded.shape == (1, 2, 2)
    arguments = {key: getattr(loaded, key) for key in inspect.signature(cls).parameters}
    assert arguments == describe(flow)["init_args"]


@every_flow
def test_missing_weights_are_refused(cls, tmp_path):
    path = tmp_path / "step=3.ckpt"
    save_flow(random_flow(cls, channels=1, size=2), path, {})
    # torch's list of the missing keys, on several lines, follows the path.
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_flow(path)


@pytest.mark.parametrize(
    ("cls", "arguments", "named"),
    [
        (SplineFlow, {"transforms": 0}, ["transforms", 0]),
        (SplineFlow, {"bins": 1}, ["bins", 1]),
        (SplineFlow, {"channels": 1}, ["1 x 1 x 1"]),
        (ContinuousFlow, {"width": 0}, ["width", 0]),
        (ContinuousFlow, {"depth": -1}, ["depth", -1]),
        (ContinuousFlow, {"tolerance": 0.0}, ["tolerance", 0.0]),
    ],
)
def test_impossible_flows_are_refused(cls, arguments, named):
    with refused(cls.__name__, *named):
        cls(**arguments)


@every_flow
def test_without_zuko_the_error_names_the_extra_to_install(cls, monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with refused("zuko", "pip install 'rectify[flows]'"):
        cls()
