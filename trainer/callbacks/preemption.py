"""Preemption: on SIGTERM or SIGUSR1 all ranks save the same step, and the run can be resumed."""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: saved, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption(Callback):
    """Stops the run, with a checkpoint, after a signal that any rank received.

    The signal handler only sets a flag; ranks exchange their flags every few steps, and all stop
    at the same step. Nothing is saved inside the handler, and a second signal changes nothing.
    Lightning's handlers, which communicate inside the handler and in every step, are replaced.

    Args:
        every: optimizer steps between exchanges; the time between a signal and the kill must be
            longer than these steps and a checkpoint take.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise ValueError(f"Preemption: every is {every}; it must be at least 1")
        self.every = every
        self.signalled = False
        self.stopped = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signalled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers; Lightning restores the originals after the run."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        loop = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop all ranks if any received a signal; `Checkpoints`, the last callback, then saves."""
        if trainer.global_step % self.every != 0:
            return
        if trainer.strategy.reduce_boolean_decision(self.signalled, all=False):
            self.stopped = True
            trainer.should_stop = True
