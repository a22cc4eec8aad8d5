"""Checkpoints that are whole or not there."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from data.files import atomic, remove, sweep
from models import teacher
from models.tensors import save_nested
from trainer.callbacks.watch import Watch
from trainer.fsdp import FSDP2, local


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints atomically, and reads them as `models.teacher.read` does: no code is run, a torn file is named."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint under a temporary name, and rename it."""
        with atomic(Path(path)) as file:
            save_nested(checkpoint, file)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Return the checkpoint, on the CPU."""
        return teacher.read(path)


def check(trainer: Trainer) -> None:
    """Raise on all ranks if a weight is no longer finite on any."""
    weights = [local(value.detach()) for value in trainer.lightning_module.parameters()]
    finite = bool(torch.stack(torch._foreach_norm(weights)).isfinite().all())
    if trainer.strategy.reduce_boolean_decision(not finite, all=False):
        raise FloatingPointError(
            f"{trainer.default_root_dir}: the weights after step {trainer.global_step} are not finite, though its loss was; the "
            "last good checkpoint is kept; lower optimizer.lr or set trainer.gradient_clip_val, and run again"
        )


def validated(trainer: Trainer) -> bool:
    """Tell whether this batch is one that held-out batches follow."""
    every, batches = trainer.val_check_batch, trainer.fit_loop.total_batch_idx + 1
    if trainer.check_val_every_n_epoch is not None or not isinstance(every, int):
        return False  # where Lightning counts otherwise than in batches of the whole run, a checkpoint does not wait
    return batches % every == 0 and trainer.enable_validation and any(trainer.num_val_batches)


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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse ranks that see different checkpoints: some would begin anew while others go on."""
        if trainer.world_size > 1:
            newest = [path.name for path in sorted(self._folder(trainer).glob("step=*.ckpt"))[-1:]]
            seen: list[list[str]] = [[]] * trainer.world_size
            dist.all_gather_object(seen, newest)
            if any(names != seen[0] for names in seen):
                told = "; ".join(f"rank {rank}: {(names or ['none'])[0]}" for rank, names in enumerate(seen))
                raise ValueError(f"{self._folder(trainer)}: ranks see different newest checkpoints ({told}); share the folder")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin with a whole step, whatever part of one was reached and however many parts it now has."""
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part] |= {"ready": batches, "started": batches, "processed": batches, "completed": batches - 1}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove what a killed process left half-written."""
        self.saved = trainer.global_step
        if trainer.is_global_zero:
            sweep(self._folder(trainer), "step=*")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save when a checkpoint is due, or the run is to stop here; if this step is validated first, after that."""
        if trainer.should_stop or (trainer.global_step % self.every == 0 and not validated(trainer)):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what is due: a checkpoint's log holds its step's held-out loss, wherever the run is killed."""
        if trainer.global_step % self.every == 0 and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, and wait until it has its name."""
        self._save(trainer)
        if isinstance(trainer.strategy, FSDP2):
            trainer.strategy.finish()
            trainer.strategy.barrier("checkpoints")  # no rank leaves while another still hears how its last one went
        self._prune(trainer)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self.saved:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Watch):
                callback.look(trainer)  # a bad state is never saved:
        check(trainer)  # a loss may be finite and its gradient not
        self.saved = trainer.global_step
        path = self._folder(trainer) / f"step={self.saved:09d}.ckpt"
        trainer.save_checkpoint(path)
        self._prune(trainer)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for old in sorted(self._folder(trainer).glob("step=*.ckpt"))[: -self.keep]:
                remove(old)
