"""Progressive distillation: one step of the student is two of its teacher."""

from torch import Tensor

from models.interpolant import Interpolant, expand
from models.sampler import DenoiserLike, Walk
from trainer.draws import Draws, uniform
from trainer.errors import Error, Squared
from trainer.objectives.base import Objective
from trainer.objectives.frozen import Frozen, carry
from trainer.weights import TruncatedSNR, Weight


class Progressive(Objective):
    """E w(t) |x_hat - x~|^2 per dimension, x~ the data of the chord through two DDIM steps of the teacher (2202.00512, alg. 2).

    The steps go from t = i/N to s = t - 1/N, i drawn from 1 to N; a student that says x~ gets there in one. This is one round:
    its student, which draws well with DDIM in N steps, is the teacher of the next, with half of N.

    Args:
        teacher: good at 2 N DDIM steps.
        steps: N, the student's from noise to data.
        weight: of an error of data at t; by default max(SNR, 1) (2202.00512, section 4); EDM(1) is the paper's SNR + 1.
        error: squared, by default, or pseudo-Huber.
    """

    def __init__(self, teacher: Frozen, steps: int, weight: Weight | None = None, error: Error | None = None):
        if steps < 1:
            raise ValueError(f"Progressive: steps is {steps}, it must be at least 1, the student's steps from noise to data")
        self.teacher, self.steps, self.weight, self.error = teacher, steps, weight or TruncatedSNR(), error or Squared()

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        i = (uniform(draws, "time", x) * self.steps).floor().clamp(max=self.steps - 1)
        t, s = (i + 1) / self.steps, i / self.steps
        x_t = interpolant.mix(x, eps, t)
        x_hat, _ = Walk(denoiser, cond)(x_t, t, s)
        x_s = carry(self.teacher.on(denoiser, x), x_t, t, s, cond, 2)
        errors = self.error(x_hat - interpolant.unmix(x_t, t, x_s, s)[0])
        errors = expand(self.weight.of_data(interpolant, t), errors) * errors
        self.seen = t, errors.detach().flatten(1).mean(1)
        return errors.mean()
