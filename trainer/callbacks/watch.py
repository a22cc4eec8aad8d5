"""A watch on the loss: a run that went wrong stops, says where, and keeps its last good checkpoint."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data.batch import Batch, Set


class Watch(Callback):
    """Stops a run whose loss is no longer finite, or exploded. The loss is looked at on the device, without waiting.

    Args:
        every: optimizer steps between looks of the host; checkpoints look too, so that a bad state is never saved.
        limit: the largest loss that is still taken for a loss.
    """

    def __init__(self, every: int = 20, limit: float = 1e6):
        if every < 1 or limit <= 0:
            raise ValueError(f"Watch: every ({every}) must be at least 1, and limit ({limit}) positive")
        self.every, self.limit = every, limit
        self.first: Tensor | None = None  # the first bad step, -1 while there is none

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any) -> None:
        """Remember the first bad step; now and then, look."""
        loss = outputs["loss"].detach()
        if self.first is None:
            self.first = torch.full_like(loss, -1, dtype=torch.long)
        bad = ~(loss.abs() <= self.limit)
        self.first = self.first.where((self.first >= 0) | ~bad, batch.step)
        if trainer.global_step % self.every == 0:
            self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        """Raise, naming the step and its samples, if there was a bad loss on any rank."""
        bad = -1 if self.first is None else int(self.first)
        if not trainer.strategy.reduce_boolean_decision(bad >= 0, all=False):
            return
        if bad < 0:
            raise FloatingPointError(f"{trainer.default_root_dir}: another rank's loss is not finite")
        stream, samples = trainer.datamodule, ""  # type: ignore[attr-defined]
        if isinstance(stream.source, Set):
            first = stream.source.order(stream.seed).indices(bad * stream.batch, min(stream.batch, 16)).tolist()
            samples = f" (its samples begin {first})"
        raise FloatingPointError(
            f"{trainer.default_root_dir}: the loss of step {bad} is not finite or over {self.limit:g}{samples}; the last good "
            "checkpoint is kept; lower optimizer.lr or set trainer.gradient_clip_val, and run again"
        )
