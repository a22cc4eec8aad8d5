"""Objectives: the scalar loss for data x coupled with noise eps. One file each."""

from abc import ABC, abstractmethod

from torch import Tensor

from models.sampler import DenoiserLike
from trainer.draws import Draws


class Objective(ABC):
    """What a training step minimises."""

    seen: tuple[Tensor, Tensor] | None = None  # times and errors of the last batch's samples, (B,) each: for the watch

    @abstractmethod
    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        """Return the mean loss, a scalar, of x coupled with eps, both (B, C, H, W).

        Random numbers come from `draws`; without it, from torch's global generator.
        """


from trainer.objectives.matching import Matching  # noqa: E402  (it needs the base above)
from trainer.objectives.online import Online  # noqa: E402

__all__ = ["Matching", "Objective", "Online"]
