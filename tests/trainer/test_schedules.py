"""The warm-up schedule: its learning rates, against closed forms and torch's cosine."""

from math import sqrt

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from tests.helpers.refusals import refused
from trainer.schedules import WarmUp

RATE = 0.5


def make_optimizer() -> SGD:
    """Return an optimizer of one weight."""
    return SGD([torch.nn.Parameter(torch.ones(1))], lr=RATE)


def learning_rates(count: int, **arguments) -> list[float]:
    """Return the learning rate of some steps, as a part of the optimizer's."""
    optimizer = make_optimizer()
    schedule = WarmUp(optimizer, **arguments)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"] / RATE)
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear", "inverse_sqrt"])
def test_the_rate_rises_linearly_to_its_peak(decay):
    rates = learning_rates(4, warmup=4, decay=decay, steps=10)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("inverse_sqrt", [0.5, 1, sqrt(2 / 3), sqrt(2 / 4), sqrt(2 / 5), sqrt(2 / 6)]),
    ],
)
def test_the_rate_decays_to_its_floor(decay, expected):
    """Of six steps, two are warm-up; afterwards a decay that ends stays at the floor, 0.2."""
    rates = learning_rates(len(expected), warmup=2, decay=decay, floor=0.2, steps=6)
    assert rates == pytest.approx(expected)


def test_an_inverse_square_root_stops_at_its_floor():
    assert learning_rates(200, decay="inverse_sqrt", floor=0.1)[98:102] == pytest.approx(
        [0.1] * 4, abs=1e-3
    )
    assert learning_rates(200, decay="inverse_sqrt", floor=0.1)[-1] == 0.1


def test_a_cosine_without_warm_up_is_torchs():
    optimizer = make_optimizer()
    schedule = CosineAnnealingLR(optimizer, T_max=10, eta_min=0.1 * RATE)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"] / RATE)
        optimizer.step()
        schedule.step()
    assert learning_rates(10, decay="cosine", floor=0.1, steps=10) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"warmup": -1, "steps": 5}, ("warmup", -1)),
        ({"floor": 1.5, "steps": 5}, ("floor", 1.5)),
        ({"decay": "linear"}, ("steps", "linear")),
        ({"steps": 0}, ("steps", 0, "cosine")),
    ],
    ids=["warmup", "floor", "no length", "length 0"],
)
def test_a_schedule_that_cannot_be_is_refused(arguments, named):
    with refused(*named):
        WarmUp(make_optimizer(), **arguments)
