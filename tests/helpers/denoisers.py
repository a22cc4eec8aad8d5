"""Stand-ins in tests of objectives: teachers without a run, counting denoisers, exact students."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.description import identity
from models.interpolant import Interpolant, expand
from models.nets.dit import DiT
from models.prediction import Prediction, Velocity
from models.windows import window
from tests.oracle import Flow, Point
from trainer.objectives.base import Loss
from trainer.objectives.meanflow import mean_velocity


class FixedTeacher:
    """A teacher that needs no run folder: it holds its denoiser.

    Args:
        denoiser: the teacher's denoiser, on the student's interpolant.
    """

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def for_student(self, student, like, interpolant=None):
        required = interpolant or student.interpolant
        assert identity(required) == identity(self.denoiser.interpolant)
        return self.denoiser


class FixedTime:
    """A distribution of a single time t.

    It is no subclass of the time distributions: tests check the density of each of those.
    """

    def __init__(self, t: float):
        self.t = t

    def for_shape(self, shape):
        return self

    def for_interpolant(self, interpolant):
        return lambda u: torch.full_like(u, self.t, dtype=torch.float64)


class Call(NamedTuple):
    """The arguments of one call of a denoiser."""

    t: Tensor
    s: Tensor | None
    cond: Tensor | None
    with_gradient: bool


class CountingDenoiser:
    """A denoiser that records its calls and counts the samples that it evaluates.

    Args:
        denoiser: the denoiser that computes the result.
    """

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.interpolant = denoiser.interpolant
        self.two_time = getattr(denoiser, "two_time", False)
        self.calls: list[Call] = []
        self.evaluated = 0

    def __call__(self, x_t, t, cond=None, s=None):
        self.calls.append(Call(t, s, cond, torch.is_grad_enabled()))
        self.evaluated += len(x_t)
        if s is None:
            return self.denoiser(x_t, t, cond)
        return self.denoiser(x_t, t, cond, s)


class PointJumps(Point):
    """The exact two-time denoiser of one data point: every jump leads to the point."""

    two_time = True

    def __call__(self, x_t, t, cond=None, s=None):
        return super().__call__(x_t, t, cond)


class ShiftedJumps:
    """The exact jumps of a Gaussian with an error in x_hat.

    Args:
        interpolant: the interpolant of the states.
        error: the error of x_hat in calls with a gradient: in the student.
        held_error: the error of x_hat in calls without a gradient: in the target.
    """

    two_time = True

    def __init__(self, interpolant: Interpolant, error: float | Tensor, held_error: float):
        self.interpolant = interpolant
        self.flow = Flow(interpolant)
        self.error = error
        self.held_error = held_error

    def __call__(self, x_t, t, cond=None, s=None):
        x_hat, eps_hat = self.flow(x_t, t, cond, s)
        error = self.error if torch.is_grad_enabled() else self.held_error
        return x_hat + error, eps_hat


class ShiftedVelocity(Flow):
    """The exact jumps of a Gaussian with an error in their mean velocity.

    Args:
        interpolant: the interpolant of the states.
        error: the error of the mean velocity.
        held_error: the error in calls without a gradient; by default the same.
    """

    def __init__(self, interpolant: Interpolant, error: Tensor, held_error: Tensor | None = None):
        super().__init__(interpolant)
        self.error = error
        self.held_error = error if held_error is None else held_error

    def __call__(self, x_t, t, cond=None, s=None):
        x, eps = super().__call__(x_t, t, cond, s)
        error = self.error if torch.is_grad_enabled() else self.held_error
        end = t if s is None else s

        # the mean velocity is a x + b eps
        one = torch.ones_like(t)
        zero = torch.zeros_like(t)
        a = mean_velocity(self.interpolant, (one, zero), t, end)
        b = mean_velocity(self.interpolant, (zero, one), t, end)

        # a step along (sigma, -alpha) keeps x_t and changes the mean velocity by the error
        alpha, sigma = self.interpolant(t)
        step = expand(error / (a * sigma - b * alpha), x)
        return x + step * expand(sigma, x), eps - step * expand(alpha, x)


class ChordStudent:
    """The exact student in windows of time: it predicts the ends of the chord through its state.

    A chord connects the two states of a trajectory at the edges of a window.

    Args:
        interpolant: the student's interpolant.
        flow: the exact flow, on the teacher's interpolant.
        edges: the edges of the windows, falling from 1 to 0.
        error: an error added to the network's output.
        prediction: what the network predicts; by default the velocity.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        flow: Flow,
        edges: list[float],
        error: float | Tensor = 0.0,
        prediction: Prediction | None = None,
    ):
        self.interpolant = interpolant
        self.flow = flow
        self.edges = edges
        self.error = torch.as_tensor(error)
        self.prediction = prediction or Velocity()

    def __call__(self, x_t, t, cond=None):
        s, e = window(t, self.edges)

        # the chords of two states at the window's noisy edge: everything is affine in that state
        ends = []
        for value in (0.0, 1.0):
            x_s = torch.full((len(t), 1, 1, 1), value, dtype=x_t.dtype)
            x_e = self.flow.map(x_s, s, e)
            ends.append(self.flow.interpolant.solve_pair(x_s, s, x_e, e))
        (x_low, eps_low), (x_high, eps_high) = ends

        # the chord that goes through x_t
        low = self.interpolant.mix(x_low, eps_low, t)
        high = self.interpolant.mix(x_high, eps_high, t)
        position = (x_t - low) / (high - low)
        x = x_low + position * (x_high - x_low)
        eps = eps_low + position * (eps_high - eps_low)

        # the network's output for its ends, with the error
        y = self.prediction.target(self.interpolant, x, eps, t) + self.error
        return self.prediction.solve(self.interpolant, y, x_t, t)


def tiny_dit(size: int = 4, channels: int = 1, patch: int = 2, **options: Any) -> DiT:
    """Return a DiT of one block as torch and the network initialise it."""
    return DiT(size, channels, patch, width=16, depth=1, heads=2, **options)


def randomize(net: nn.Module, std: float) -> None:
    """Draw all parameters from N(0, std^2), so that no output is zero."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std)


def seeded_batch(n: int = 64) -> tuple[Tensor, Tensor]:
    """Seed torch's global generator, and return data and noise of shape (n, 1, 2, 2)."""
    torch.manual_seed(0)
    x, eps = torch.randn(2, n, 1, 2, 2, dtype=torch.float64)
    return x, eps


def seeded_result(
    objective, denoiser, n: int = 64, cond: Tensor | None = None, random=None
) -> Loss:
    """Return the loss on `seeded_batch`: data, noise and times are the same in every call."""
    x, eps = seeded_batch(n)
    return objective(denoiser, x, eps, cond, random)


def seeded_loss(
    objective, denoiser, n: int = 64, cond: Tensor | None = None, random=None
) -> Tensor:
    """Return the total loss on `seeded_batch`."""
    return seeded_result(objective, denoiser, n, cond, random).total


def derivative(loss: Callable[[Any], Tensor], value: float) -> float:
    """Return the derivative by autograd of a loss of one float64 number."""
    number = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(number), number)
    return slope.item()


def central_difference(loss: Callable[[Any], Tensor], value: float, h: float) -> float:
    """Return the derivative by a central difference of a loss of one number."""
    ahead = loss(value + h)
    behind = loss(value - h)
    return (ahead - behind).item() / (2 * h)
