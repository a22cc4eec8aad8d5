"""At least one example of every interpolant and of every prediction, for property tests."""

import inspect

import pytest

from models.interpolant import Discrete, Interpolant, Linear, Shifted, VariancePreserving
from models.prediction import Prediction
from models.sampler import Sampler
from models.windows import Piecewise


def public_subclasses(base: type, package: str = "models.") -> list[type]:
    """Return every subclass that a checkpoint, or an option, can name."""
    return [cls for cls in base.__subclasses__() if cls.__module__.startswith(package)]


def public_samplers() -> list[type[Sampler]]:
    """Return every sampler that has a name; `OnScheduler` wraps one of them."""
    return public_subclasses(Sampler, "models.sampler.")


def default_instances(base: type) -> list:
    """Return an instance of every public subclass whose arguments all have defaults."""
    instances = []
    for cls in public_subclasses(base):
        parameters = inspect.signature(cls).parameters.values()
        if all(parameter.default is not parameter.empty for parameter in parameters):
            instances.append(cls())
    return instances


INTERPOLANTS = [
    *default_instances(Interpolant),
    Discrete.scaled_linear(beta_start=0.00085, beta_end=0.012),
    Discrete.scaled_linear(zero_terminal_snr=True),
    Shifted(Linear(), 3.0),
    Shifted(VariancePreserving(0.5, 10.0), 0.5),
    Linear(0.1),
    # One window: with more, solvers lose their orders at the kinks (tests/models/test_windows.py).
    Piecewise(VariancePreserving(), 1),
]
PREDICTIONS = default_instances(Prediction)
every_interpolant = pytest.mark.parametrize("interpolant", INTERPOLANTS, ids=repr)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
