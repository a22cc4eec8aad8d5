"""One example or more of every interpolant and every prediction: what the property tests walk over."""

import inspect

import pytest

from models.interpolant import Discrete, Interpolant, Linear, Shifted, VariancePreserving
from models.prediction import Prediction
from models.windows import Piecewise


def public(base: type) -> list[type]:
    """Return every subclass that a checkpoint can name."""
    return [cls for cls in base.__subclasses__() if cls.__module__.startswith("models.")]


def plain(base: type) -> list:
    """Return an instance of every public subclass whose arguments all have defaults."""
    parameters = {cls: inspect.signature(cls).parameters.values() for cls in public(base)}
    return [cls() for cls, of in parameters.items() if all(p.default is not p.empty for p in of)]


INTERPOLANTS = plain(Interpolant) + [
    Discrete.scaled_linear(beta_start=0.00085, beta_end=0.012),
    Discrete.scaled_linear(zero_terminal_snr=True),
    Shifted(Linear(), 3.0),
    Shifted(VariancePreserving(0.5, 10.0), 0.5),
    Linear(0.1),
    Piecewise(VariancePreserving(), 1),  # with more windows solvers lose their orders at the kinks: tests/models/test_windows.py
]
PREDICTIONS = plain(Prediction)
every_interpolant = pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=repr)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
