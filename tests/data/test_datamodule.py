"""The global sequence of samples is the same for any number of processes, workers and restarts."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.batch import Batch, IndexedDataset, RankBatches
from data.shards import Order


class Numbers(IndexedDataset):
    """A set in which sample i is the number i."""

    def __init__(self, counts):
        self.manifest = {"shards": [{"count": count} for count in counts]}

    def read(self, indices):
        return Batch(torch.from_numpy(np.asarray(indices)), True)


SET = Numbers([7, 20, 13, 24])  # 64 samples, batches of 16: an epoch is 4 steps


def global_batches(first, end, world, parts=1, workers=0):
    """Return the global batches of steps `first` to `end` - 1, joined from those of all ranks."""
    batches = []
    for rank in range(world):
        steps = RankBatches(SET, 16, 5, first, rank, world, parts)
        loader = iter(DataLoader(steps, batch_size=None, num_workers=workers))
        batches += [next(loader) for _ in range((end - first) * parts)]
    joined = []
    for step in range(first, end):
        micro_batches = [batch for batch in batches if batch.step == step]
        micro_batches.sort(key=lambda batch: batch.start)
        joined.append(torch.cat([batch.x for batch in micro_batches]).tolist())
    return joined


WHOLE = global_batches(0, 12, 1)


@pytest.mark.parametrize("epoch", range(3))
def test_an_epoch_holds_every_sample_once(epoch):
    samples = sum(WHOLE[4 * epoch : 4 * epoch + 4], [])
    assert sorted(samples) == list(range(64))


def test_restarts_on_four_two_and_one_process_give_the_same_batches():
    restarted = global_batches(0, 3, 4) + global_batches(3, 7, 2) + global_batches(7, 12, 1)
    assert restarted == WHOLE


@pytest.mark.parametrize(("world", "parts"), [(1, 4), (2, 2), (4, 4)])
def test_accumulation_splits_the_same_batch(world, parts):
    assert global_batches(5, 9, world, parts) == WHOLE[5:9]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_keep_the_order(workers):
    assert global_batches(1, 6, 2, 2, workers) == WHOLE[1:6]


def test_an_order_can_be_pickled():
    order = Order([5, 6], 1)
    copy = pickle.loads(pickle.dumps(order))
    assert np.array_equal(copy.indices(3, 20), order.indices(3, 20))
