"""The global sequence of samples does not depend on processes, accumulation, workers or restarts."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.batch import Batch, Set, Steps
from data.shards import Order


class Numbers(Set):
    """A set whose samples are their indices."""

    def __init__(self, counts):
        self.manifest = {"shards": [{"count": count} for count in counts]}

    def read(self, indices):
        return Batch(torch.from_numpy(np.asarray(indices)), True)


SET = Numbers([7, 20, 13, 24])  # 64 samples, batches of 16: an epoch is 4 steps


def seen(step_from, step_to, world, parts=1, workers=0):
    """Return the global batches of some steps, put together from what every rank reads."""
    ranks = []
    for rank in range(world):
        steps = Steps(SET, 16, 5, step_from, rank, world, parts)
        loader = iter(DataLoader(steps, batch_size=None, num_workers=workers))
        ranks.append([next(loader) for _ in range((step_to - step_from) * parts)])
    found = []
    for step in range(step_from, step_to):
        micro = [batch for batches in ranks for batch in batches if batch.step == step]
        found.append(torch.cat([batch.x for batch in sorted(micro, key=lambda batch: batch.start)]).tolist())
    return found


WHOLE = seen(0, 12, 1)


def test_every_sample_once_an_epoch():
    for epoch in range(3):
        assert sorted(sum(WHOLE[4 * epoch : 4 * epoch + 4], [])) == list(range(64))


def test_four_then_two_then_one_process_with_restarts_at_odd_steps():
    assert seen(0, 3, 4) + seen(3, 7, 2) + seen(7, 12, 1) == WHOLE


@pytest.mark.parametrize(("world", "parts"), [(1, 4), (2, 2), (4, 4)])
def test_accumulation_splits_the_same_batch(world, parts):
    assert seen(5, 9, world, parts) == WHOLE[5:9]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_keep_the_order(workers):
    assert seen(1, 6, 2, 2, workers) == WHOLE[1:6]


def test_an_order_travels_to_other_processes():
    order = Order([5, 6], 1)
    assert np.array_equal(pickle.loads(pickle.dumps(order)).indices(3, 20), order.indices(3, 20))
