"""Checkpoints at regular steps, before preemption and at the end of a run."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from data.files import (
    canonical,
    digest,
    files_by_step,
    remove,
    remove_leftovers,
    set_aside,
)
from data.progress import print_message
from models.checkpoint import CHECKPOINT_SUFFIX
from trainer.callbacks.early_end import record_end, remove_record, restart_limits
from trainer.callbacks.keep_config import KeepConfig
from trainer.callbacks.loss_guard import LossGuard
from trainer.engine.fsdp import FSDP2, to_local
from trainer.engine.trainer_parts import find_callback

NAME = "step={:09d}.ckpt"  # of a checkpoint
SNAPSHOTS = "ema"  # folder of the snapshots step=N.safetensors of averages in a run
SNAPSHOT_SUFFIX = ".safetensors"


def check_weights_finite(trainer: Trainer) -> None:
    """Raise on all ranks if a weight is not finite on any rank."""
    weights = [to_local(value.detach()) for value in trainer.lightning_module.parameters()]
    norms = torch.stack(torch._foreach_norm(weights))
    finite = bool(norms.isfinite().all())
    if trainer.strategy.reduce_boolean_decision(not finite, all=False):
        raise FloatingPointError(
            f"{trainer.default_root_dir}: the weights after step {trainer.global_step} are not "
            "finite, though its loss was; the last good checkpoint is kept; lower optimizer.lr or "
            "set trainer.gradient_clip_val, and run again"
        )


def is_followed_by_validation(trainer: Trainer) -> bool:
    """Return whether a validation follows the batch that has just been trained on.

    It is False where the interval is a time: checkpoints do not wait there.
    """
    interval = trainer.val_check_batch
    if not isinstance(interval, int):
        return False
    batches = trainer.fit_loop.total_batch_idx + 1
    return batches % interval == 0 and trainer.enable_validation and any(trainer.num_val_batches)


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step=N.ckpt` at regular steps and at the end, and keeps the newest few.

    Args:
        every: optimizer steps between checkpoints.
        keep: number of checkpoints to keep, at least 1.
    """

    def __init__(self, every: int = 500, keep: int = 2):
        if every < 1 or keep < 1:
            raise ValueError(
                f"Checkpoints: every is {every}, and keep is {keep}; both must be at least 1"
            )
        self.every = every
        self.keep = keep
        self.saved = -1  # the step of the last checkpoint; -1 before training starts
        self.run_id: str | None = None  # of the run that is resumed, see `find_run_id`

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that all ranks find the same newest checkpoint.

        Otherwise some would start from the beginning while others resume.
        """
        if trainer.world_size == 1:
            return
        folder = self._folder(trainer)
        names = [path.name for path in files_by_step(folder, CHECKPOINT_SUFFIX)]
        newest = names[-1] if names else "none"
        of_ranks = [""] * trainer.world_size
        dist.all_gather_object(of_ranks, newest)
        if any(name != of_ranks[0] for name in of_ranks):
            listing = "; ".join(f"rank {rank}: {name}" for rank, name in enumerate(of_ranks))
            raise ValueError(
                f"{folder}: ranks find different newest checkpoints ({listing}); "
                "put the run folder on a file system that all nodes share"
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the run's identity to the checkpoint."""
        checkpoint["run"] = find_run_id(trainer)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Resume at the start of an optimizer step, with the configured limits.

        A checkpoint may have been saved between two accumulated batches of a step, and the number
        of accumulated batches may have changed since.
        """
        self.run_id = checkpoint.get("run", "")
        restart_limits(trainer, checkpoint)
        batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            progress[part] |= {
                "ready": batches,
                "started": batches,
                "processed": batches,
                "completed": batches - 1,
            }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove incomplete files that a killed process left."""
        self.saved = trainer.global_step
        remove_record(trainer)
        if trainer.is_global_zero:
            remove_leftovers(self._folder(trainer), "step=*")
            set_newer_aside(Path(trainer.default_root_dir), trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save if a checkpoint is due or the run is about to stop.

        If a validation follows this step, `on_validation_end` saves instead.
        """
        is_due = trainer.global_step % self.every == 0
        if trainer.should_stop or (is_due and not is_followed_by_validation(trainer)):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if a checkpoint is due.

        The log then has the held-out loss of a checkpoint's step, whenever the run is killed.
        """
        if trainer.global_step % self.every == 0 and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, and wait until its checkpoint is complete."""
        self._save(trainer)
        if isinstance(trainer.strategy, FSDP2):
            trainer.strategy.wait_for_checkpoint()
            # No rank exits while others still exchange whether the checkpoint was written.
            trainer.strategy.barrier("checkpoints")
        self._prune(trainer)
        record_end(trainer)

    def _folder(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self.saved:
            return
        # Never save a bad state. The loss may be finite while its gradient is not.
        guard = find_callback(trainer, LossGuard)
        if guard:
            guard.check_losses(trainer)
        check_weights_finite(trainer)

        # Save, and delete older checkpoints.
        self.saved = trainer.global_step
        trainer.save_checkpoint(self._folder(trainer) / NAME.format(self.saved))
        self._prune(trainer)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            paths = []
            for path in files_by_step(self._folder(trainer), CHECKPOINT_SUFFIX):
                if len(path.name) >= len(NAME.format(0)):  # others are another callback's
                    paths.append(path)
            for path in paths[: -self.keep]:
                remove(path)


def set_newer_aside(run: Path, step: int) -> None:
    """Rename checkpoints after the step that a run goes on from, and their snapshots of averages.

    There are some only if the user chose an older checkpoint: the next command is to go on from the
    newest again.
    """
    newer = files_after(run / "checkpoints", CHECKPOINT_SUFFIX, step)
    if not newer:
        return
    newer += files_after(run / SNAPSHOTS, SNAPSHOT_SUFFIX, step)
    for path in newer:
        moved = set_aside(path)
        print_message(f"fit: {path}: is after step {step}, renamed to {moved.name}")


def files_after(folder: Path, suffix: str, step: int) -> list[Path]:
    """Return the files step=N<suffix> in a folder whose N is greater than a step."""
    paths = []
    for path in files_by_step(folder, suffix):
        if step_of(path) > step:
            paths.append(path)
    return paths


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint or a snapshot."""
    return int(path.name.removeprefix("step=").partition(".")[0])


def find_run_id(trainer: Trainer) -> str:
    """Return the identity of the run, which its checkpoints, snapshots and log contain.

    It is a checksum of the configuration that the run began with, without its folder and length: a
    command that was killed before its first checkpoint, and is run again, is the same run. It is ""
    in runs of older versions.
    """
    checkpoints = find_callback(trainer, Checkpoints)
    kept = find_callback(trainer, KeepConfig)
    if checkpoints is None or kept is None:
        return ""
    if checkpoints.run_id is None:
        config = yaml.safe_load(kept.origin["config"])
        config.pop("out", None)
        config.get("trainer", {}).pop("max_steps", None)
        checkpoints.run_id = digest(canonical(config))[:8]
    return checkpoints.run_id
