"""The interface of all objectives, and what they read of a denoiser."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.prediction import Prediction, Velocity
from models.sampler import DenoiserLike
from trainer.step_random import StepRandom


class Objective(ABC):
    """The loss that a training step minimises."""

    uses_jvp = False
    """Whether it differentiates the network in forward mode, which excludes recomputation."""

    learning_rate_ratio = 1.0
    """Learning rate of the objective's networks, relative to that of the denoiser."""

    student_frozen = False
    """Whether the last loss was for the objective's networks alone, not for the denoiser."""

    per_sample: tuple[Tensor, Tensor] | None = None
    """(times, distances) of the samples of the last batch, (B,) each, for logging."""

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The objective's networks, by name: trained with the denoiser and checkpointed."""
        return {}

    @abstractmethod
    def __call__(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        eps: Tensor,
        cond: Tensor | None = None,
        random: StepRandom | None = None,
    ) -> Tensor:
        """Return the mean loss, a scalar, of data x coupled with noise eps.

        Args:
            denoiser: the student, called as denoiser(x_t, t, cond).
            x: data, (B, C, H, W).
            eps: noise, (B, C, H, W).
            cond: encoded condition, if any.
            random: source of random numbers; torch's global generator by default.
        """


def is_two_time(denoiser: DenoiserLike) -> bool:
    """Return whether the denoiser's network reads a second time, the end of a step."""
    return getattr(denoiser, "two_time", False)


def prediction_of(denoiser: DenoiserLike) -> Prediction:
    """Return what the denoiser's network predicts; Velocity for an analytic denoiser."""
    return getattr(denoiser, "prediction", None) or Velocity()
