"""Preemption: on SIGTERM or SIGUSR1 all ranks save the same step together, and the process ends with a code of its own."""

import signal
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

EXIT = 75  # EX_TEMPFAIL of sysexits.h: saved in time, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption(Callback):
    """Notes a signal in its handler, agrees on it between ranks every few steps, and stops the run there.

    Nothing is saved inside a handler, and a second signal changes nothing. Lightning's own handlers, which broadcast from
    inside (and, every step, outside) a handler, are taken out.

    Args:
        every: optimizer steps between agreements; the grace period must be longer than that many steps and a checkpoint.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise ValueError(f"Preemption: every is {every}, it must be at least 1")
        self.every, self.noted, self.stopped = every, False, False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.noted = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives them back when the run ends."""
        for number in SIGNALS:
            signal.signal(number, self._note)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Agree whether any rank was signalled; if so, stop (Checkpoints, which comes last, then saves)."""
        if trainer.global_step % self.every == 0 and trainer.strategy.reduce_boolean_decision(self.noted, all=False):
            self.stopped = trainer.should_stop = True
