"""Matching: flow matching, denoising and score matching are one regression.

They differ only in the prediction.
"""

import torch
from torch import Tensor

from models.denoiser import Predicting, is_two_time, prediction_of
from models.interpolant import expand
from models.prediction import Prediction
from models.sampler import DenoiserLike
from trainer.objectives.base import Loss, Objective, mean_loss
from trainer.objectives.parts.distances import Distance, Squared
from trainer.objectives.parts.time_distributions import TimeDistribution, Uniform
from trainer.objectives.parts.weightings import Weighting
from trainer.step_random import StepRandom, draw_stratified


def check_solvable_at_noise(denoiser: DenoiserLike, *predictions: Prediction | None) -> None:
    """Check that predictions determine data and noise at t = 1, where the state is pure noise.

    Args:
        denoiser: its interpolant and its prediction are checked.
        predictions: others that are checked, where not None.

    Raises:
        ValueError: one of them is singular at t = 1.
    """
    zero = torch.zeros(1)
    one = torch.ones(1)
    predicted = denoiser.prediction if isinstance(denoiser, Predicting) else None
    for prediction in (predicted, *predictions):
        if prediction is not None:
            prediction.solve(denoiser.interpolant, zero, zero, one)


class Matching(Objective):
    """E w(t) |y_hat - y|^2 per dimension, for the prediction y = a(t) x + b(t) eps.

    On fresh noise it trains a teacher: with Velocity it is flow matching (Lipman et al. 2022,
    arXiv 2210.02747), with NoisePrediction DDPM's loss (Ho et al. 2020, arXiv 2006.11239). On
    pairs, each with the noise of its sample, it rectifies (Liu et al. 2022, arXiv 2209.03003;
    Wang et al. 2024, arXiv 2410.07303).

    Args:
        times: distribution of t.
        measure: prediction y in which the error is measured; by default what the network
            predicts (Velocity for an analytic denoiser).
        weighting: weight of each noise level, defined for squared errors of data: the loss is
            then the same in every `measure`. By default all errors of y count the same.
        distance: of y_hat - y; squared by default.
    """

    teaches_jumps = False

    def __init__(
        self,
        times: TimeDistribution | None = None,
        measure: Prediction | None = None,
        weighting: Weighting | None = None,
        distance: Distance | None = None,
    ):
        self.times = times or Uniform()
        self.measure = measure
        self.weighting = weighting
        self.distance = distance or Squared()

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        times = self.times.for_shape(x.shape).for_interpolant(denoiser.interpolant)
        t = times(draw_stratified(random, "time", x))
        return self.loss_at(denoiser, x, eps, t, cond)

    def loss_at(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        s: Tensor | None = None,
    ) -> Loss:
        """Return the mean loss at given times.

        Args:
            denoiser: the student.
            x: data, (B, C, H, W).
            eps: noise, (B, C, H, W).
            t: times, (B,).
            cond: encoded condition, if any.
            s: end of the step for two-time networks, (B,); other networks do not receive it.
        """
        interpolant = denoiser.interpolant
        prediction = self.measure or prediction_of(denoiser)

        # 1. The student's estimate of x and eps from the state x_t = alpha x + sigma eps.
        x_t = interpolant.mix(x, eps, t)
        if s is not None and is_two_time(denoiser):
            x_hat, eps_hat = denoiser(x_t, t, cond, s)
        else:
            x_hat, eps_hat = denoiser(x_t, t, cond)

        # 2. The error y_hat - y, linear in those of x and eps.
        gap = prediction.target(interpolant, x_hat - x, eps_hat - eps, t)
        errors = self.distance(gap)
        if self.weighting:
            errors = expand(self.weighting(interpolant, prediction, t), errors) * errors
        return mean_loss(errors, t)
