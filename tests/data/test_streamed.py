"""Tars read from front to back: dealt out, resumed, and as far as they are whole."""

import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from data.batch import Steps
from data.lanes import restored
from data.noise import permutation
from data.stream import Taken
from data.streamed import Streamed
from tests.data.remote import served, tars

COUNTS = [7, 5, 9, 8, 6, 7, 4]  # 46 samples
BATCH = 8


class Run:
    """Training that only reads: what all ranks saw, and the state that a checkpoint would keep."""

    def __init__(self, source, world=1, workers=0, parts=1, first=0, state=None):
        self.source, self.world, self.workers, self.parts, self.step = source, world, workers, parts, first
        self.seen = []
        if state:
            source.resume(state)
        rows = source.lanes(world * max(1, workers)).rows
        self.taken = [Taken(dict(list(enumerate(rows))[rank::world])) for rank in range(world)]
        steps = [Steps(source, BATCH, 5, first, rank, world, parts) for rank in range(world)]
        self.loaders = [iter(DataLoader(one, batch_size=None, num_workers=workers)) for one in steps]

    def go(self, steps, torn=0):
        """Take a number of steps, then `torn` batches of an unfinished one."""
        for _ in range(steps):
            for part in range(self.parts):
                for rank in range(self.world):
                    batch = self._next(rank)
                    assert (batch.seed, batch.step, batch.size) == (5, self.step, BATCH)
                    assert batch.start == (part * self.world + rank) * BATCH // self.world // self.parts
                    assert torch.equal(batch.condition, (batch.x[:, 0, 0, 0] % 100 % 3).long())
                    self.seen += batch.x[:, 0, 0, 0].int().tolist()
            self.step += 1
        for _ in range(torn):
            self._next(0)
        return self

    def _next(self, rank):
        batch = next(self.loaders[rank])
        self.taken[rank].note(batch)
        return batch

    def state(self):
        rows = [taken.rows(self.step) for taken in self.taken]
        dealt = tuple(rows[rank][worker] for worker in range(max(1, self.workers)) for rank in range(self.world))
        return self.source.state(replace(self.source.lanes(len(dealt)), rows=dealt))


@pytest.fixture
def urls(tmp_path):
    return tars(tmp_path / "tars", COUNTS)


def source(urls, **options):
    return Streamed(urls, classes=3, **options)


EVERY = sorted(number * 100 + i for number, count in enumerate(COUNTS) for i in range(count))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2), (3, 4)])
@pytest.mark.parametrize("block", [1, 2])
def test_every_shard_once_an_epoch(urls, world, workers, block):
    """Over all lanes; twelve of them are more than there are shards, and nobody waits for one."""
    epochs, lanes, tickets = Counter(), world * max(1, workers), 3 * len(COUNTS)
    one = source(urls, block=block)
    begin = one.lanes(lanes)
    for lane in range(lanes):
        for number in range(tickets):
            mine = [ticket for ticket in begin.tickets(lane, number) if ticket < tickets]
            for ticket, tar in zip(mine, one._open(5, mine)):
                epochs[ticket // len(COUNTS), tar.url] += 1
    assert epochs == {(epoch, url): 1 for epoch in range(3) for url in urls}


@pytest.mark.parametrize("block", [1, 3])
def test_one_lane_sees_every_sample_once_an_epoch_in_another_order(urls, block):
    seen = Run(source(urls, block=block)).go(12).seen
    assert sorted(seen[:46]) == EVERY or block == 3
    assert seen[:46] != EVERY and seen[46:92] != seen[:46]
    assert Run(source(urls, block=block)).go(12).seen == seen


@pytest.mark.parametrize(("world", "workers", "parts"), [(1, 0, 1), (2, 0, 1), (1, 2, 1), (1, 3, 2), (2, 2, 2)])
@pytest.mark.parametrize("steps", [1, 4, 11])
def test_resumed_on_as_many_lanes_goes_on_exactly(urls, world, workers, parts, steps):
    whole = Run(source(urls, block=2), world, workers, parts).go(steps + 6).seen
    torn = 1 if parts > 1 else 0  # stopped in the middle of a step, which is done again
    first = Run(source(urls, block=2), world, workers, parts).go(steps, torn)
    second = Run(source(urls, block=2), world, workers, parts, steps, first.state()).go(6)
    assert first.seen + second.seen == whole


def done(state):
    """Return the numbers of the shards of epoch 0 that a state counts as finished."""
    lanes = restored(state).dealt(99, 1)
    order = permutation(len(COUNTS), 5, 0, 0)
    return {int(order[ticket]) for ticket in range(len(COUNTS)) if ticket < lanes.low or ticket in lanes.ahead}


def test_resumed_on_another_number_of_lanes_begins_unfinished_shards_anew(urls):
    first = Run(source(urls), 2, 2).go(2)
    second = Run(source(urls), 1, 0, first=2, state=first.state()).go(1)
    third = Run(source(urls), 4, 1, first=3, state=second.state()).go(3)
    assert done(first.state()) < done(second.state()) < done(third.state())
    for earlier, later in ((first, second), (second, third)):
        finished, more = done(earlier.state()), later.seen[: 46 - sum(COUNTS[number] for number in done(earlier.state()))]
        assert finished.isdisjoint(value // 100 for value in more), "no finished shard is read again in its epoch"
    fourth = Run(source(urls), 2, 0, first=6, state=third.state())
    while len(done(fourth.state())) < len(COUNTS):
        fourth.go(1)
    assert set(first.seen + second.seen + third.seen + fourth.seen) == set(EVERY), "none is lost"


def test_a_state_of_other_shards_is_refused(urls):
    state = Run(source(urls)).go(2).state()
    source([url.replace("/tars/", "/elsewhere/") for url in urls]).resume(state)
    with pytest.raises(ValueError, match=r"data.source.urls: .*7 then, 6 now"):
        source(urls[:-1]).resume(state)
    with pytest.raises(ValueError, match="in another order"):
        source(urls[::-1]).resume(state)


def test_patterns_and_urls(tmp_path, urls):
    with served(tmp_path / "tars") as server:
        pattern = server.url + "/shard-{000..006}.tar"
        remote = Streamed(pattern, classes=3, cache=str(tmp_path / "cache"))
        assert Run(remote, 1, 2).go(8).seen == Run(source(urls), 1, 2).go(8).seen
        assert max(Counter(server.asked).values()) == 1 and len(remote.urls) == 7
        pickle.loads(pickle.dumps(remote)).sample()
        missing = Streamed(server.url + "/shard-{006..007}.tar", classes=3, cache=str(tmp_path / "cache"))
        with pytest.raises(OSError, match="shard-007.tar: no such file"):
            Run(missing).go(4)


def test_allowed_pipes_are_read(tmp_path, urls):
    pipes = [f"pipe:cat {url}" for url in urls]
    piped = source(pipes, allow_pipe=True, cache=str(tmp_path / "cache"))
    assert sorted(Run(piped).go(6).seen[:46]) == EVERY
