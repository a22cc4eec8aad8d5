"""Progressive distillation: one step of the student is two steps of its teacher."""

from torch import Tensor

from models.interpolant import expand
from models.sampler import DenoiserLike, Trajectory
from trainer.objectives.base import Loss, Objective, mean_loss
from trainer.objectives.parts.distances import Distance, Squared
from trainer.objectives.parts.weightings import TruncatedSNR, Weighting
from trainer.objectives.teachers import FrozenTeacher, ddim_between
from trainer.step_random import StepRandom, draw_stratified


class Progressive(Objective):
    """E w(t) |x_hat - x~|^2 per dimension, for one round of progressive distillation.

    Salimans & Ho 2022 (arXiv 2202.00512), algorithm 2.

    The teacher makes two DDIM steps from t = i/N to s = t - 1/N, with i drawn from 1 to N. x~ is
    the data of the line through x_t and x_s: a student that predicts it arrives at x_s in one
    step. The trained student, for DDIM in N steps, is the teacher of the next round, with N/2.

    Args:
        teacher: for DDIM in 2 N steps.
        steps: N, the student's steps from noise to data.
        weighting: weight of an error of data at t; by default max(SNR, 1) (section 4). The
            paper's SNR + 1 is EDM(1).
        distance: of x_hat - x~; squared by default.
    """

    def __init__(
        self,
        teacher: FrozenTeacher,
        steps: int,
        weighting: Weighting | None = None,
        distance: Distance | None = None,
    ):
        if steps < 1:
            raise ValueError(
                f"Progressive: steps is {steps}; it must be at least 1, the student's steps from "
                "noise to data"
            )
        self.teacher = teacher
        self.steps = steps
        self.weighting = weighting or TruncatedSNR()
        self.distance = distance or Squared()

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        interpolant = denoiser.interpolant

        # 1. A step of the student, from t = (i + 1)/N to s = i/N.
        u = draw_stratified(random, "time", x)
        i = (u * self.steps).floor().clamp(max=self.steps - 1)
        t = (i + 1) / self.steps
        s = i / self.steps
        x_t = interpolant.mix(x, eps, t)
        x_hat, _ = Trajectory(denoiser, cond)(x_t, t, s)

        # 2. Two steps of the teacher, and the data of the line through both states.
        teacher = self.teacher.for_student(denoiser, x)
        x_s = ddim_between(teacher, x_t, t, s, cond, steps=2)
        x_target, _ = interpolant.solve_pair(x_t, t, x_s, s)

        # 3. The weighted error.
        errors = self.distance(x_hat - x_target)
        errors = expand(self.weighting.of_data(interpolant, t), errors) * errors
        return mean_loss(errors, t)
