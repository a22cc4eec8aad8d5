"""Which reader reads which shards of tars that are read sequentially, and how far each one is."""

from collections.abc import Sequence
from dataclasses import dataclass

Progress = tuple[int, ...]
"""Of one reader: blocks finished, samples passed in the block after them, and for each shard of
that block how many of those samples were unreadable."""


@dataclass(frozen=True)
class ReaderAssignment:
    """The assignment of shards to readers, with the progress of every reader.

    There is one reader for each reading process of each rank. The shards of all epochs are numbered
    in one endless sequence of tickets: with n shards, ticket k is shard k mod n in the order of
    epoch k div n. Readers take the tickets in turns, a block at a time. So every shard is read once
    an epoch for any number of readers. If there are more readers than shards, some readers are
    already in the next epoch.

    Args:
        progress: of each reader.
        low: all tickets below were finished when this assignment began.
        ahead: finished tickets above `low`, ascending.
    """

    progress: tuple[Progress, ...]
    low: int = 0
    ahead: tuple[int, ...] = ()

    @property
    def block(self) -> int:
        """Tickets in one block."""
        return len(self.progress[0]) - 2

    def tickets(self, reader: int, number: int) -> list[int]:
        """Return the tickets of a reader's block with this number."""
        first = (number * len(self.progress) + reader) * self.block
        return [self._unfinished(position) for position in range(first, first + self.block)]

    def _unfinished(self, position: int) -> int:
        """Return the ticket at a position among those not finished when this assignment began."""
        ticket = self.low + position
        for finished in self.ahead:
            if finished > ticket:
                break
            ticket += 1
        return ticket

    def reassign(self, readers: int, block: int) -> "ReaderAssignment":
        """Return the assignment for a number of readers and a size of blocks.

        With the same two numbers every reader continues where it is. Otherwise every unfinished
        shard begins anew, and no finished shard is read again.
        """
        if readers == len(self.progress) and block == self.block:
            return self

        # The blocks that every reader has finished end at `low`.
        rounds = min(progress[0] for progress in self.progress)
        low = self._unfinished(rounds * len(self.progress) * self.block)

        # What some readers have finished beyond that is `ahead`.
        ahead = {ticket for ticket in self.ahead if ticket > low}
        for reader, progress in enumerate(self.progress):
            for number in range(rounds, progress[0]):
                ahead.update(self.tickets(reader, number))
        while low in ahead:
            ahead.remove(low)
            low += 1
        return ReaderAssignment(initial_progress(readers, block), low, tuple(sorted(ahead)))


def initial_progress(readers: int, block: int) -> tuple[Progress, ...]:
    """Return the progress of readers that have read nothing."""
    return ((0,) * (2 + block),) * readers


def restore_assignment(state: dict[str, Sequence]) -> ReaderAssignment:
    """Return the assignment that `dataclasses.asdict` turned into plain values."""
    progress = tuple(map(tuple, state["progress"]))
    low = int(state["low"])  # type: ignore[call-overload]
    return ReaderAssignment(progress, low, tuple(state["ahead"]))
