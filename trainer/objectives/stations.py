"""Direct step maps: one DDIM step from each of K stations has to land on the next state of a trajectory."""

from itertools import pairwise

import torch
from torch import Tensor

from models.prediction import Prediction
from models.sampler import DenoiserLike, edges
from models.windows import drawn
from trainer.draws import Draws, uniform
from trainer.errors import Error
from trainer.objectives.base import Objective
from trainer.objectives.frozen import Frozen, carry
from trainer.objectives.matching import Matching, answering


class Stations(Objective):
    """f_k: x_k -> x_{k+1}, the student's DDIM step between neighbouring stations, which are the times t_0 = 1 > ... > t_K = 0.

    The step lands on x_{k+1} just where x_hat and eps_hat are the ends of the chord through x_k and x_{k+1}; those are matched
    at t_k. With a teacher both states are on its own trajectory from the noise, walked here; the data are not looked at.
    Without one they are mix(x, eps, t_k) and mix(x, eps, t_{k+1}) of what the batch couples: exact on pairs. On independent x
    and eps the best map is one Euler step, and K of them collapse: the standard deviation that is left of N(0, 1) is 0, .5,
    .72, .85 for K = 1, 2, 4, 8 on Linear. Draw with DDIM(K), or along the stated stations.

    Args:
        stations: K of them at equal steps of time, or their times, falling from 1 to 0, where the last step lands.
        teacher: the frozen teacher; none for pairs.
        steps: its DDIM steps from one station to the next.
        measure: row in which the error is measured; by default what the network predicts (Velocity for an analytic denoiser).
        error: squared, by default, or pseudo-Huber.
    """

    def __init__(
        self,
        stations: int | list[float] = 4,
        teacher: Frozen | None = None,
        steps: int = 8,
        measure: Prediction | None = None,
        error: Error | None = None,
    ):
        if steps < 1:
            raise ValueError(f"Stations: steps is {steps}, it must be at least 1")
        self.times, self.teacher, self.steps = edges(stations, "Stations: stations"), teacher, steps
        self.matching = Matching(measure=measure, error=error)

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        answering(denoiser, self.matching.measure)
        k, t, s, _ = drawn(uniform(draws, "time", x), self.times)
        if self.teacher:
            x_t, x_s = self._walked(self.teacher.on(denoiser, x), eps, k, cond)
            x, eps = denoiser.interpolant.unmix(x_t, t, x_s, s)  # type: ignore[attr-defined]
        loss = self.matching.at(denoiser, x, eps, t, cond, s)
        self.seen = self.matching.seen
        return loss

    def _walked(self, teacher: DenoiserLike, eps: Tensor, k: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the teacher's states at the k-th station and at the next, from where samplers start."""
        before = after = teacher.interpolant.mix(torch.zeros_like(eps), eps, eps.new_ones(()))  # type: ignore[attr-defined]
        for leg, (t, s) in enumerate(pairwise(self.times)):
            on = (k >= leg).nonzero().flatten()  # the host waits here; walking samples that have arrived would cost more
            if not len(on):
                break
            x_t, told = after[on], None if cond is None else cond[on]
            x_s = carry(teacher, x_t, k.new_full((len(on),), t), k.new_full((len(on),), s), told, self.steps)
            before, after = before.index_copy(0, on, x_t), after.index_copy(0, on, x_s)
        return before, after
