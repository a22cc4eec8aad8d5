"""The interface of all objectives, and the loss that they return."""

from abc import ABC, abstractmethod
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.sampler import DenoiserLike
from trainer.objectives.parts.distances import mean_per_sample
from trainer.step_outputs import PerSample
from trainer.step_random import StepRandom


class Loss(NamedTuple):
    """The loss of a batch, and what callbacks log of it.

    Attributes:
        total: what training minimises, a scalar.
        parts: the terms that add up to it, by name, scalars without gradient; none if there is
            only one. In a training step they are the same on all ranks.
        per_sample: of the batch's samples, if the loss is one of single samples.
    """

    total: Tensor
    parts: dict[str, Tensor]
    per_sample: PerSample | None


def mean_loss(errors: Tensor, t: Tensor) -> Loss:
    """Return the mean of errors (B, ...) at the times t, (B,)."""
    return Loss(errors.mean(), {}, PerSample(t, mean_per_sample(errors)))


def sum_loss(parts: dict[str, Tensor], per_sample: PerSample) -> Loss:
    """Return the sum of named parts, scalars, added in their order."""
    total = reduce(torch.add, parts.values())
    detached = {name: part.detach() for name, part in parts.items()}
    return Loss(total, detached, per_sample)


class Objective(ABC):
    """The loss that a training step minimises."""

    uses_jvp = False
    """Whether it differentiates the network in forward mode, which excludes recomputation."""

    teaches_jumps = True
    """Whether it teaches a two-time network to jump; if not, samplers give it one time."""

    learning_rate_ratio = 1.0
    """Learning rate of the objective's networks, relative to that of the denoiser."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The objective's networks, by name: trained with the denoiser and checkpointed."""
        return {}

    def student_learns(self, step: int) -> bool:
        """Return whether the denoiser learns in a training step, or only those networks."""
        return True

    @abstractmethod
    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Loss:
        """Return the loss of data x coupled with noise eps.

        Args:
            denoiser: the student, called as denoiser(x_t, t, cond).
            x: data, (B, C, H, W).
            eps: noise, (B, C, H, W).
            cond: encoded condition, if any.
            random: source of random numbers; torch's global generator by default.
        """
