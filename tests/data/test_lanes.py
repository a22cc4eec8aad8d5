"""Shards are dealt out so that each is read once an epoch, whatever the number of lanes and restarts."""

import random
from dataclasses import replace

import pytest

from data.lanes import Lanes, fresh


@pytest.mark.parametrize(("lanes", "block"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_lanes_share_out_every_ticket_once(lanes, block):
    state = Lanes(fresh(lanes, block))
    dealt = [ticket for lane in range(lanes) for number in range(5) for ticket in state.tickets(lane, number)]
    assert sorted(dealt) == list(range(5 * lanes * block))


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_restarts_loses_and_repeats_nothing(seed):
    chance, finished, state = random.Random(seed), [], Lanes(fresh(2, 1))
    for _ in range(8):
        rows = []
        for lane, (number, *rest) in enumerate(state.rows):
            more = chance.randint(0, 5)
            finished += [ticket for n in range(number, number + more) for ticket in state.tickets(lane, n)]
            rows.append((number + more, *rest))
        state = replace(state, rows=tuple(rows))
        assert len(finished) == len(set(finished))
        state = state.dealt(chance.randint(1, 5), chance.randint(1, 3))
    state = state.dealt(1, 1) if len(state.rows) > 1 or state.block > 1 else state.dealt(2, 1)
    assert set(range(state.low)) | set(state.ahead) == set(finished), "low and ahead are what was finished, nothing else"
    assert not state.ahead or state.low < min(state.ahead)


def test_the_same_number_of_lanes_goes_on_within_a_shard():
    state = Lanes(((3, 17, 1), (2, 5, 0)), 4, (7, 9))  # lane 0 was dealt 4, 6, 10 and 12, lane 1 5, 8 and 11
    assert state.dealt(2, 1) is state
    other = state.dealt(3, 1)  # 11, which lane 1 has begun, and 12, which lane 0 has, are begun anew
    assert (other.rows, other.low, other.ahead) == (fresh(3, 1), 11, ())
    assert replace(state, rows=((4, 0, 0), (2, 5, 0))).dealt(3, 1).ahead == (12,)
