"""Tars that are read from front to back: assigned to readers, resumed, and read once an epoch."""

import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from data.batch import RankBatches
from data.datamodule import ReaderProgress
from data.noise import permutation
from data.reader_assignment import restore_assignment
from data.sequential import SequentialTars
from tests.data.remote import served, write_tars
from tests.helpers.refusals import refused

COUNTS = [7, 5, 9, 8, 6, 7, 4]  # 46 samples
BATCH = 8
EVERY_SAMPLE = sorted(number * 100 + i for number, count in enumerate(COUNTS) for i in range(count))


class ReadingRun:
    """A training run that only reads.

    Args:
        source: the tars.
        world: number of ranks.
        workers: reading processes of each rank.
        parts: accumulated batches of a step.
        first: the step to begin with.
        state: the source's state in the checkpoint that the run resumes from.

    Attributes:
        samples: numbers of the samples that all ranks have read.
    """

    def __init__(self, source, world=1, workers=0, parts=1, first=0, state=None):
        self.source = source
        self.world = world
        self.workers = workers
        self.parts = parts
        self.step = first
        self.samples = []
        if state:
            source.resume(state)
        progress = list(enumerate(source.assign_readers(world * max(1, workers)).progress))
        self.taken = [ReaderProgress(dict(progress[rank::world])) for rank in range(world)]
        self.loaders = []
        for rank in range(world):
            steps = RankBatches(source, BATCH, 5, first, rank, world, parts)
            self.loaders.append(iter(DataLoader(steps, batch_size=None, num_workers=workers)))

    def train(self, steps, torn=0):
        """Read a number of steps, then `torn` batches of a step that is not finished."""
        for _ in range(steps):
            for part in range(self.parts):
                for rank in range(self.world):
                    self._read(part, rank)
            self.step += 1
        for _ in range(torn):
            self._next_batch(0)
        return self

    def _read(self, part, rank):
        batch = self._next_batch(rank)
        numbers = batch.x[:, 0, 0, 0]
        assert (batch.seed, batch.step, batch.size) == (5, self.step, BATCH)
        assert batch.start == (part * self.world + rank) * BATCH // self.world // self.parts
        assert torch.equal(batch.condition, (numbers % 100 % 3).long())
        self.samples += numbers.int().tolist()

    def _next_batch(self, rank):
        batch = next(self.loaders[rank])
        self.taken[rank].record(batch)
        return batch

    def state(self):
        """Return the state of the source that a checkpoint would keep."""
        progress = [taken.after(self.step) for taken in self.taken]
        of_readers = []
        for worker in range(max(1, self.workers)):
            for rank in range(self.world):
                of_readers.append(progress[rank][worker])
        begin = self.source.assign_readers(len(of_readers))
        return self.source.state(replace(begin, progress=tuple(of_readers)))


@pytest.fixture
def urls(tmp_path):
    return write_tars(tmp_path / "tars", COUNTS)


def streamed(urls, **options):
    return SequentialTars(urls, classes=3, **options)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2), (3, 4)])
@pytest.mark.parametrize("block", [1, 2])
def test_every_epoch_reads_every_shard_once(urls, world, workers, block):
    """Also with twelve readers, which are more than there are shards; none waits for a shard."""
    readers = world * max(1, workers)
    tickets = 3 * len(COUNTS)
    source = streamed(urls, block=block)
    begin = source.assign_readers(readers)
    reads = Counter()
    for reader in range(readers):
        for number in range(tickets):
            block_tickets = [t for t in begin.tickets(reader, number) if t < tickets]
            tars = source._open_tars(5, block_tickets)
            for ticket, tar in zip(block_tickets, tars, strict=True):
                reads[ticket // len(COUNTS), tar.url] += 1
    assert reads == {(epoch, url): 1 for epoch in range(3) for url in urls}


def test_one_reader_reads_every_sample_once_an_epoch(urls):
    assert sorted(ReadingRun(streamed(urls)).train(12).samples[:46]) == EVERY_SAMPLE


@pytest.mark.parametrize("block", [1, 3])
def test_every_epoch_has_another_order_that_is_always_the_same(urls, block):
    samples = ReadingRun(streamed(urls, block=block)).train(12).samples
    assert samples[:46] != EVERY_SAMPLE
    assert samples[46:92] != samples[:46]
    assert ReadingRun(streamed(urls, block=block)).train(12).samples == samples


RUNS = [(1, 0, 1), (2, 0, 1), (1, 2, 1), (1, 3, 2), (2, 2, 2)]


@pytest.mark.parametrize(("world", "workers", "parts"), RUNS)
@pytest.mark.parametrize("steps", [1, 4, 11])
def test_a_run_resumed_with_the_same_readers_continues_exactly(urls, world, workers, parts, steps):
    whole = ReadingRun(streamed(urls, block=2), world, workers, parts).train(steps + 6)
    torn = 1 if parts > 1 else 0  # stopped in the middle of a step, which is repeated
    first = ReadingRun(streamed(urls, block=2), world, workers, parts).train(steps, torn)
    second = ReadingRun(streamed(urls, block=2), world, workers, parts, steps, first.state())
    second.train(6)
    assert first.samples + second.samples == whole.samples


def finished_shards(run):
    """Return the numbers of the shards that are finished in epoch 0, as the run's state has it."""
    state = restore_assignment(run.state()).reassign(99, 1)
    shards = permutation(len(COUNTS), 5, 0, 0)
    finished = set()
    for ticket in range(len(COUNTS)):
        if ticket < state.low or ticket in state.ahead:
            finished.add(int(shards[ticket]))
    return finished


def test_another_number_of_readers_restarts_only_unfinished_shards(urls):
    # Resume with other numbers of ranks and workers, three times.
    first = ReadingRun(streamed(urls), 2, 2).train(2)
    second = ReadingRun(streamed(urls), 1, 0, first=2, state=first.state()).train(1)
    third = ReadingRun(streamed(urls), 4, 1, first=3, state=second.state()).train(3)
    assert finished_shards(first) < finished_shards(second) < finished_shards(third)

    # No finished shard is read again in its epoch.
    for earlier, later in ((first, second), (second, third)):
        finished = finished_shards(earlier)
        left = 46 - sum(COUNTS[number] for number in finished)
        assert finished.isdisjoint(value // 100 for value in later.samples[:left])

    # No sample is lost.
    fourth = ReadingRun(streamed(urls), 2, 0, first=6, state=third.state())
    while len(finished_shards(fourth)) < len(COUNTS):
        fourth.train(1)
    samples = first.samples + second.samples + third.samples + fourth.samples
    assert set(samples) == set(EVERY_SAMPLE)


def test_a_state_fits_the_same_shards_in_another_folder(urls):
    state = ReadingRun(streamed(urls)).train(2).state()
    moved = [url.replace("/tars/", "/elsewhere/") for url in urls]
    streamed(moved).resume(state)


def test_a_state_of_more_shards_is_refused(urls):
    state = ReadingRun(streamed(urls)).train(2).state()
    with refused("data.source.urls", 7, 6, kind=ValueError):
        streamed(urls[:-1]).resume(state)


def test_a_state_of_shards_in_another_order_is_refused(urls):
    state = ReadingRun(streamed(urls)).train(2).state()
    with refused("data.source.urls", kind=ValueError):
        streamed(urls[::-1]).resume(state)


@pytest.fixture
def server(tmp_path, urls):
    with served(tmp_path / "tars") as running:
        yield running


def test_shards_of_a_pattern_are_downloaded_once_and_read_like_local_ones(tmp_path, urls, server):
    pattern = server.url + "/shard-{000..006}.tar"
    remote = streamed(pattern, cache=str(tmp_path / "cache"))
    assert len(remote.urls) == 7
    samples = ReadingRun(remote, 1, 2).train(8).samples
    assert samples == ReadingRun(streamed(urls), 1, 2).train(8).samples
    assert max(Counter(server.requests).values()) == 1


def test_a_source_of_urls_can_be_pickled(tmp_path, server):
    remote = streamed(server.url + "/shard-{000..006}.tar", cache=str(tmp_path / "cache"))
    copy = pickle.loads(pickle.dumps(remote))
    assert copy.sample().x.shape == (1, 1, 2, 2)


def test_a_missing_shard_is_named(tmp_path, server):
    missing = streamed(server.url + "/shard-{006..007}.tar", cache=str(tmp_path / "cache"))
    with refused(f"{server.url}/shard-007.tar", kind=OSError):
        ReadingRun(missing).train(4)


def test_allowed_pipes_are_read(tmp_path, urls):
    pipes = [f"pipe:cat {url}" for url in urls]
    piped = streamed(pipes, allow_pipe=True, cache=str(tmp_path / "cache"))
    assert sorted(ReadingRun(piped).train(6).samples[:46]) == EVERY_SAMPLE
