"""Every shard is read once an epoch, for any number of readers and after any restarts."""

import random
from dataclasses import replace

import pytest

from data.reader_assignment import ReaderAssignment, initial_progress


@pytest.mark.parametrize(("readers", "block"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_readers_share_every_ticket_once(readers, block):
    state = ReaderAssignment(initial_progress(readers, block))
    tickets = []
    for reader in range(readers):
        for number in range(5):
            tickets += state.tickets(reader, number)
    assert sorted(tickets) == list(range(5 * readers * block))


@pytest.mark.parametrize("seed", range(20))
def test_restarts_lose_and_repeat_nothing(seed):
    chance = random.Random(seed)
    finished = []
    state = ReaderAssignment(initial_progress(2, 1))
    for _ in range(8):
        # Every reader finishes a few blocks.
        progress = []
        for reader, (number, *rest) in enumerate(state.progress):
            more = chance.randint(0, 5)
            for block in range(number, number + more):
                finished += state.tickets(reader, block)
            progress.append((number + more, *rest))
        state = replace(state, progress=tuple(progress))
        assert len(finished) == len(set(finished))

        # Restart with another number of readers and another size of blocks.
        state = state.reassign(chance.randint(1, 5), chance.randint(1, 3))

    # `low` and `ahead` hold the finished tickets and nothing else.
    readers = 2 if len(state.progress) == 1 and state.block == 1 else 1
    state = state.reassign(readers, 1)
    assert set(range(state.low)) | set(state.ahead) == set(finished)
    assert not state.ahead or state.low < min(state.ahead)


# Reader 0 was assigned tickets 4, 6, 10 and 12; reader 1 was assigned 5, 8 and 11.
INTERRUPTED = ReaderAssignment(((3, 17, 1), (2, 5, 0)), 4, (7, 9))


def test_the_same_number_of_readers_continues_within_a_shard():
    assert INTERRUPTED.reassign(2, 1) is INTERRUPTED


def test_another_number_of_readers_restarts_unfinished_shards():
    # Reader 1 is within ticket 11 and reader 0 within ticket 12: both are read again.
    state = INTERRUPTED.reassign(3, 1)
    assert state.progress == initial_progress(3, 1)
    assert state.low == 11
    assert state.ahead == ()


def test_another_number_of_readers_skips_finished_shards():
    # Reader 0 has finished ticket 12 and reader 1 is within ticket 11.
    state = replace(INTERRUPTED, progress=((4, 0, 0), (2, 5, 0)))
    assert state.reassign(3, 1).ahead == (12,)
