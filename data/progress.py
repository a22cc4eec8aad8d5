"""Progress of long work: done, rate and time left; a bar on a terminal, a line now and then in a log."""

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EVERY = 10.0  # seconds between lines in a log


class Meter:
    """Counts work done: `with Meter("collect", 10_000, "pairs") as meter: meter.add(256)`.

    Args:
        name: what is going on.
        total: how much work there is.
        unit: what is counted.
        done: how much was done before.
        shown: False on all ranks but one.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0, shown: bool = True):
        self.name, self.total, self.unit, self.done, self.shown = name, total, unit, done, shown
        self.first, self.note = done, ""
        self.bar: Progress | None = None

    def __enter__(self) -> "Meter":
        self.began = self.said = time.monotonic()
        if self.shown and sys.stderr.isatty():
            text = TextColumn("{task.fields[rate]} {task.fields[note]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
            self.bar = Progress(*columns)
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total, completed=self.done, rate="", note="")
        return self

    def add(self, count: int, note: str = "") -> None:
        """Count more work, with a short note (the loss, say)."""
        self.done, self.note, now = self.done + count, note, time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done, rate=f"{self.rate():.1f} {self.unit}/s", note=note)
        elif self.shown and now - self.said >= EVERY:
            self.said = now
            self._line()

    def rate(self) -> float:
        """Return the work done per second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def _line(self) -> None:
        left = int((self.total - self.done) / max(self.rate(), 1e-9)) if self.done > self.first else 0
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        text = f"{self.name}: {self.done}/{self.total} {self.unit}, {self.rate():.1f} {self.unit}/s, {clock} left"
        print(f"{text} {self.note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        elif self.shown:
            self._line()
