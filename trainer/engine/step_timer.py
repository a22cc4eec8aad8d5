"""How long training takes, and how long it waits for its next batch."""

import time

from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


class StepTimer:
    """Measures training since `restart`: the time, and the part of it that waits for batches.

    A validation takes no part in either: it lasts from `pause` until the next batch is fetched.

    Args:
        loop: the loop over batches, Lightning's or the fast one.
    """

    def __init__(self, loop: _TrainingEpochLoop):
        self.paused: float | None = None
        self.restart()
        begin = loop._on_before_fetch
        end = loop._on_after_fetch

        def begin_waiting() -> None:
            self.fetching = time.monotonic()
            if self.paused is not None:
                self.began += self.fetching - self.paused
                self.paused = None
            begin()

        def end_waiting() -> None:
            end()
            self.waited += time.monotonic() - self.fetching

        # The loop gives these to its data fetcher when it starts.
        loop._on_before_fetch = begin_waiting  # type: ignore[method-assign]
        loop._on_after_fetch = end_waiting  # type: ignore[method-assign]

    def restart(self) -> None:
        """Measure from now on."""
        self.began = time.monotonic()
        self.waited = 0.0

    def pause(self) -> None:
        """Leave out the time until the next batch is fetched."""
        self.paused = time.monotonic()

    def seconds(self) -> float:
        """Return the time of training since the last `restart`."""
        return max(time.monotonic() - self.began, 1e-9)
