"""Objectives: the scalar loss for data x coupled with noise eps. One file each."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.sampler import DenoiserLike
from trainer.draws import Draws


class Objective(ABC):
    """What a training step minimises."""

    derives = False  # whether it differentiates the network forward, which cannot be computed again for the backward pass
    seen: tuple[Tensor, Tensor] | None = None  # times and errors of the last batch's samples, (B,) each: for the watch

    rests = False  # whether the last batch was not for the denoiser, which then stays as it is in this step
    rate = 1.0  # learning rate of its own networks over that of the denoiser

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks that it owns beside the denoiser, by name: trained with it and kept in checkpoints."""
        return {}

    @abstractmethod
    def __call__(
        self, denoiser: DenoiserLike, x: Tensor, eps: Tensor, cond: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        """Return the mean loss, a scalar, of x coupled with eps, both (B, C, H, W).

        Random numbers come from `draws`; without it, from torch's global generator.
        """


from trainer.objectives.distribution import DistributionMatching  # noqa: E402  (it needs the base above)
from trainer.objectives.matching import Matching  # noqa: E402
from trainer.objectives.meanflow import MeanFlow  # noqa: E402
from trainer.objectives.shortcut import Shortcut  # noqa: E402

__all__ = ["DistributionMatching", "Matching", "MeanFlow", "Objective", "Shortcut"]
