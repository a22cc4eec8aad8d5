"""A watchdog: when no rank gets on any more, the one that the others wait for is named, and the run ends."""

import os
import socket
import sys
import threading
import time
from functools import partial
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

EXIT = 4
PHASES = ("reading data or validating", "forward", "backward", "optimizer step and callbacks")


class Watchdog(Callback):
    """Every rank tells the others, through the process group's store, that it lives and how far it is.

    When nobody has got on for `timeout` seconds, the ranks that are silent, or else those that are furthest behind, are
    named, and the process ends with exit code 4: waiting for them in a collective would last as long as its own timeout.

    Args:
        timeout: seconds without progress on any rank; longer than the slowest checkpoint or compilation. 0 turns it off.
    """

    def __init__(self, timeout: float = 900.0):
        if timeout < 0:
            raise ValueError(f"Watchdog: timeout is {timeout}, it must be positive, or 0 for none")
        self.timeout, self.mark = timeout, (0, 0, 0)  # optimizer step, phase, batches validated in it
        self.idle = False  # nobody to wait for: its hooks need not be called
        self.ended = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch, where there is somebody to wait for."""
        self.ended.clear()
        self.idle = not self.timeout or trainer.world_size == 1
        if not self.idle:
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # a connection of its own
            store = dist.PrefixStore(f"rectify/watchdog/{trainer.global_step}", store)
            self.heard, self.talked = [""] * trainer.world_size, time.monotonic()
            for work in (partial(self._talk, store, trainer.global_rank), self._watch):
                threading.Thread(target=work, daemon=True).start()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Data were read."""
        self.mark = (trainer.global_step, 1, 0)

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        """The loss is known."""
        self.mark = (trainer.global_step, 2, 0)

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        """Gradients are there."""
        self.mark = (trainer.global_step, 3, 0)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """The next batch is to be read."""
        self.mark = (trainer.global_step, 0, 0)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """A held-out batch is done."""
        self.mark = (trainer.global_step, 0, self.mark[2] + 1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        self.ended.set()

    def _talk(self, store: dist.Store, rank: int) -> None:
        """Say how far this rank is, and hear it of the others; the store lives on the first host."""
        beat = 0
        while not self.ended.wait(self.timeout / 20):
            beat += 1
            try:
                store.set(str(rank), " ".join(map(str, (beat, *self.mark, socket.gethostname()))))
                names = map(str, range(len(self.heard)))
                self.heard = [store.get(name).decode() if store.check([name]) else "" for name in names]
            except (RuntimeError, dist.DistError):
                return  # `_watch` will notice the silence
            self.talked = time.monotonic()

    def _watch(self) -> None:
        """End the process when nobody has got on for too long."""
        ranks = range(len(self.heard))
        said, changed, marks = [""] * len(ranks), [time.monotonic()] * len(ranks), [(0, 0, 0, "an unknown host")] * len(ranks)
        moved = time.monotonic()
        while not self.ended.wait(self.timeout / 20):
            now, heard = time.monotonic(), self.heard
            for rank in ranks:
                if heard[rank] != said[rank]:
                    said[rank], changed[rank] = heard[rank], now
                    _, step, phase, batches, host = heard[rank].split(" ", 4)
                    mark = (int(step), int(phase), int(batches), host)
                    if mark != marks[rank]:
                        marks[rank], moved = mark, now
            if now - self.talked > self.timeout:
                self._end(f"the first host has not been reachable for {self.timeout:g} s")
            if now - moved > self.timeout:
                silent = [rank for rank in ranks if now - changed[rank] > self.timeout / 2]
                behind = silent or [rank for rank in ranks if marks[rank][:3] == min(mark[:3] for mark in marks)]
                names = [f"rank {r} on {marks[r][3]} (step {marks[r][0]}, {PHASES[marks[r][1]]})" for r in behind]
                what = "no sign of life from" if silent else "the others wait for"
                self._end(f"no progress for {self.timeout:g} s; {what} {', '.join(names)}")

    def _end(self, why: str) -> None:
        if not self.ended.is_set():
            print(f"rectify: error: {why}; run the same command again", file=sys.stderr, flush=True)
            os._exit(EXIT)  # the main thread may hang in a collective for ever
