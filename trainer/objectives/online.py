"""Online: pairs that the training job draws from its teacher, none of which ever lies on a disk."""

import math

import torch
from torch import Tensor, nn

from data.noise import noises
from models.condition import ClassLabel, Unconditional
from models.sampler import DDIM, DenoiserLike
from trainer.collect import asked
from trainer.draws import Draws
from trainer.objectives.base import Objective
from trainer.objectives.frozen import Averaged, Frozen


class Online(Objective):
    """Another objective, on a share of the steps given pairs that the teacher draws then and there (2209.03003).

    Pair i of the run is pair i of the set that `rectify collect` makes with the same teacher, guidance, DDIM steps and seed:
    the same noise and class, and the same sample in float16 (to rounding, where the batches in which the network sees them
    differ in size). No two steps share a pair. The other steps, and held-out batches, take the batch as it comes.

    Args:
        teacher: draws the pairs, at its guidance; each costs `steps` of its evaluations. Averaged: the student's own average.
        inner: the loss of the pairs, and of the batch as it comes.
        share: of the steps that draw their own pairs, in (0, 1], spread evenly.
        steps: of DDIM.
        seed: of the noises; keep it apart from the seeds of evaluation.
    """

    def __init__(self, teacher: Frozen | Averaged, inner: Objective, share: float = 1.0, steps: int = 32, seed: int = 1):
        if not 0 < share <= 1:
            raise ValueError(f"Online: share is {share}, it must lie in (0, 1]; for none use the inner objective alone")
        if not isinstance(teacher.condition, ClassLabel | Unconditional):
            raise ValueError(f"Online: {teacher.run} is told texts, which no step asks; collect its pairs with `rectify collect`")
        self.teacher, self.inner, self.share, self.walk, self.seed = teacher, inner, share, DDIM(steps), seed
        self.derives, self.rate = inner.derives, inner.rate

    @property
    def networks(self) -> dict[str, nn.Module]:
        return self.inner.networks

    def before(self, step: int) -> int:
        """Return how many steps before this one drew their own pairs."""
        return math.ceil(step * self.share - 1e-9)

    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        if draws is None:
            raise ValueError("Online: draws is None; a pair's noise is that of its place in the run, which draws tell")
        if draws.batch.scale is not None:
            raise ValueError(
                f"Online: the data record scales of guidance, its pairs are all at {self.teacher.guidance:g}; give data without"
            )
        batch, done = draws.batch, self.before(draws.batch.step)
        if self.before(batch.step + 1) > done and torch.is_grad_enabled():
            first = done * batch.size + batch.start
            x, eps, cond = self.draw(denoiser, range(first, first + len(x)), x, cond)
        loss = self.inner(denoiser, x, eps, cond, draws)
        self.seen, self.rests = self.inner.seen, self.inner.rests
        return loss

    @torch.no_grad()
    def draw(
        self, student: DenoiserLike, indices: range, like: Tensor, cond: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (x, eps, cond) of the pairs of global indices, for a batch `like`, told only what `cond` tells.

        Raises:
            ValueError: the student is told classes that the teacher does not know.
        """
        condition, teacher = self.teacher.condition, self.teacher.on(student, like)
        raw = asked(condition, indices)
        told = None if raw is None else raw.to(like.device)
        eps = noises(self.seed, indices, like.shape[1:]).to(like.device)
        with torch.autocast(like.device.type, enabled=False):  # as the stored pairs are drawn
            x = self.walk(teacher, eps, told).half().float()
        if cond is None:
            return x, eps, None
        if told is None or not isinstance(condition, ClassLabel):
            raise ValueError(f"Online: {self.teacher.run} knows no classes, the student is told some; give both one condition")
        return x, eps, told.where(cond < condition.classes, cond)  # what was dropped from the batch is dropped here
