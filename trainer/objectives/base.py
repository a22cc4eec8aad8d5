"""What every objective is."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.sampler import DenoiserLike
from trainer.draws import Draws


class Objective(ABC):
    """What a training step minimises."""

    derives = False  # whether it differentiates the network forward, which cannot be computed again for the backward pass
    rests = False  # whether the last batch was not for the denoiser, which then stays as it is in this step
    rate = 1.0  # learning rate of its own networks over that of the denoiser
    seen: tuple[Tensor, Tensor] | None = None  # times and errors of the last batch's samples, (B,) each: for the watch

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
