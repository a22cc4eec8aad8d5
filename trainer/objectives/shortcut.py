"""Shortcut models: a step is learnt from two steps of half its length, the shortest from data."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.denoiser import TwoTimeDenoiser, is_two_time, prediction_of
from models.prediction import Prediction
from models.sampler import DenoiserLike
from trainer.objectives.base import Loss, Objective, mean_loss
from trainer.objectives.parts.distances import Distance, Squared
from trainer.objectives.parts.time_distributions import END_MARGIN, TimeDistribution, Uniform
from trainer.step_random import StepRandom, draw_stratified, draw_uniform


class StepTimes(NamedTuple):
    """Times of a step, (B,) each, falling."""

    t: Tensor
    middle: Tensor
    end: Tensor


class Shortcut(Objective):
    """E |y_hat - y|^2, where y is the target of the data, or of two steps of half the length.

    Frans et al. 2024 (arXiv 2410.12557), eq. 5.

    At s = t the target is that of the data, as in flow matching. At s < t it is that of the line
    through x_t and the state at which two half steps of the student arrive; on Linear with
    Velocity this is s(x, t, 2d) = (s(x, t, d) + s(x', t - d, d)) / 2 (eq. 4). It needs a network
    with two_time, and works with every prediction and interpolant. Step lengths are 2^-k in t,
    and t is a multiple of the length, so that sampling in 1, 2, 4, ... equal steps only uses
    steps that were learnt. The smallest step of all is taken with the velocity of flow matching
    (d = 0). The student makes the half steps with its current weights and without gradient (the
    paper takes the average of its weights).

    Args:
        bootstrap_every: one sample out of this many learns from two half steps, the others from
            data (section 3.2: 4); at least 2.
        halvings: the smallest step is 2^-halvings (section 3.2: 7, 128 steps); in [1, 20].
        times: distribution of t for samples that learn from data.
        measure: prediction y in which the error is measured; by default what the network
            predicts (Velocity for an analytic denoiser).
        distance: of y_hat - y; squared by default.
    """

    def __init__(
        self,
        bootstrap_every: int = 4,
        halvings: int = 7,
        times: TimeDistribution | None = None,
        measure: Prediction | None = None,
        distance: Distance | None = None,
    ):
        if bootstrap_every < 2:
            raise ValueError(
                f"Shortcut: bootstrap_every is {bootstrap_every}; it must be at least 2, so that "
                "some samples learn from data"
            )
        if not 1 <= halvings <= 20:
            raise ValueError(f"Shortcut: halvings is {halvings}; it must lie in [1, 20]")
        self.bootstrap_every = bootstrap_every
        self.halvings = halvings
        self.times = times or Uniform()
        self.measure = measure
        self.distance = distance or Squared()

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        if not is_two_time(denoiser):
            raise ValueError(
                "Shortcut: the network reads one time; build it with "
                "model.denoiser.net.init_args.two_time true"
            )
        interpolant = denoiser.interpolant
        dtype = torch.promote_types(x.dtype, torch.float32)

        # 1. Times: t = s for samples that learn from data, a step for every n-th sample, which
        #    learns from half steps, counted by the position in the global batch.
        times = self.times.for_shape(x.shape).for_interpolant(interpolant)
        t = times(draw_stratified(random, "time", x)).to(dtype)
        length = draw_uniform(random, "end_time", t).to(dtype)
        position = draw_uniform(random, "extra", t).to(dtype)
        start = random.batch.start if random else 0
        bootstrap = slice(-start % self.bootstrap_every, None, self.bootstrap_every)
        step = self.step_times(length[bootstrap], position[bootstrap])
        t[bootstrap] = step.t
        s = t.clone()
        s[bootstrap] = step.end
        x_t = interpolant.mix(x, eps, t)

        # 2. Targets (x, eps): those of the batch, or the ends of the line through two half steps.
        x = x.to(dtype, copy=True)
        eps = eps.to(dtype, copy=True)
        step_cond = None if cond is None else cond[bootstrap]
        x[bootstrap], eps[bootstrap] = self.chord(denoiser, x_t[bootstrap], step, step_cond)

        # 3. The error of the student's step from t to s.
        x_hat, eps_hat = denoiser(x_t, t, cond, s)
        prediction = self.measure or prediction_of(denoiser)
        gap = prediction.target(interpolant, x_hat - x, eps_hat - eps, t)
        errors = self.distance(gap)
        return mean_loss(errors, t)

    def step_times(self, length: Tensor, position: Tensor) -> StepTimes:
        """Return steps of length 2^-k that start at a multiple of it, from uniform numbers (B,).

        Args:
            length: chooses k from 0 to halvings - 1.
            position: chooses which of the 2^k steps.
        """
        count = 2 ** (length * self.halvings).floor()
        index = (position * count).floor()
        t = ((index + 1) / count).clamp(max=1 - END_MARGIN)
        return StepTimes(t, (index + 0.5) / count, index / count)

    @torch.no_grad()
    def chord(
        self, denoiser: TwoTimeDenoiser, x_t: Tensor, step: StepTimes, cond: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the ends (x, eps) of the line through x_t and where two half steps lead."""
        interpolant = denoiser.interpolant
        is_smallest = step.middle - step.end < 1.5 * 2**-self.halvings
        x_s = x_t
        for t, s in ((step.t, step.middle), (step.middle, step.end)):
            x_hat, eps_hat = denoiser(x_s, t, cond, t.where(is_smallest, s))
            x_s = interpolant.mix(x_hat, eps_hat, s)
        return interpolant.solve_pair(x_t, step.t, x_s, step.end)
