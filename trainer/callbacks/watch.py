"""A watch on the loss and on memory: a run that went wrong stops, says where, and keeps its last good checkpoint."""

import sys
from math import isfinite
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from data.batch import Batch, Set


class Part(NamedTuple):
    """A micro-batch without its samples: where it stands, its loss, and (times, errors) of its samples."""

    step: int
    position: int  # of its first sample in the whole sequence
    seed: int
    loss: Tensor
    seen: tuple[Tensor, Tensor] | None


class Watch(Callback):
    """Stops a run whose loss is no longer finite, or exploded, or skips such batches. The host looks only now and then.

    Args:
        every: optimizer steps between looks of the host; checkpoints look too, so that a bad state is never saved.
        limit: the largest loss that is still taken for a loss.
        skip: how many steps with gradients that are not finite may be left out (each is told and counted); 0 stops at the
            first. More than 0 costs a look of the host in every step.
    """

    def __init__(self, every: int = 20, limit: float = 1e6, skip: int = 0):
        if every < 1 or limit <= 0 or skip < 0:
            raise ValueError(f"Watch: every ({every}) must be at least 1, limit ({limit}) positive, skip ({skip}) not negative")
        self.every, self.limit, self.skip, self.skipped = every, limit, skip, 0
        self.recent: list[Part] = []
        self.shape: tuple[int, ...] = ()

    def state_dict(self) -> dict[str, int]:
        """Return how many steps were left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting."""
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to count what a gradient scaler skips in its normal course."""
        if self.skip and trainer.precision == "16-mixed":
            raise ValueError("watch.skip: with trainer.precision 16-mixed the gradient scaler skips such steps itself")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remember how large the batch is, in case it does not fit."""
        self.shape = tuple(batch.x.shape)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Leave a step out: without gradients the optimizer does nothing."""
        if not self.skip:
            return
        gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in pl_module.parameters()]
        norms = torch._foreach_norm([g for g in gradients if g is not None])
        if trainer.strategy.reduce_boolean_decision(not bool(torch.stack(norms).isfinite().all()), all=False):
            optimizer.zero_grad(set_to_none=True)
            self.skipped += 1
            if self.skipped > self.skip:
                raise FloatingPointError(f"{trainer.default_root_dir}: {self.skipped} steps with gradients that are not finite")
            if trainer.is_global_zero:
                line = f"watch: left out step {trainer.global_step}, whose gradients are not finite ({self.skipped} so far)"
                print(line, file=sys.stderr, flush=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any) -> None:
        """Remember the losses of the last steps; now and then, look."""
        seen = getattr(getattr(pl_module, "objective", None), "seen", None)
        self.recent.append(Part(batch.step, batch.step * batch.size + batch.start, batch.seed, outputs["loss"].detach(), seen))
        if trainer.global_step % self.every == 0:
            self.look(trainer)

    def look(self, trainer: Trainer) -> None:
        """Raise, naming the step, its samples and their times, if there was a bad loss on any rank."""
        recent, self.recent = self.recent, []
        parts = trainer.accumulate_grad_batches  # by which Lightning has divided the losses
        losses = (torch.stack([part.loss for part in recent]) * parts).tolist() if recent else []
        bad = [part for part, loss in zip(recent, losses) if not abs(loss) <= self.limit and (isfinite(loss) or not self.skip)]
        if not trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        if not bad:
            raise FloatingPointError(f"{trainer.default_root_dir}: another rank's loss is not finite")
        raise FloatingPointError(
            f"{trainer.default_root_dir}: the loss of step {bad[0].step} is not finite or over {self.limit:g}"
            f"{self._samples(trainer, bad[0])}; the last good checkpoint is kept; lower optimizer.lr or set "
            "trainer.gradient_clip_val, and run again"
        )

    def _samples(self, trainer: Trainer, part: Part) -> str:
        """Return which samples of a batch are bad, and between which times they lie."""
        times, errors = part.seen or (torch.zeros(0), torch.full(self.shape[:1], torch.nan))
        places = (~(errors.abs() <= self.limit)).nonzero().flatten().tolist()
        said = f" ({len(places)} samples"
        source = trainer.datamodule.source  # type: ignore[attr-defined]
        if isinstance(source, Set) and places:
            order = source.order(part.seed)
            said += f", indices {[int(order.indices(part.position + place, 1)[0]) for place in places[:8]]}"
        if len(times) and places:
            said += f", times {times[places].min():.3f} to {times[places].max():.3f}"
        return said + ")"


def out_of_memory(error: Exception, trainer: Trainer) -> str | None:
    """Return what to change if an error means that memory ran out in training, else None."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    watch = next(callback for callback in trainer.callbacks if isinstance(callback, Watch))  # type: ignore[attr-defined]
    stream = trainer.datamodule  # type: ignore[attr-defined]
    return (
        f"{trainer.default_root_dir}: out of memory at step {trainer.global_step} with a batch of {watch.shape} in each process"
        f" (data.batch {stream.batch}, {trainer.world_size} processes, trainer.accumulate_grad_batches "
        f"{trainer.accumulate_grad_batches}): raise trainer.accumulate_grad_batches, set model.recompute, or lower data.batch"
    )
