"""How the shards of a stream are dealt out to the processes that read it, and how far each has come."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lanes:
    """The state of a stream that is read from front to back, shard by shard.

    The shards of all epochs are one endless row of tickets: ticket k is the (k mod n)-th shard of epoch k div n. Lanes (one for
    each reading process of each rank) deal them out in turns, in blocks, so that every shard is read once an epoch whatever the
    number of lanes; where there are more lanes than shards, some read the next epoch already.

    Args:
        rows: of each lane: blocks finished, samples gone through in the block after them, and for each of that block's shards
            how many of those were unreadable.
        low: all tickets below were finished when these lanes began.
        ahead: finished tickets above it, ascending.
    """

    rows: tuple[tuple[int, ...], ...]
    low: int = 0
    ahead: tuple[int, ...] = ()

    @property
    def block(self) -> int:
        """Tickets in one block."""
        return len(self.rows[0]) - 2

    def tickets(self, lane: int, number: int) -> list[int]:
        """Return the tickets of a lane's block."""
        first = (number * len(self.rows) + lane) * self.block
        return [self._unfinished(place) for place in range(first, first + self.block)]

    def _unfinished(self, place: int) -> int:
        """Return the place-th of the tickets that were not finished when these lanes began."""
        ticket = self.low + place
        for finished in self.ahead:
            if finished > ticket:
                break
            ticket += 1
        return ticket

    def dealt(self, lanes: int, block: int) -> "Lanes":
        """Return this state for a number of lanes and a size of blocks.

        The same numbers go on exactly. Others begin every unfinished shard anew, and no finished one.
        """
        if (lanes, block) == (len(self.rows), self.block):
            return self
        rounds = min(row[0] for row in self.rows)  # that every lane has finished
        begun = [(lane, number) for lane, row in enumerate(self.rows) for number in range(rounds, row[0])]
        low = self._unfinished(rounds * len(self.rows) * self.block)
        ahead = {ticket for ticket in self.ahead if ticket > low}
        ahead.update(ticket for lane, number in begun for ticket in self.tickets(lane, number))
        while low in ahead:
            ahead.remove(low)
            low += 1
        return Lanes(fresh(lanes, block), low, tuple(sorted(ahead)))


def fresh(lanes: int, block: int) -> tuple[tuple[int, ...], ...]:
    """Return the rows of lanes that have read nothing."""
    return ((0,) * (2 + block),) * lanes


def restored(state: dict[str, Sequence]) -> Lanes:
    """Return the lanes that `dataclasses.asdict` made plain values of."""
    return Lanes(tuple(tuple(row) for row in state["rows"]), int(state["low"]), tuple(state["ahead"]))  # type: ignore[call-overload]
