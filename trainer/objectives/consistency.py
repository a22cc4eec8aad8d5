"""Consistency models: steps to one end, from neighbouring states of a trajectory, must coincide."""

from typing import NamedTuple

import torch
from torch import Tensor

from models.denoiser import is_two_time
from models.interpolant import Interpolant, expand
from models.sampler import DenoiserLike, Trajectory
from trainer.objectives.base import Loss, Objective, mean_loss
from trainer.objectives.parts.distances import Distance, PseudoHuber
from trainer.objectives.parts.time_distributions import TimeDistribution, Uniform
from trainer.objectives.parts.weightings import Weighting
from trainer.objectives.teachers import EMATeacher, FrozenTeacher, ddim_between
from trainer.step_random import StepRandom, draw_stratified, draw_uniform


class NeighbouringTimes(NamedTuple):
    """Times of each sample, (B,) each, e <= s < t: multiples of 1/N."""

    t: Tensor
    s: Tensor  # t - 1/N
    e: Tensor  # the end of the steps from both


class Consistency(Objective):
    """E w(t) d(f(x_t, t), f(x_s, s)) with s = t - 1/N.

    Song et al. 2023 (arXiv 2303.01469), algorithms 2 and 3.

    f(x_t, t) = mix(x_hat, eps_hat, e) is the student's step from t to an end e: DDIM's step, or
    the step that a two-time network has learnt. f(x_e, e) = x_e holds for any network, because
    the denoiser's estimates satisfy x_t = mix(x_hat, eps_hat, t). The paper obtains this
    boundary condition by c_skip and c_out (appendix C), which here are the special case of the
    prediction EDMPreconditioned.

    With a teacher, x_s is its DDIM step from x_t: consistency distillation. Without one, x_s is
    made of the same data and noise as x_t: consistency training. On pairs both states lie on the
    line between the pair's noise and sample. The target f(x_s, s) has no gradient; it is
    computed with the student's weights (Song & Dhariwal 2023, arXiv 2310.14189, section 3.2) or
    with their average (`target`). Errors are divided by N0 (t - s), N0 being `steps`, which is 1
    until N doubles (section 3.1 there, with t instead of sigma).

    Args:
        teacher: carries states from t to s; none for consistency training.
        steps: N, the number of equal steps of t from 0 to 1.
        windows: number of equal windows of [0, 1], a divisor of N; e is the lower edge of the
            window of t (phased consistency models, Wang et al. 2024, arXiv 2405.18407, section
            3.1). With 1, e = 0.
        random_end: draw e from the multiples of 1/N between that edge and s (consistency
            trajectory models, Kim et al. 2023, arXiv 2310.02279); needs a network with two_time.
        times: distribution of t, rounded up to the next multiple of 1/N.
        weighting: weight of each noise level, as for errors of data; by default all count the
            same.
        distance: between the two steps' ends; by default pseudo-Huber with c = .00054 sqrt(d)
            (arXiv 2310.14189, section 3.3).
        teacher_steps: the teacher's DDIM steps from t to s.
        doublings: how often N doubles during training (arXiv 2310.14189, section 3.4).
        double_every: training steps between doublings.
        target: the student's average, if the target is to be computed with it.
    """

    def __init__(
        self,
        teacher: FrozenTeacher | None = None,
        steps: int = 32,
        windows: int = 1,
        random_end: bool = False,
        times: TimeDistribution | None = None,
        weighting: Weighting | None = None,
        distance: Distance | None = None,
        teacher_steps: int = 1,
        doublings: int = 0,
        double_every: int = 1000,
        target: EMATeacher | None = None,
    ):
        if min(steps, windows, teacher_steps, double_every) < 1 or doublings < 0:
            raise ValueError(
                f"Consistency: steps {steps}, windows {windows}, teacher_steps {teacher_steps} and "
                f"double_every {double_every} must be at least 1, doublings {doublings} at least 0"
            )
        if steps % windows:
            raise ValueError(
                f"Consistency: steps is {steps}; it must be a multiple of windows, {windows}, so "
                "that the edges of the windows are multiples of 1/N"
            )
        self.teacher = teacher
        self.steps = steps
        self.windows = windows
        self.random_end = random_end
        self.times = times or Uniform()
        self.weighting = weighting
        self.distance = distance or PseudoHuber(power=0.5)
        self.teacher_steps = teacher_steps
        self.doublings = doublings
        self.double_every = double_every
        self.target = target

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        if self.random_end and not is_two_time(denoiser):
            raise ValueError(
                "Consistency: random_end is true, but the network reads one time; build it with "
                "two_time true, or set random_end to false"
            )
        interpolant = denoiser.interpolant

        # 1. Neighbouring times, and the student's step from x_t to e.
        t, s, e = self.sample_times(interpolant, x, random)
        x_t = interpolant.mix(x, eps, t)
        student = Trajectory(denoiser, cond)
        from_t = student.ddim(x_t, t, e)

        # 2. The target: the step to e from the neighbouring state x_s, without gradient.
        with torch.no_grad():
            if self.teacher:
                teacher = self.teacher.for_student(denoiser, x)
                x_s = ddim_between(teacher, x_t, t, s, cond, self.teacher_steps)
            else:
                x_s = interpolant.mix(x, eps, s)
            from_s = self._step_from_neighbour(student, x_s, t, s, e)

        # 3. The weighted distance of the two.
        errors = self.distance(from_t - from_s)
        errors = errors / expand(self.steps * (t - s), errors)
        if self.weighting:
            errors = expand(self.weighting.of_data(interpolant, t), errors) * errors
        return mean_loss(errors, t)

    def sample_times(
        self, interpolant: Interpolant, x: Tensor, random: StepRandom | None
    ) -> NeighbouringTimes:
        """Draw the times of a batch x."""
        # N at this training step.
        training_step = random.batch.step if random else 0
        n = self.steps * 2 ** min(self.doublings, training_step // self.double_every)

        # t = i/N, and the lower edge of its window, in units of 1/N.
        times = self.times.for_shape(x.shape).for_interpolant(interpolant)
        t = times(draw_stratified(random, "time", x))
        i = (t * n).ceil().clamp(max=n)
        width = n // self.windows
        end = ((i - 1) / width).floor() * width

        # A random end between that edge and s. It is not stratified: e would be a function of t.
        if self.random_end:
            u = draw_uniform(random, "end_time", i)
            end = torch.minimum(end + (u * (i - end)).floor(), i - 1)
        return NeighbouringTimes(i / n, (i - 1) / n, end / n)

    def _step_from_neighbour(
        self, student: Trajectory, x_s: Tensor, t: Tensor, s: Tensor, e: Tensor
    ) -> Tensor:
        """Return f(x_s, s), by the student or its average."""
        trajectory = student
        if self.target:
            average = self.target.for_student(student.denoiser, x_s)
            trajectory = Trajectory(average, student.cond)
        # Where s = e, f is x_s itself. The network is evaluated at t there, and its result
        # ignored, because its prediction may be singular at s.
        at_end = s == e
        stepped = trajectory.ddim(x_s, t.where(at_end, s), e)
        return x_s.where(expand(at_end, x_s), stepped)
