"""Consistency: jumps to one end, from neighbouring states of one trajectory, are made to agree."""

import torch
from torch import Tensor

from models.interpolant import Interpolant, expand
from models.sampler import DenoiserLike, Walk
from trainer.draws import Draws, uniform
from trainer.errors import Error, PseudoHuber
from trainer.objectives.base import Objective
from trainer.objectives.frozen import Averaged, Frozen, carry
from trainer.times import Times, Uniform
from trainer.weights import Weight


class Consistency(Objective):
    """E w(t) d(f(x_t, t), f(x_s, s)), t and s = t - 1/N neighbours (2303.01469, algorithms 2 and 3).

    f is the student's jump to an end e, `mix(x_hat, eps_hat, e)`: a taught one, or a DDIM step of a network that reads one time.
    f(x_e, e) = x_e whatever the network says, because the solve keeps x_t = mix(x_hat, eps_hat, t). This does what c_skip and
    c_out are for, on every interpolant and row; with the row Karras they are it (2303.01469, appendix C). The target f(x_s, s)
    is the student's own, without gradient (2310.14189, section 3.2), or its average's (2303.01469).

    A teacher carries x_t to x_s: consistency distillation. Without one, x_s is made of the same data and noise: consistency
    training; on pairs both states lie on the pair's chord. Errors count as 1 / (t - s), which is 1 until N doubles (2310.14189,
    section 3.1, with t for sigma).

    Args:
        teacher: carries states by DDIM; none for consistency training.
        steps: N, of equal length in t, from 0 to 1.
        windows: M equal parts of [0, 1], a divisor of N; e is the lower edge of t's own (PCM, 2405.18407, section 3.1). 1: e = 0.
        drawn: draw e among all the grid's times from that edge to s (CTM, 2310.02279), for networks with `jumps`.
        times: law of t, each rounded up to the grid's next.
        weight: of each noise level, as of an error of data; by default all alike.
        error: of the jumps; by default pseudo-Huber with c = .00054 sqrt(d) (2310.14189, section 3.3).
        solves: the teacher's steps from t to s.
        doublings: how often N doubles in training (2310.14189, section 3.4).
        every: training steps before N doubles.
        target: whose jump from x_s is the target: the student's average; none for the student itself.
    """

    def __init__(
        self,
        teacher: Frozen | None = None,
        steps: int = 32,
        windows: int = 1,
        drawn: bool = False,
        times: Times | None = None,
        weight: Weight | None = None,
        error: Error | None = None,
        solves: int = 1,
        doublings: int = 0,
        every: int = 1000,
        target: Averaged | None = None,
    ):
        if min(steps, windows, solves, every) < 1 or doublings < 0:
            raise ValueError(
                f"Consistency: steps {steps}, windows {windows}, solves {solves} and every {every} must be at least 1, "
                f"doublings {doublings} at least 0"
            )
        if steps % windows:
            raise ValueError(
                f"Consistency: steps is {steps}, no multiple of windows, {windows}; make every edge a time of the grid"
            )
        self.teacher, self.steps, self.windows, self.drawn = teacher, steps, windows, drawn
        self.times, self.weight, self.error = times or Uniform(), weight, error or PseudoHuber(power=0.5)
        self.solves, self.doublings, self.every, self.target = solves, doublings, every, target

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        if self.drawn and not getattr(denoiser, "jumps", False):
            raise ValueError(
                "Consistency: drawn is true, but the network reads one time; build it with jumps, or set drawn to false"
            )
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        t, s, e = self._times(interpolant, x, draws)
        x_t, walk = interpolant.mix(x, eps, t), Walk(denoiser, cond)
        jump = walk.ddim(x_t, t, e)
        with torch.no_grad():
            x_s = interpolant.mix(x, eps, s)
            if self.teacher:
                x_s = carry(self.teacher.on(denoiser, x), x_t, t, s, cond, self.solves)
            own = Walk(self.target.on(denoiser, x), cond) if self.target else walk
            arrived = s == e  # f(x_e, e) = x_e needs no network, whose row may be singular there: t stands in
            target = x_s.where(expand(arrived, x), own.ddim(x_s, t.where(arrived, s), e))
        errors = self.error(jump - target)
        errors = errors / expand(self.steps * (t - s), errors)
        if self.weight:
            errors = expand(self.weight.of_data(interpolant, t), errors) * errors
        self.seen = t, errors.detach().flatten(1).mean(1)
        return errors.mean()

    def _times(self, interpolant: Interpolant, x: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return (t, s, e), e <= s < t, (B,) each: whole numbers of 1/N."""
        n = self.steps * 2 ** min(self.doublings, (draws.batch.step if draws else 0) // self.every)
        i, width = (self.times.on(interpolant)(uniform(draws, "time", x)) * n).ceil().clamp(max=n), n // self.windows
        edge = ((i - 1) / width).floor() * width
        if self.drawn:  # not stratified: e would be a function of t
            u = draws.uniform("until") if draws else torch.rand_like(i)
            edge = torch.minimum(edge + (u * (i - edge)).floor(), i - 1)
        return i / n, (i - 1) / n, edge / n
