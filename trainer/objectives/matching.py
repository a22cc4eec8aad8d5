"""Matching: flow matching, denoising and score matching are this one regression, told apart by the row."""

import torch
from torch import Tensor

from models.interpolant import Interpolant
from models.prediction import Prediction, Velocity
from models.sampler import DenoiserLike
from trainer.draws import Draws
from trainer.objectives import Objective
from trainer.times import Times, Uniform


class Matching(Objective):
    """E |y_hat - y|^2 per dimension, y = a x + b eps (2210.02747, 2006.11239).

    On fresh noise it trains a teacher; on pairs that bring their own noise it rectifies (2209.03003, 2410.07303).

    Args:
        times: law of t.
        measure: row in which the error is measured; by default what the network predicts (Velocity for an analytic denoiser).
    """

    def __init__(self, times: Times | None = None, measure: Prediction | None = None):
        self.times, self.measure = times or Uniform(), measure

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        t = self.times.on(interpolant)(draws.stratified("time") if draws else torch.rand(len(x), device=x.device))
        y = self.measure or getattr(denoiser, "prediction", None) or Velocity()
        x_hat, eps_hat = denoiser(interpolant.mix(x, eps, t), t, cond)
        squares = y.target(interpolant, x_hat - x, eps_hat - eps, t).square()
        self.seen = t, squares.detach().flatten(1).mean(1)
        return squares.mean()
