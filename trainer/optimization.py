"""The optimizer and the learning-rate schedule, which the configuration chooses."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
)
from torch.optim.swa_utils import SWALR

from data.batch import Batch
from trainer.step_outputs import StepOutputs


class ParameterGroup(NamedTuple):
    """Parameters that are optimized with the same learning rate."""

    parameters: list[nn.Parameter]
    learning_rate_ratio: float = 1.0  # to the optimizer's learning rate


class Optimization(NamedTuple):
    """An optimizer and the schedule of its learning rate."""

    optimizer: Optimizer
    schedule: LRScheduler | None  # None for a constant learning rate


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

    def log_heldout_loss(self, loss: Tensor, batch: Batch) -> None:
        """Log the loss of a held-out batch, and that of its bucket, if it is from one.

        Buckets are weighted by their numbers of samples.
        """
        weight = batch.bucket_total or len(batch.x)
        # MetricsLog gives it to the loggers.
        self.log("heldout_loss", loss, sync_dist=True, batch_size=weight, logger=False)
        if batch.bucket:
            name = f"heldout_loss/{batch.bucket}"
            self.log(name, loss, sync_dist=True, batch_size=len(batch.x), logger=False)

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the parameters to optimize: one group with all of them."""
        return [ParameterGroup(list(self.parameters()))]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer, and a schedule that is stepped after every optimizer step.

        Lightning's default is once per epoch, and the stream of batches has no epochs.
        """
        built = self.build_optimization()
        if built.schedule is None:
            return built.optimizer
        return {
            "optimizer": built.optimizer,
            "lr_scheduler": {"scheduler": built.schedule, "interval": "step"},
        }

    def build_optimization(self) -> Optimization:
        """Build the configured optimizer and schedule."""
        # 1. The optimizer.
        groups = self.parameter_groups()
        with key_named("optimizer"):
            optimizer = self.make_optimizer([{"params": group.parameters} for group in groups])
        for options, group in zip(optimizer.param_groups, groups, strict=True):
            if group.learning_rate_ratio != 1:
                options["lr"] = options["lr"] * group.learning_rate_ratio

        # 2. The schedule.
        if self.make_lr_scheduler is None:
            return Optimization(optimizer, None)
        with key_named("lr_scheduler"):
            scheduler = self.make_lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError(
                "lr_scheduler: ReduceLROnPlateau needs epochs, which a stream does not have; "
                "use a schedule over steps"
            )
        ratios = [group.learning_rate_ratio for group in groups]
        check_keeps_ratios(scheduler, ratios)
        return Optimization(optimizer, scheduler)


def check_keeps_ratios(schedule: LRScheduler, ratios: list[float]) -> None:
    """Check that a schedule keeps the ratios between the learning rates of parameter groups.

    Args:
        schedule: the schedule.
        ratios: of the groups.

    Raises:
        ValueError: it gives all groups the same rates.
    """
    if all(ratio == ratios[0] for ratio in ratios):
        return
    has_one_rate = isinstance(schedule, OneCycleLR | CyclicLR | SWALR)
    if isinstance(schedule, CosineAnnealingLR | CosineAnnealingWarmRestarts):
        has_one_rate = schedule.eta_min != 0
    if has_one_rate:
        raise ValueError(
            f"lr_scheduler: {type(schedule).__name__} gives student and fake the same learning "
            f"rate, but fake_rate of the objective is {ratios[-1]:g}; use WarmUp, or set fake_rate "
            "to 1"
        )


def apply_configured_settings(trainer: Trainer) -> None:
    """Give optimizer and schedule of a resumed run the configured settings.

    The optimizer keeps its state. The learning rate is the one that the configured schedule has at
    this step, as if the run had begun with it.
    """
    module = trainer.lightning_module
    assert isinstance(module, OptimizedModule)
    configured = module.build_optimization()

    # The schedule at this step.
    if configured.schedule is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its optimizer makes no step
            for _ in range(trainer.global_step):
                configured.schedule.step()
        for entry in trainer.lr_scheduler_configs:
            entry.scheduler.load_state_dict(configured.schedule.state_dict())

    # The options of every group.
    (optimizer,) = trainer.optimizers
    for group, new in zip(optimizer.param_groups, configured.optimizer.param_groups, strict=True):
        for name, value in new.items():
            if name != "params":
                group[name] = value


@contextmanager
def key_named(key: str) -> Iterator[None]:
    """Name a key of the configuration in an error about its value."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key}: {error}") from error
