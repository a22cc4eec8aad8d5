"""Truncation leaves out the pairs with the largest |sample - noise| and changes nothing else."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch import RankBatches
from data.datamodule import DataModule, checksum_samples
from data.files import read_json, write_json
from data.mixed import Mixed
from data.pairs import Pairs, PairWriter
from tests.helpers.refusals import refused

COUNT = 200
SHAPE = (2, 4, 4)


def samples(eps, indices):
    """Return samples at a distance of (37 index mod 200) / 50 from their noise."""
    return eps + (torch.tensor(indices) * 37 % COUNT / 50).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A set of pairs in which the class of a pair is its index; all tests only read it."""
    folder = tmp_path_factory.mktemp("truncation") / "pairs"
    writer = PairWriter(folder, {"guidance": 1.0}, COUNT, 7, SHAPE, 8)
    for number in writer.shards.numbers():
        indices = writer.shards.indices(number)
        writer.write(number, samples(writer.noise(number), indices), torch.tensor(indices))
    assert writer.shards.finish()
    return str(folder)


@pytest.fixture
def copied(path, tmp_path):
    """A copy of the set, for a test that changes its files."""
    return Path(shutil.copytree(path, tmp_path / "pairs"))


def nearest(share):
    """Return the indices of the share of pairs with the smallest |sample - noise|."""
    return {i for i in range(COUNT) if i * 37 % COUNT < round(share * COUNT)}


@pytest.mark.parametrize("share", [0.9, 0.5, 0.02, 1.0])
def test_every_epoch_holds_exactly_the_nearest_pairs_once(path, share):
    source = Pairs(path, keep_fraction=share)
    assert len(source) == len(nearest(share))
    for epoch in (0, 1, 5):
        batch = source.take(3, epoch * len(source), len(source))
        assert sorted(batch.condition.tolist()) == sorted(nearest(share))
    eps = source.pairs.noise(batch.condition.numpy())
    assert torch.equal(batch.noise, eps)
    expected = samples(eps, batch.condition.tolist())
    torch.testing.assert_close(batch.x, expected, rtol=1e-3, atol=2e-3)


def test_a_tenth_is_left_out_by_default(path):
    assert len(Pairs(path)) == 0.9 * COUNT


def test_distances_are_recorded_in_each_shard_and_not_in_the_manifest(path):
    recorded = Pairs(path).pairs.distances()
    expected = np.arange(COUNT) * 37 % COUNT / 50
    torch.testing.assert_close(recorded, expected, rtol=1e-3, atol=2e-3)
    manifest = read_json(Path(path) / "manifest.json")
    assert not any("distances" in shard for shard in manifest["shards"])


def test_distances_are_measured_where_none_are_recorded(copied):
    recorded = Pairs(str(copied)).pairs.distances()
    for record in copied.glob("0*.json"):
        content = read_json(record)
        del content["distances"]
        write_json(record, content)
    assert np.array_equal(Pairs(str(copied)).pairs.distances(), recorded)


def test_the_record_of_another_shard_is_refused(copied):
    write_json(copied / "000003.json", read_json(copied / "000004.json"))
    with refused(copied / "000003.json", kind=ValueError):
        Pairs(str(copied))
    assert len(Pairs(str(copied), keep_fraction=1.0)) == COUNT, (
        "without truncation no record is read"
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_restarts_and_copies_read_the_same_sequence(path, world):
    source = pickle.loads(pickle.dumps(Pairs(path, keep_fraction=0.5)))
    order = Pairs(path, keep_fraction=0.5).order(5)
    for step in (0, 9, 40):
        parts = [next(iter(RankBatches(source, 16, 5, step, rank, world))) for rank in range(world)]
        read = torch.cat([part.condition for part in parts])
        assert read.tolist() == order.indices(16 * step, 16).tolist()


def test_mixed_sources_hold_only_the_nearest_pairs(path):
    mixed = Mixed([Pairs(path, keep_fraction=0.5), Pairs(path, keep_fraction=0.1)], [5, 1])
    read = mixed.take(0, 0, 120).condition.tolist()
    assert sorted(read) == sorted([*nearest(0.5), *nearest(0.1)])


def test_a_run_does_not_resume_with_another_share(path):
    state = DataModule(Pairs(path), batch=8).state_dict()
    DataModule(Pairs(path), batch=8).load_state_dict(state)
    with refused("data.source", "samples", kind=ValueError):
        DataModule(Pairs(path, keep_fraction=0.8), batch=8).load_state_dict(state)


def test_every_share_of_a_mixed_source_has_another_identity(path):
    identities = {
        checksum_samples(Mixed([Pairs(path, keep_fraction=s)], [1])) for s in (0.7, 0.8, 0.9, 1.0)
    }
    assert len(identities) == 4


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1])
def test_shares_outside_0_and_1_are_refused(path, share):
    with refused("keep", share, kind=ValueError):
        Pairs(path, keep_fraction=share)


def test_a_batch_with_more_samples_than_pairs_is_refused(path):
    with refused(path, "data.source", "data.batch", "keep", 100, 0.5, 200, 101, kind=ValueError):
        DataModule(Pairs(path, keep_fraction=0.5), batch=101)


def test_a_mixed_batch_with_more_samples_than_pairs_is_refused(path):
    both = Mixed([Pairs(path, keep_fraction=0.5), Pairs(path)], [1, 3])
    DataModule(both, batch=240)
    with refused(path, "data.source", "data.batch", "keep", 180, 0.9, 200, 183, kind=ValueError):
        DataModule(both, batch=244)
