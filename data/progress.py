"""Progress of long work: amount done, rate and time left. A bar on a terminal, lines in a log."""

import sys
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_INTERVAL = 10.0  # seconds between lines in a log


class Meter:
    """Counts finished work: `with Meter("collect", 10_000, "pairs") as meter: meter.add(256)`.

    Args:
        name: what is being done.
        total: amount of work.
        unit: what is counted.
        done: amount of work that was finished before.
        shown: whether to print anything; True on one rank only.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0, shown: bool = True):
        self.name = name
        self.total = total
        self.unit = unit
        self.done = done
        self.shown = shown
        self.first = done
        self.note = ""
        self.bar: Progress | None = None

    def __enter__(self) -> "Meter":
        self.began = time.monotonic()
        self.last_line = self.began
        if self.shown and sys.stderr.isatty():
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} {task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self.bar.start()
            self.task = self.bar.add_task(
                self.name, total=self.total, completed=self.done, rate="", note=""
            )
        return self

    def add(self, count: int, note: str = "") -> None:
        """Count more finished work, with a short note (such as the loss)."""
        self.done += count
        self.note = note
        now = time.monotonic()
        if self.bar:
            rate = f"{self.rate():.1f} {self.unit}/s"
            self.bar.update(self.task, completed=self.done, rate=rate, note=note)
        elif self.shown and now - self.last_line >= LOG_INTERVAL:
            self.last_line = now
            self._print_line()

    def rate(self) -> float:
        """Return the work done per second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def _print_line(self) -> None:
        left = 0
        if self.done > self.first:
            left = int((self.total - self.done) / max(self.rate(), 1e-9))
        duration = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        text = (
            f"{self.name}: {self.done}/{self.total} {self.unit}, "
            f"{self.rate():.1f} {self.unit}/s, {duration} left"
        )
        print(f"{text} {self.note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
        elif self.shown:
            self._print_line()
