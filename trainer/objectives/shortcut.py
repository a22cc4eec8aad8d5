"""Shortcut models: one long jump is learnt from two short ones, the shortest from the data."""

import torch
from torch import Tensor

from models.interpolant import Interpolant
from models.prediction import Prediction, Velocity
from models.sampler import DenoiserLike
from trainer.draws import Draws, uniform
from trainer.errors import Error, Squared
from trainer.objectives.base import Objective
from trainer.times import EDGE, Times, Uniform


class Shortcut(Objective):
    """E |y_hat - y|^2 (2410.12557, eq. 5): y of the data at s = t, and of the chord that two jumps of half the length span.

    On Linear and Velocity that chord is s(x, t, 2d) = (s(x, t, d) + s(x', t - d, d)) / 2 (eq. 4). For a network that reads a
    second time (`jumps`), in every row and on every interpolant. Steps are 2^-k in t, and t one of their multiples, so that
    1, 2, 4, ... equal steps walk only by jumps that were learnt; the smallest step of all is flow matching's own (d = 0). The
    half jumps are the student's, with its weights as they are and no gradient (the paper takes averaged weights).

    Args:
        every: one sample in so many learns from two jumps, the others from the data (section 3.2: 4); at least 2.
        halvings: the smallest step is 2^-halvings (section 3.2: 7, 128 steps), at least 1.
        times: law of t of the others.
        measure: row in which the error is measured; by default what the network predicts (Velocity for an analytic denoiser).
        error: squared, by default, or pseudo-Huber.
    """

    def __init__(
        self,
        every: int = 4,
        halvings: int = 7,
        times: Times | None = None,
        measure: Prediction | None = None,
        error: Error | None = None,
    ):
        if every < 2:
            raise ValueError(f"Shortcut: every is {every}, it must be at least 2, so that there are samples that learn from data")
        if not 1 <= halvings <= 20:
            raise ValueError(f"Shortcut: halvings is {halvings}, it must lie in [1, 20]")
        self.every, self.halvings, self.times = every, halvings, times or Uniform()
        self.measure, self.error = measure, error or Squared()

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        if not getattr(denoiser, "jumps", False):
            raise ValueError("Shortcut: the network reads no second time; build it with model.denoiser.net.init_args.jumps true")
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        dtype = torch.promote_types(x.dtype, torch.float32)
        t = self.times.on(interpolant)(uniform(draws, "time", x)).to(dtype)
        size, place = ((draws.uniform(p) if draws else torch.rand_like(t)).to(dtype) for p in ("until", "again"))
        mine = slice(-(draws.batch.start if draws else 0) % self.every, None, self.every)  # by the place in the global batch
        t[mine], middle, until = self.grid(size[mine], place[mine])
        s, x_t = t.clone(), interpolant.mix(x, eps, t)
        s[mine] = until
        x, eps = x.to(dtype, copy=True), eps.to(dtype, copy=True)
        x[mine], eps[mine] = self.chord(denoiser, x_t[mine], t[mine], middle, until, None if cond is None else cond[mine])
        x_hat, eps_hat = denoiser(x_t, t, cond, s)
        y = self.measure or getattr(denoiser, "prediction", None) or Velocity()
        errors = self.error(y.target(interpolant, x_hat - x, eps_hat - eps, t))
        self.seen = t, errors.detach().flatten(1).mean(1)
        return errors.mean()

    def grid(self, size: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return t, the middle and the end of a step of 2^-k of uniform numbers: k of 0 to halvings - 1, t a multiple of it."""
        count = 2 ** (size * self.halvings).floor()  # of such steps
        index = (place * count).floor()
        return ((index + 1) / count).clamp(max=1 - EDGE), (index + 0.5) / count, index / count

    @torch.no_grad()
    def chord(
        self, denoiser: DenoiserLike, x_t: Tensor, t: Tensor, middle: Tensor, until: Tensor, cond: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the ends (x, eps) of the chord through x_t and where two jumps lead from it."""
        interpolant: Interpolant = denoiser.interpolant  # type: ignore[attr-defined]
        smallest, x_s = middle - until < 1.5 * 2**-self.halvings, x_t
        for here, there in ((t, middle), (middle, until)):
            x_s = interpolant.mix(*denoiser(x_s, here, cond, here.where(smallest, there)), there)
        return interpolant.unmix(x_t, t, x_s, until)
