"""Stops runs whose loss is not finite; explains errors about memory."""

from math import isfinite
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from data.batch import Batch, IndexedDataset, Request
from data.progress import print_message
from trainer.engine.fsdp import to_local
from trainer.engine.trainer_parts import find_callback, find_datamodule
from trainer.step_outputs import PerSample

MAX_INDICES = 8  # samples that an error lists


class MicroBatch(NamedTuple):
    """What is remembered of a micro-batch until its loss is checked.

    Attributes:
        step: optimizer step.
        start: position of its first sample in the global batch.
        size: samples in the global batch.
        seed: of the sequence.
        loss: its loss, as returned by the training step.
        per_sample: of its samples, if the loss is one of single samples.
    """

    step: int
    start: int
    size: int
    seed: int
    loss: Tensor
    per_sample: PerSample | None


class LossGuard(Callback):
    """Stops a run whose loss is not finite or too large, or skips steps with bad gradients.

    Losses are checked only every few steps, because reading them waits for the device.

    Args:
        every: optimizer steps between checks. Losses are also checked before every checkpoint, so
            that a bad state is never saved.
        limit: the largest loss that is accepted.
        skip: number of steps with gradients that are not finite that may be skipped; each is
            reported and counted. 0 stops at the first. More than 0 costs a device sync per step.
    """

    def __init__(self, every: int = 20, limit: float = 1e6, skip: int = 0):
        if every < 1 or limit <= 0 or skip < 0:
            raise ValueError(
                f"LossGuard: every is {every}, limit {limit} and skip {skip}; every must be at "
                "least 1, limit positive, and skip not negative"
            )
        self.every = every
        self.limit = limit
        self.skip = skip
        self.skipped = 0
        self.recent: list[MicroBatch] = []
        self.shape: tuple[int, ...] = ()

    def state_dict(self) -> dict[str, int]:
        """Return the number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Load the number of skipped steps."""
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is no gradient scaler: it skips steps regularly."""
        if self.skip and trainer.precision == "16-mixed":
            raise ValueError(
                f"loss_guard.skip is {self.skip}: with trainer.precision 16-mixed the gradient "
                "scaler itself skips steps whose gradients are not finite; set it to 0"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the shape of the batch, for the message about memory."""
        self.shape = tuple(batch.x.shape)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Remove gradients that are not finite: the optimizer then skips the step."""
        if not self.skip:
            return

        # Are all gradients finite, on all ranks?
        gradients = []
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                gradients.append(to_local(parameter.grad))
        norms = torch.stack(torch._foreach_norm(gradients))
        finite = bool(norms.isfinite().all())
        if not trainer.strategy.reduce_boolean_decision(not finite, all=False):
            return

        # Skip the step.
        optimizer.zero_grad(set_to_none=True)
        pl_module.zero_grad(set_to_none=True)  # weights of 16 bits have copies in the optimizer
        self.skipped += 1
        if self.skipped > self.skip:
            raise FloatingPointError(
                f"{trainer.default_root_dir}: {self.skipped} steps with gradients that are not "
                f"finite, loss_guard.skip is {self.skip}; the last good checkpoint is kept; "
                "lower optimizer.lr or set trainer.gradient_clip_val, and run again"
            )
        if trainer.is_global_zero:
            print_message(
                f"loss_guard: skipped step {trainer.global_step}, whose gradients are not finite "
                f"({self.skipped} so far)"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Remember the loss, and check the recent losses every few steps."""
        micro_batch = MicroBatch(
            step=batch.step,
            start=batch.start,
            size=batch.size,
            seed=batch.seed,
            loss=outputs["loss"].detach(),
            per_sample=outputs.get("per_sample"),
        )
        self.recent.append(micro_batch)
        if trainer.global_step % self.every == 0:
            self.check_losses(trainer)

    def check_losses(self, trainer: Trainer) -> None:
        """Raise if there was a bad loss on any rank since the last check.

        The error names the step, its samples and their times.
        """
        recent = self.recent
        self.recent = []

        # Find the bad losses. Lightning has divided each by the number of accumulated batches.
        bad = []
        if recent:
            losses = torch.stack([part.loss for part in recent]) * trainer.accumulate_grad_batches
            for part, loss in zip(recent, losses.tolist()):
                if self._is_bad(loss):
                    bad.append(part)

        # All ranks stop together.
        if not trainer.strategy.reduce_boolean_decision(bool(bad), all=False):
            return
        run = trainer.default_root_dir
        if not bad:
            raise FloatingPointError(f"{run}: another rank's loss is not finite")
        raise FloatingPointError(
            f"{run}: the loss of step {bad[0].step} is not finite or over {self.limit:g}"
            f"{self._describe_samples(trainer, bad[0])}; the last good checkpoint is kept; "
            "lower optimizer.lr or set trainer.gradient_clip_val, and run again"
        )

    def _is_bad(self, loss: float) -> bool:
        """Return whether a loss stops the run; if steps may be skipped, it need not be finite."""
        if self.skip and not isfinite(loss):
            return False
        return not abs(loss) <= self.limit

    def _describe_samples(self, trainer: Trainer, part: MicroBatch) -> str:
        """Return the number of bad samples of a batch, their indices and their range of times."""
        # Positions of the bad samples in the batch. All are bad if only the mean loss is known.
        times = torch.zeros(0)
        distances = torch.full(self.shape[:1], torch.nan)
        if part.per_sample is not None:
            times = part.per_sample.times
            distances = part.per_sample.distances
        is_bad = ~(distances.abs() <= self.limit)
        positions = is_bad.nonzero().flatten().tolist()

        # What is known about them.
        facts = [f"{len(positions)} samples"]
        datamodule = find_datamodule(trainer)
        if datamodule and isinstance(datamodule.source, IndexedDataset) and positions:
            indices = []
            for position in positions[:MAX_INDICES]:
                request = Request(part.step, part.start + position, 1, part.size)
                indices.append(int(datamodule.source.locate(part.seed, request).indices[0]))
            facts.append(f"indices {indices}")
        if len(times) and positions:
            found = times[positions]
            facts.append(f"times {found.min():.3f} to {found.max():.3f}")
        return f" ({', '.join(facts)})"


def out_of_memory(error: Exception, trainer: Trainer) -> str | None:
    """Return what to change if an error means that training ran out of memory, else None."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    guard = find_callback(trainer, LossGuard)
    datamodule = find_datamodule(trainer)
    assert guard is not None and datamodule is not None
    return (
        f"{trainer.default_root_dir}: out of memory at step {trainer.global_step} with a batch of "
        f"{guard.shape} on each process (data.batch {datamodule.batch}, {trainer.world_size} "
        "processes, "
        f"trainer.accumulate_grad_batches {trainer.accumulate_grad_batches}): "
        "raise trainer.accumulate_grad_batches, set model.recompute, or lower data.batch"
    )
