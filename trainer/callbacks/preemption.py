"""Preemption: after a signal all ranks save the same step, and the run can be resumed."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data.signals import STOPPED_EXIT_CODE, Stopped, note_signals, stop_requested
from trainer.callbacks.checkpoint import Checkpoints
from trainer.engine.trainer_parts import find_callback

PREEMPTED_EXIT_CODE = STOPPED_EXIT_CODE


class Preemption(Callback):
    """Stops the run, with a checkpoint, after a signal that any rank received.

    A signal is only noted (data/signals.py); ranks exchange what they noted every few steps, and
    all stop at the same step. Nothing is saved inside the handler, and a second signal changes
    nothing. A validation is broken off: its values are not logged.

    Args:
        every: optimizer steps, or batches of a validation, between exchanges; the time between a
            signal and the kill must be longer than these steps and a checkpoint take. A run of one
            process looks in every step.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise ValueError(f"Preemption: every is {every}; it must be at least 1")
        self.every = every
        self.stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a signal does not end the process at once."""
        note_signals()
        loop = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop all ranks if any received a signal; `Checkpoints`, the last callback, then saves."""
        if self._exchange(trainer, trainer.global_step):
            trainer.should_stop = True

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *_: Any,
    ) -> None:
        """Break the validation off if any rank received a signal."""
        self.stop_validation(trainer, batch_idx)

    def stop_validation(self, trainer: Trainer, number: int) -> None:
        """Break the validation off if any rank received a signal; all ranks call it alike.

        Args:
            trainer: the trainer.
            number: of the part of the validation that is done.

        Raises:
            Stopped: a rank received one.
        """
        if not trainer.sanity_checking and self._exchange(trainer, number):
            raise Stopped(f"validation of step {trainer.global_step}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the step whose validation was broken off."""
        checkpoints = find_callback(trainer, Checkpoints)
        if self.stopped and isinstance(exception, Stopped) and checkpoints:
            checkpoints.on_train_end(trainer, pl_module)

    def _exchange(self, trainer: Trainer, number: int) -> bool:
        """Return whether any rank received a signal, if an exchange is due."""
        if trainer.world_size == 1:
            self.stopped = stop_requested()
        elif number % self.every == 0:
            noted = stop_requested()
            self.stopped = trainer.strategy.reduce_boolean_decision(noted, all=False)
        return self.stopped
