"""Guidance: its interval, its rescaling, and a weaker denoiser as the negative."""

import pytest
import torch

from models.denoiser import Denoiser, count_evaluations
from models.guidance import Guided
from models.interpolant import Linear, Trigonometric
from models.nets.dit import DiT
from models.prediction import Velocity
from models.sampler import DDIM, Heun
from tests.helpers.denoisers import randomize
from tests.helpers.refusals import refused
from tests.oracle import single

INTERPOLANT = Trigonometric()


class ConditionalDenoiser:
    """The exact denoiser of N(cond, std^2), or of N(0, 1) without a condition; counts its calls."""

    interpolant = INTERPOLANT

    def __init__(self, std=0.5):
        self.std = std
        self.calls = 0

    def __call__(self, x_t, t, cond=None):
        self.calls += 1
        if cond is None:
            return single(INTERPOLANT, 0.0, 1.0)(x_t, t)
        return single(INTERPOLANT, cond, self.std)(x_t, t)


def states_and_times():
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x_t, torch.tensor([0.1, 0.4, 0.6, 0.9])


def test_a_scale_acts_only_in_its_interval():
    x_t, t = states_and_times()
    denoiser = ConditionalDenoiser()
    plain = denoiser(x_t, t, 2.0)
    everywhere = Guided(denoiser, 3.0)(x_t, t, 2.0)
    inside = Guided(denoiser, 3.0, 0.4, 0.6)(x_t, t, 2.0)
    for found, without, with_scale in zip(inside, plain, everywhere):
        assert not torch.equal(without[1], with_scale[1])
        assert torch.equal(found[[0, 3]], without[[0, 3]])
        assert torch.equal(found[[1, 2]], with_scale[[1, 2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", [DDIM(10), Heun(10)], ids=lambda value: type(value).__name__)
def test_network_calls_with_an_interval_are_counted(sampler, dtype):
    denoiser = ConditionalDenoiser()
    guided = Guided(denoiser, 3.0, 0.3, 0.7)
    sampler(guided, torch.randn(2, 1, 3, 3, dtype=dtype), 1.0)
    assert denoiser.calls == sampler.nfe(guided)


def test_only_steps_inside_the_interval_cost_two_calls():
    guided = Guided(ConditionalDenoiser(), 3.0, 0.3, 0.7)
    assert DDIM(10).nfe(guided) == 10 + 5  # t = .7, .6, .5, .4, .3


every_rescale = pytest.mark.parametrize("rescale", [0.3, 1.0])


@every_rescale
def test_rescaling_keeps_the_state(rescale):
    x_t, t = states_and_times()
    x_hat, eps_hat = Guided(ConditionalDenoiser(), 3.0, rescale=rescale)(x_t, t, 2.0)
    mixed = INTERPOLANT.mix(x_hat, eps_hat, t.double())
    torch.testing.assert_close(mixed, x_t, atol=1e-6, rtol=1e-6)


@every_rescale
def test_rescaling_restores_the_standard_deviation(rescale):
    x_t, t = states_and_times()
    denoiser = ConditionalDenoiser()

    def standard_deviation(model):
        x_hat, _ = model(x_t, t, 2.0)
        return x_hat.flatten(1).std(1)

    conditional = standard_deviation(denoiser)
    unrescaled = standard_deviation(Guided(denoiser, 3.0))
    rescaled = standard_deviation(Guided(denoiser, 3.0, rescale=rescale))
    expected = rescale * conditional + (1 - rescale) * unrescaled
    torch.testing.assert_close(rescaled, expected)


def test_a_weaker_denoiser_is_the_negative():
    """Autoguidance: u is the weaker denoiser's output at the same condition."""
    x_t, t = states_and_times()
    strong = ConditionalDenoiser()
    weak = ConditionalDenoiser(std=0.9)
    guided = Guided(strong, 2.0, negative=weak)
    for found, c, u in zip(guided(x_t, t, 1.0), strong(x_t, t, 1.0), weak(x_t, t, 1.0)):
        torch.testing.assert_close(found, u + 2.0 * (c - u))


def test_a_call_of_the_negative_counts():
    x_t, _ = states_and_times()
    strong = ConditionalDenoiser()
    weak = ConditionalDenoiser(std=0.9)
    guided = Guided(strong, 2.0, negative=weak)
    DDIM(4)(guided, x_t, 1.0)
    assert strong.calls + weak.calls == 8
    assert DDIM(4).nfe(guided) == 8


def small_dit(**options):
    """Return a denoiser of three classes with random weights."""
    net = DiT(4, 2, 2, width=16, depth=1, heads=2, classes=3, **options)
    randomize(net, 0.2)
    return Denoiser(net, INTERPOLANT, Velocity()).eval()


class Batches:
    """Records the sizes of the batches that a network receives."""

    def __init__(self, denoiser):
        self.sizes = []
        denoiser.net.register_forward_pre_hook(lambda _, inputs: self.sizes.append(len(inputs[0])))


def two_calls(denoiser, w, x_t, t, cond, *s):
    """Return guidance by its formula, with one call for each estimate."""
    conditional = denoiser(x_t, t, cond, *s)
    empty = denoiser(x_t, t, None, *s)
    return [u + w * (c - u) for c, u in zip(conditional, empty)]


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [2]), (16, [32]), (17, [17, 17])], ids=["one", "limit", "above"]
)
@pytest.mark.parametrize("two_time", [False, True], ids=["t", "t-s"])
@torch.inference_mode()
def test_a_small_batch_is_doubled_in_one_call(batch, sizes, two_time):
    denoiser = small_dit(two_time=two_time)
    x_t = torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.2, 0.9, batch)
    cond = torch.arange(batch) % 3
    ends = (t / 2,) if two_time else ()
    w = torch.linspace(2, 4, batch)
    expected = two_calls(denoiser, w.view(-1, 1, 1, 1), x_t, t, cond, *ends)
    batches = Batches(denoiser)
    with count_evaluations() as counter:
        found = Guided(denoiser, w)(x_t, t, cond, *ends)
    assert batches.sizes == sizes
    assert counter.count == 2 * batch
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_without_a_scale_is_one_batch_of_its_size():
    denoiser = small_dit()
    batches = Batches(denoiser)
    x_t, t = torch.randn(3, 2, 4, 4), torch.full((3,), 0.5)
    found = Guided(denoiser, 1.0)(x_t, t, torch.arange(3))
    assert batches.sizes == [3]
    for ours, theirs in zip(found, denoiser(x_t, t, torch.arange(3))):
        assert torch.equal(ours, theirs)


def test_a_condition_that_nothing_replaces_takes_two_calls():
    """A text of a length that the network has no empty text for, or a network that cannot say."""
    denoiser = small_dit()
    denoiser.net.null_condition = lambda cond: None
    batches = Batches(denoiser)
    Guided(denoiser, 3.0)(torch.randn(3, 2, 4, 4), torch.tensor(0.5), torch.arange(3))
    assert batches.sizes == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"low": 0.7, "high": 0.3}, ["low", 0.7, "high", 0.3]),
        ({"high": 1.1}, ["low", "high", 1.1]),
        ({"rescale": 1.5}, ["rescale", 1.5, "[0, 1]"]),
        ({"negative": single(Linear())}, ["negative", repr(Linear()), repr(INTERPOLANT)]),
    ],
    ids=["low", "high", "rescale", "negative"],
)
def test_impossible_arguments_are_refused(arguments, named):
    with refused("Guided", *named):
        Guided(ConditionalDenoiser(), 2.0, **arguments)
