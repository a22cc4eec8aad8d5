"""Online pairs: drawn from the teacher during training, and never stored."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data.noise import noises
from models.condition import ClassLabel, Unconditional
from models.sampler import DDIM, DenoiserLike
from trainer.conditions import requested_conditions
from trainer.objectives.base import Loss, Objective
from trainer.objectives.teachers import EMATeacher, FrozenTeacher
from trainer.step_random import StepRandom


class OnlinePairs(NamedTuple):
    """A batch of pairs."""

    x: Tensor  # the teacher's samples, (B, C, H, W)
    eps: Tensor  # the noise that they were drawn from, (B, C, H, W)
    cond: Tensor | None  # the student's condition


class Online(Objective):
    """Another objective, with pairs that the teacher draws in a share of the training steps.

    Liu et al. 2022 (arXiv 2209.03003).

    Pair i of the run is pair i of the set that `rectify collect` makes with the same teacher,
    guidance, DDIM steps and seed: the same noise and class, and the same sample in float16 (up
    to rounding, where the network's batches differ in size). No two steps share a pair. The
    other steps, and held-out batches, use the batch itself.

    Args:
        teacher: draws the pairs with its guidance. A pair costs `steps` evaluations of it. With
            EMATeacher it is the student's average.
        inner: the loss, of the pairs and of the batch itself.
        share: share of the steps that draw pairs, in (0, 1], spread evenly.
        steps: DDIM steps.
        seed: of the noise; use another one than in evaluation.
    """

    def __init__(
        self,
        teacher: FrozenTeacher | EMATeacher,
        inner: Objective,
        share: float = 1.0,
        steps: int = 32,
        seed: int = 1,
    ):
        if not 0 < share <= 1:
            raise ValueError(
                f"Online: share is {share}; it must lie in (0, 1]; without pairs, use the inner "
                "objective alone"
            )
        if not isinstance(teacher.condition, ClassLabel | Unconditional):
            raise ValueError(
                f"Online: {teacher.run} is conditioned on texts, which it cannot draw pairs for; "
                "collect its pairs with `rectify collect`"
            )
        self.teacher = teacher
        self.inner = inner
        self.share = share
        self.sampler = DDIM(steps)
        self.seed = seed
        self.uses_jvp = inner.uses_jvp
        self.teaches_jumps = inner.teaches_jumps
        self.learning_rate_ratio = inner.learning_rate_ratio

    @property
    def networks(self) -> dict[str, nn.Module]:
        return self.inner.networks

    def student_learns(self, step: int) -> bool:
        return self.inner.student_learns(step)

    def pair_steps_before(self, step: int) -> int:
        """Return how many training steps before this one draw pairs."""
        return math.ceil(step * self.share - 1e-9)

    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        # 1. A pair is identified by its position in the run.
        if random is None:
            raise ValueError(
                "Online: random is None; it must be a StepRandom, whose step and position in the "
                "global batch identify each pair"
            )
        batch = random.batch
        if batch.guidance is not None:
            raise ValueError(
                "Online: the data records guidance scales, but its pairs all have the guidance "
                f"{self.teacher.guidance:g}; use data without scales"
            )

        # 2. Pairs instead of the batch, in training and in the share of the steps that draw any.
        step_count = self.pair_steps_before(batch.step)
        draws_pairs = self.pair_steps_before(batch.step + 1) > step_count
        if draws_pairs and torch.is_grad_enabled():
            first = step_count * batch.size + batch.start
            x, eps, cond = self.draw_pairs(denoiser, range(first, first + len(x)), x, cond)

        # 3. The inner loss.
        return self.inner(denoiser, x, eps, cond, random)

    @torch.no_grad()
    def draw_pairs(
        self, student: DenoiserLike, indices: range, like: Tensor, cond: Tensor | None
    ) -> OnlinePairs:
        """Draw the pairs of global indices.

        Args:
            student: the denoiser that learns from them.
            indices: global indices of the pairs.
            like: a batch, (B, C, H, W), with the shape and device of the samples.
            cond: the batch's encoded labels: where one was dropped, that of the pair is, too.

        Raises:
            ValueError: the student has class labels, and the teacher has none.
        """
        # The teacher's samples, drawn and rounded as those that are stored.
        teacher = self.teacher.for_student(student, like)
        condition = self.teacher.condition
        labels = requested_conditions(condition, indices)
        if labels is not None:
            labels = labels.to(like.device)
        eps = noises(self.seed, indices, like.shape[1:]).to(like.device)
        with torch.autocast(like.device.type, enabled=False):
            x = self.sampler(teacher, eps, labels).half().float()

        # The student's labels: the teacher's, except where the batch's were dropped.
        if cond is None:
            return OnlinePairs(x, eps, None)
        if labels is None or not isinstance(condition, ClassLabel):
            raise ValueError(
                f"Online: {self.teacher.run} has no classes, but the student has; give both the "
                "same condition"
            )
        return OnlinePairs(x, eps, labels.where(cond < condition.classes, cond))
