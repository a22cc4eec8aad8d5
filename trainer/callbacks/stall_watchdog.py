"""Detects stalled training: names the rank that the others wait for, and ends the process."""

import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from data.attempts import exit_now
from models.denoiser import count_evaluations

STALLED_EXIT_CODE = 4
STOPPING_SECONDS = 10.0  # that the report under way may take at the end


class Phase(IntEnum):
    """What a rank is doing within an optimizer step."""

    READING = 0
    FORWARD = 1
    BACKWARD = 2
    UPDATE = 3


PHASE_NAMES = {
    Phase.READING: "reading data or validating",
    Phase.FORWARD: "forward",
    Phase.BACKWARD: "backward",
    Phase.UPDATE: "optimizer step and callbacks",
}


class RankProgress(NamedTuple):
    """How far a rank is: optimizer step, phase, and batches validated in that step.

    The network evaluations show that a rank works within a phase, e.g. on samples to be measured.
    """

    step: int = 0
    phase: int = Phase.READING
    validated: int = 0
    evaluated: int = 0


@dataclass
class RankState:
    """What this process knows about a rank.

    Attributes:
        changed: time of its last new report.
        report: the report; empty before the first.
        progress: its progress, according to the report.
        host: its host, according to the report.
    """

    changed: float
    report: str = ""
    progress: RankProgress = RankProgress()
    host: str = "an unknown host"

    def __str__(self) -> str:
        return f"{self.host} (step {self.progress.step}, {PHASE_NAMES[Phase(self.progress.phase)]})"


class StallWatchdog(Callback):
    """Ends the process with exit code 4 if no rank makes progress, and names the rank at fault.

    Every rank reports, through the process group's store, that it is alive and how far it is. When
    nobody has made progress for `timeout` seconds, the error names the ranks that have stopped
    reporting; if all report, it names those that are furthest behind. A collective would wait for
    them as long as its own timeout.

    Args:
        timeout: seconds without progress on any rank; longer than the slowest checkpoint or
            compilation. 0 turns the watchdog off.
    """

    def __init__(self, timeout: float = 900.0):
        if timeout < 0:
            raise ValueError(
                f"StallWatchdog: timeout is {timeout}; it must be positive, or 0 to turn it off"
            )
        self.timeout = timeout
        self.progress = RankProgress()
        self.idle = False  # with a single rank there is nothing to do in a step
        self.stopping = threading.Event()
        self.reporting: threading.Thread | None = None
        self.counting = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the threads that report and watch, if there is more than one rank."""
        self.stopping.clear()
        self.idle = not self.timeout or trainer.world_size == 1
        if self.idle:
            return
        # The clone is a separate connection to the store.
        default_store: Any = dist.distributed_c10d._get_default_store()
        store = dist.PrefixStore(f"rectify/watchdog/{trainer.global_step}", default_store.clone())
        self.counter = self.counting.enter_context(count_evaluations())
        self.reports = [""] * trainer.world_size
        self.reports_read = time.monotonic()
        work = partial(self._report, store, trainer.global_rank)
        self.reporting = threading.Thread(target=work, daemon=True)
        self.reporting.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Note that data were read."""
        self.progress = RankProgress(trainer.global_step, Phase.FORWARD)

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        """Note that the loss is computed."""
        self.progress = RankProgress(trainer.global_step, Phase.BACKWARD)

    def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
        """Note that gradients are computed."""
        self.progress = RankProgress(trainer.global_step, Phase.UPDATE)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note that the next batch is to be read."""
        self.progress = RankProgress(trainer.global_step, Phase.READING)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Note that a held-out batch is done."""
        validated = self.progress.validated + 1
        self.progress = RankProgress(trainer.global_step, Phase.READING, validated)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the threads."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop the threads; Lightning does not call `teardown` then."""
        self._stop()

    def _stop(self) -> None:
        self.stopping.set()
        self.counting.close()
        # A thread inside torch's store when the process ends would abort it (exit code 134).
        if self.reporting is not None:
            self.reporting.join(STOPPING_SECONDS)

    def _report(self, store: dist.Store, rank: int) -> None:
        """Write this rank's progress to the store on the first host; read that of all ranks."""
        beat = 0  # changes in every report: the rank is alive
        host = socket.gethostname()
        while not self.stopping.wait(self.timeout / 20):
            beat += 1
            try:
                progress = self.progress._replace(evaluated=self.counter.count)
                store.set(str(rank), " ".join(map(str, (beat, *progress, host))))
                self.reports = read_reports(store, len(self.reports))
            except (RuntimeError, dist.DistError):
                return  # `_watch` notices that reports are no longer read
            self.reports_read = time.monotonic()

    def _watch(self) -> None:
        """End the process when there was no progress for too long."""
        moved = time.monotonic()  # time of the last progress of any rank
        states = [RankState(changed=moved) for _ in self.reports]
        while not self.stopping.wait(self.timeout / 20):
            now = time.monotonic()

            # Compare all reports with the last ones.
            for state, report in zip(states, self.reports):
                if report != state.report and update_state(state, report, now):
                    moved = now

            # The first host, which holds the store.
            if now - self.reports_read > self.timeout:
                self._end(f"the first host has not been reachable for {self.timeout:g} s")

            # The ranks.
            if now - moved > self.timeout:
                silent_since = now - self.timeout / 2
                self._end(f"no progress for {self.timeout:g} s; {find_fault(states, silent_since)}")

    def _end(self, reason: str) -> None:
        if self.stopping.is_set():
            return
        # Not `sys.exit`: the main thread may wait in a collective.
        exit_now(STALLED_EXIT_CODE, f"{reason}; run the same command again")


def read_reports(store: dist.Store, ranks: int) -> list[str]:
    """Return the reports of all ranks; that of a rank without one is empty."""
    reports = []
    for rank in range(ranks):
        exists = store.check([str(rank)])
        reports.append(store.get(str(rank)).decode() if exists else "")
    return reports


def update_state(state: RankState, report: str, now: float) -> bool:
    """Store a rank's new report, and return whether the rank has made progress."""
    _, *numbers, host = report.split(" ", 5)
    progress = RankProgress(*map(int, numbers))
    has_moved = (progress, host) != (state.progress, state.host)
    state.report = report
    state.changed = now
    state.progress = progress
    state.host = host
    return has_moved


def find_fault(states: Sequence[RankState], silent_since: float) -> str:
    """Return which ranks the others wait for.

    Args:
        states: of all ranks.
        silent_since: ranks whose last report is older have stopped reporting.
    """
    slowest = min(state.progress[:3] for state in states)
    silent = []
    behind = []
    for rank, state in enumerate(states):
        name = f"rank {rank} on {state}"
        if state.changed < silent_since:
            silent.append(name)
        if state.progress[:3] == slowest:
            behind.append(name)
    if silent:
        return f"no sign of life from {', '.join(silent)}"
    return f"the others wait for {', '.join(behind)}"
