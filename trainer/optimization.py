"""The optimizer and the learning-rate schedule, which the configuration chooses."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from data.batch import Batch
from trainer.step_outputs import StepOutputs


class ParameterGroup(NamedTuple):
    """Parameters that are optimized with the same learning rate."""

    parameters: list[nn.Parameter]
    learning_rate_ratio: float = 1.0  # to the optimizer's learning rate


class OptimizedModule(LightningModule, ABC):
    """A module whose optimizer and schedule are chosen by the configuration.

    `rectify fit` sets both from the keys `optimizer` and `lr_scheduler` before it trains.

    Attributes:
        make_optimizer: builds the optimizer over parameter groups.
        make_lr_scheduler: builds the schedule of an optimizer; None for a constant learning rate.
    """

    make_optimizer: OptimizerCallable
    make_lr_scheduler: LRSchedulerCallable | None = None

    @abstractmethod
    def training_step(self, batch: Batch, _: int) -> StepOutputs | Tensor:
        """Return the loss of a batch, alone or with what callbacks read."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the parameters to optimize: one group with all of them."""
        return [ParameterGroup(list(self.parameters()))]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and a schedule that is stepped after every optimizer step.

        Lightning's default is once per epoch, and the stream of batches has no epochs.
        """
        # 1. The optimizer.
        groups = self.parameter_groups()
        with key_named("optimizer"):
            optimizer = self.make_optimizer([{"params": group.parameters} for group in groups])
        for options, group in zip(optimizer.param_groups, groups, strict=True):
            if group.learning_rate_ratio != 1:
                options["lr"] = options["lr"] * group.learning_rate_ratio

        # 2. The schedule.
        if self.make_lr_scheduler is None:
            return optimizer
        with key_named("lr_scheduler"):
            scheduler = self.make_lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "lr_scheduler: ReduceLROnPlateau needs epochs, which a stream does not have; "
                "use a schedule over steps"
            )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


@contextmanager
def key_named(key: str) -> Iterator[None]:
    """Name a key of the configuration in an error about its value."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error
