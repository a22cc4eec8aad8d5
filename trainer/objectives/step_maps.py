"""Direct step maps: each of K DDIM steps has to arrive at the next state of a trajectory."""

from itertools import pairwise

import torch
from torch import Tensor

from models.prediction import Prediction
from models.sampler import DenoiserLike, window_edges
from models.windows import sample_window
from trainer.objectives.base import Loss, Objective
from trainer.objectives.matching import Matching, check_solvable_at_noise
from trainer.objectives.parts.distances import Distance
from trainer.objectives.teachers import FrozenTeacher, ddim_between
from trainer.step_random import StepRandom, draw_stratified


class StepMaps(Objective):
    """Maps f_k: x_k -> x_{k+1}, the student's DDIM steps between times 1 = t_0 > ... > t_K = 0.

    The step arrives at x_{k+1} exactly if x_hat and eps_hat are the ends of the line through x_k
    and x_{k+1}; the student matches them at t_k. With a teacher, both states lie on its
    trajectory from the noise eps, which is computed in training, and the data are not used.
    Without one, they are mix(x, eps, t_k) and mix(x, eps, t_{k+1}), which is exact on pairs.

    On independent x and eps the best map is one Euler step, and K of them collapse: on Linear,
    N(0, 1) is left with a standard deviation of 0, .5, .72, .85 for K = 1, 2, 4, 8. Sample with
    DDIM(K), or on the given times.

    Args:
        maps: their number K, with equal steps of time, or the times t_0 to t_K, falling from 1
            to 0.
        teacher: the frozen teacher; none for pairs.
        steps: the teacher's DDIM steps in each map.
        measure: prediction in which the error is measured; by default what the network predicts
            (Velocity for an analytic denoiser).
        distance: of the errors; squared by default.
    """

    def __init__(
        self,
        maps: int | list[float] = 4,
        teacher: FrozenTeacher | None = None,
        steps: int = 8,
        measure: Prediction | None = None,
        distance: Distance | None = None,
    ):
        if steps < 1:
            raise ValueError(f"StepMaps: steps is {steps}; it must be at least 1")
        self.times = window_edges(maps, "StepMaps: maps")
        self.teacher = teacher
        self.steps = steps
        self.matching = Matching(measure=measure, distance=distance)

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        check_solvable_at_noise(denoiser, self.matching.measure)

        # 1. A map for each sample, from t = t_k to s = t_{k+1}.
        k, t, s, _ = sample_window(draw_stratified(random, "time", x), self.times)

        # 2. With a teacher, the ends of the line through its states at both times.
        if self.teacher:
            teacher = self.teacher.for_student(denoiser, x)
            x_t, x_s = self._teacher_states(teacher, eps, k, cond)
            x, eps = denoiser.interpolant.solve_pair(x_t, t, x_s, s)

        # 3. Matching at t.
        return self.matching.loss_at(denoiser, x, eps, t, cond, s)

    def _teacher_states(
        self, teacher: DenoiserLike, eps: Tensor, k: Tensor, cond: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the teacher's states at t_k and t_{k+1}, from the state where samplers start."""
        start = teacher.interpolant.mix(torch.zeros_like(eps), eps, eps.new_ones(()))
        before = start
        after = start
        for number, (t, s) in enumerate(pairwise(self.times)):
            # Only samples that have not arrived go on. Selecting them makes the host wait, which
            # costs less than evaluating the teacher for all.
            going_on = (k >= number).nonzero().flatten()
            count = len(going_on)
            if not count:
                break
            x_t = after[going_on]
            part_cond = None if cond is None else cond[going_on]
            t_all = k.new_full((count,), t)
            s_all = k.new_full((count,), s)
            x_s = ddim_between(teacher, x_t, t_all, s_all, part_cond, self.steps)
            before = before.index_copy(0, going_on, x_t)
            after = after.index_copy(0, going_on, x_s)
        return before, after
