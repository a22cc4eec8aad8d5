"""Checkpoints that are whole or not there."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from data.files import atomic, remove, sweep
from models import teacher
from models.tensors import save_nested
from trainer.callbacks.watch import Watch
from trainer.fsdp import FSDP2


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads them as `models.teacher.read` does: no code is run, a torn file is named."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint under a temporary name, and rename it."""
        with atomic(Path(path)) as file:
            save_nested(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the checkpoint, on the CPU."""
        return teacher.read(path)


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step=N.ckpt` every so often and at the end, keeping the newest few.

    Args:
        every: optimizer steps between checkpoints.
        keep: how many to keep, at least 1.
    """

    def __init__(self, every: int = 500, keep: int = 2):
        if every < 1 or keep < 1:
            raise ValueError(f"Checkpoints: every ({every}) and keep ({keep}) must be at least 1")
        self.every, self.keep, self.saved = every, keep, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a killed process left half-written."""
        self.saved = trainer.global_step
        if trainer.is_global_zero:
            sweep(self._folder(trainer), "step=*")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save when a checkpoint is due, or the run is to stop here."""
        if trainer.global_step % self.every == 0 or trainer.should_stop:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, and wait until it has its name."""
        self._save(trainer)
        if isinstance(trainer.strategy, FSDP2):
            trainer.strategy.finish()
        self._prune(trainer)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self.saved:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Watch):
                callback.look(trainer)  # a bad state is never saved
        self.saved = trainer.global_step
        path = self._folder(trainer) / f"step={self.saved:09d}.ckpt"
        trainer.save_checkpoint(path)
        self._prune(trainer)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for old in sorted(self._folder(trainer).glob("step=*.ckpt"))[: -self.keep]:
                remove(old)
