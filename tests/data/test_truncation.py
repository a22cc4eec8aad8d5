"""Truncation: of a pair set, the share that lies farthest from its noise is never shown, and nothing else changes."""

import pickle

import numpy as np
import pytest
import torch

from data.batch import Steps
from data.files import read_json, write_json
from data.mixed import Mixed
from data.pairs import Pairs, PairWriter
from data.stream import Stream, identity

COUNT, SHAPE = 200, (2, 4, 4)


def samples(eps, indices):
    """Return samples at known distances from their noises, in an order of their own."""
    return eps + (torch.tensor(indices) * 37 % COUNT / 50).view(-1, 1, 1, 1)


@pytest.fixture
def path(tmp_path):
    writer = PairWriter(tmp_path / "pairs", {"guidance": 1.0}, COUNT, 7, SHAPE, 8)
    for number in writer.shards.numbers():
        indices = writer.shards.indices(number)
        writer.write(number, samples(writer.noise(number), indices), torch.tensor(indices))  # a pair's class is its index
    assert writer.shards.finish()
    return str(tmp_path / "pairs")


def near(keep):
    return {i for i in range(COUNT) if i * 37 % COUNT < round(keep * COUNT)}


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.02, 1.0])
def test_exactly_the_farthest_are_missing_and_the_others_come_once_an_epoch(path, keep):
    source = Pairs(path, keep=keep)
    assert len(source) == len(near(keep))
    for epoch in (0, 1, 5):
        shown = source.take(3, epoch * len(source), len(source))
        assert sorted(shown.condition.tolist()) == sorted(near(keep))
    eps = source.pairs.noise(shown.condition.numpy())
    assert torch.equal(shown.noise, eps)
    torch.testing.assert_close(shown.x, samples(eps, shown.condition.tolist()), rtol=1e-3, atol=2e-3)


def test_the_default_drops_a_tenth(path):
    assert len(Pairs(path)) == 0.9 * COUNT


def test_the_manifest_is_as_before_and_sets_without_recorded_distances_are_measured(path, tmp_path):
    recorded = Pairs(path).pairs.distances()
    torch.testing.assert_close(recorded, np.arange(COUNT) * 37 % COUNT / 50, rtol=1e-3, atol=2e-3)
    assert not any("distances" in shard for shard in read_json(tmp_path / "pairs/manifest.json")["shards"])
    for record in (tmp_path / "pairs").glob("0*.json"):
        write_json(record, {key: value for key, value in read_json(record).items() if key != "distances"})
    assert np.array_equal(Pairs(path).pairs.distances(), recorded)


def test_another_shards_record_is_refused(path, tmp_path):
    write_json(tmp_path / "pairs/000003.json", read_json(tmp_path / "pairs/000004.json"))
    with pytest.raises(ValueError, match="000003.json: is not the record of the shard in the manifest"):
        Pairs(path)
    assert len(Pairs(path, keep=1.0)) == COUNT


def test_ranks_restarts_and_copies_see_the_same_sequence(path):
    source = pickle.loads(pickle.dumps(Pairs(path, keep=0.5)))
    order = Pairs(path, keep=0.5).order(5)
    for step in (0, 9, 40):
        for world in (1, 2, 4):
            parts = [next(iter(Steps(source, 16, 5, step, rank, world))) for rank in range(world)]
            assert torch.cat([part.condition for part in parts]).tolist() == order.indices(16 * step, 16).tolist()


def test_mixed_walks_what_is_kept(path):
    mixed = Mixed([Pairs(path, keep=0.5), Pairs(path, keep=0.1)], [5, 1])
    shown = mixed.take(0, 0, 120).condition.tolist()
    assert sorted(shown) == sorted([*near(0.5), *near(0.1)])


def test_a_run_does_not_go_on_with_another_share(path):
    state = Stream(Pairs(path), batch=8).state_dict()
    Stream(Pairs(path), batch=8).load_state_dict(state)
    with pytest.raises(ValueError, match="begun on other samples"):
        Stream(Pairs(path, keep=0.8), batch=8).load_state_dict(state)
    assert len({identity(Mixed([Pairs(path, keep=keep)], [1])) for keep in (0.7, 0.8, 0.9, 1.0)}) == 4


def test_shares_that_mean_nothing_or_leave_too_few_are_refused(path):
    for keep in (0.0, -1.0, 1.1):
        with pytest.raises(ValueError, match=f"keep is {keep}, it must lie in"):
            Pairs(path, keep=keep)
    with pytest.raises(ValueError, match=r"gives 100 pairs \(keep 0.5 of 200\), a batch takes 101 of them; collect more"):
        Stream(Pairs(path, keep=0.5), batch=101)
    both = Mixed([Pairs(path, keep=0.5), Pairs(path)], [1, 3])
    Stream(both, batch=240)
    with pytest.raises(ValueError, match=r"gives 180 pairs \(keep 0.9 of 200\), a batch takes 183 of them"):
        Stream(both, batch=244)
