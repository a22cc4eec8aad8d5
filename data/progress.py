"""Progress of long work: amount done, rate and time left. A bar on a terminal, lines in a log."""

import os
import sys
import time

from tqdm import tqdm

from data.signals import raise_if_stopped

LOG_INTERVAL = 10.0  # seconds between lines in a log
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"


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
        self.values: dict[str, float] = {}  # for the heartbeat: loss, data_wait
        self.bar: tqdm | None = None
        self.is_open = False

    def __enter__(self) -> "Meter":
        self.began = time.monotonic()
        self.last_line = self.began
        global _latest
        self.outer = _latest
        _latest = self
        self.is_open = True
        if self.shown and _shows_bars():
            self.bar = tqdm(
                desc=self.name,
                total=self.total,
                initial=self.done,
                unit=f" {self.unit}",
                bar_format=BAR,
                dynamic_ncols=True,
                smoothing=0,  # the rate since the start, as in the lines
                miniters=1,  # by default, fast work makes it miss the first of the slow work
            )
        return self

    def add(self, count: int, note: str = "") -> None:
        """Count more finished work, with a short note (such as the loss); "" keeps the last one."""
        raise_if_stopped()
        self.done += count
        self.note = note or self.note
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)
            self.bar.update(count)
        elif self.shown and now - self.last_line >= LOG_INTERVAL:
            self.last_line = now
            self._print_line()

    def rate(self) -> float:
        """Return the units per second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def seconds_left(self) -> int | None:
        """Return the seconds that are left at this rate; None if nothing was done yet."""
        if self.done == self.first:
            return None
        return int((self.total - self.done) / max(self.rate(), 1e-9))

    def _print_line(self) -> None:
        duration = format_duration(self.seconds_left() or 0)
        text = (
            f"{self.name}: {self.done}/{self.total} {self.unit}, "
            f"{self.rate():.1f} {self.unit}/s, {duration} left"
        )
        print(f"{text} {self.note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        global _latest
        self.is_open = False
        if self.outer and self.outer.is_open:
            _latest = self.outer  # else this one stays, for the record of the end
        if self.bar is not None:
            self.bar.close()
        elif self.shown:
            self._print_line()


_latest: Meter | None = None


def current() -> Meter | None:
    """Return the meter of the work under way, or of the last; None if there was none."""
    return _latest


def format_duration(seconds: float) -> str:
    """Return a duration as H:MM:SS."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _shows_bars() -> bool:
    """Whether stderr is a terminal with a size; `ssh -tt` in a script makes one without."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0


def print_message(text: str) -> None:
    """Print a line to stderr, above the bar if there is one."""
    tqdm.write(text, file=sys.stderr)
