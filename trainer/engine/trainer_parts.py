"""What Lightning sets on a Trainer from outside: its callbacks, its data module, its profiler."""

from typing import Protocol, TypeVar, cast

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.profilers import Profiler

from data.datamodule import DataModule

AnyCallback = TypeVar("AnyCallback", bound=Callback)


class TrainerParts(Protocol):
    """The attributes of every Trainer that its class does not declare."""

    callbacks: list[Callback]
    datamodule: LightningDataModule | None
    profiler: Profiler


def parts_of(trainer: Trainer) -> TrainerParts:
    """Return a trainer, with the types of its undeclared attributes."""
    return cast(TrainerParts, trainer)


def find_callback(trainer: Trainer, kind: type[AnyCallback]) -> AnyCallback | None:
    """Return a trainer's first callback of a class, or None."""
    for callback in parts_of(trainer).callbacks:
        if isinstance(callback, kind):
            return callback
    return None


def find_datamodule(trainer: Trainer) -> DataModule | None:
    """Return a trainer's data module, or None if it has none of ours."""
    datamodule = parts_of(trainer).datamodule
    return datamodule if isinstance(datamodule, DataModule) else None
