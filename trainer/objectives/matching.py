"""Matching: flow matching, denoising and score matching are this one regression, told apart by the row."""

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand
from models.prediction import Prediction, Velocity
from models.sampler import DenoiserLike
from trainer.draws import Draws, uniform
from trainer.errors import Error, Squared
from trainer.objectives.base import Objective
from trainer.times import Times, Uniform
from trainer.weights import Weight


def answering(denoiser: DenoiserLike, *rows: Prediction | None) -> None:
    """Refuse a denoiser asked at t = 1 whose prediction, or a row that measures it, does not tell data and noise apart there.

    Raises:
        ValueError: so it is.
    """
    zero, one = torch.zeros(1), torch.ones(1)
    for row in (getattr(denoiser, "prediction", None), *rows):
        if row is not None:
            row.solve(denoiser.interpolant, zero, zero, one)  # type: ignore[attr-defined]


class Matching(Objective):
    """E w(t) |y_hat - y|^2 per dimension, y = a x + b eps (2210.02747, 2006.11239).

    On fresh noise it trains a teacher; on pairs that bring their own noise it rectifies (2209.03003, 2410.07303).

    Args:
        times: law of t.
        measure: row in which the error is measured; by default what the network predicts (Velocity for an analytic denoiser).
        weight: of each noise level; by default every error counts alike in the row that measures it. With one, squared errors
            give the same loss in every row.
        error: squared, by default, or pseudo-Huber.
    """

    def __init__(
        self,
        times: Times | None = None,
        measure: Prediction | None = None,
        weight: Weight | None = None,
        error: Error | None = None,
    ):
        self.times, self.measure, self.weight, self.error = times or Uniform(), measure, weight, error or Squared()

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        t = self.times.on(denoiser.interpolant)(uniform(draws, "time", x))  # type: ignore[attr-defined]
        return self.at(denoiser, x, eps, t, cond)

    def at(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        """Return the mean loss at times t, (B,); denoisers that jump are asked for a jump to s, (B,), if it is given."""
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        jump = () if s is None or not getattr(denoiser, "jumps", False) else (s,)
        y = self.measure or getattr(denoiser, "prediction", None) or Velocity()
        x_hat, eps_hat = denoiser(interpolant.mix(x, eps, t), t, cond, *jump)
        errors = self.error(y.target(interpolant, x_hat - x, eps_hat - eps, t))
        if self.weight:
            errors = expand(self.weight(interpolant, y, t), errors) * errors
        self.seen = t, errors.detach().flatten(1).mean(1)
        return errors.mean()
