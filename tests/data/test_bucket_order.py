"""The bucket of each step: a function of (seed, step), in proportion to the buckets' sizes."""

import pickle
from collections import Counter

import numpy as np
import pytest

from data.bucket_order import BucketBatch, BucketOrder
from tests.helpers.refusals import refused

TOTALS = [5, 7, 24, 100]  # 136 samples
BATCH = 5


def locate_all(order, steps):
    return [order.locate(step) for step in steps]


ORDER = BucketOrder(TOTALS, BATCH, seed=3)
CYCLES = 4 * BATCH  # after a multiple of BATCH cycles every bucket is at the end of an epoch
STEPS = ORDER.first_step(CYCLES)
FOUND = locate_all(ORDER, range(STEPS))


def test_a_bucket_has_all_its_batches_once_and_in_order():
    for bucket in range(len(TOTALS)):
        numbers = [found.number for found in FOUND if found.bucket == bucket]
        assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("cycle", range(1, CYCLES + 1))
def test_less_than_one_batch_of_a_bucket_waits_for_the_next_cycle(cycle):
    batches = Counter(found.bucket for found in FOUND[: ORDER.first_step(cycle)])
    for bucket, total in enumerate(TOTALS):
        assert 0 <= cycle * total - batches[bucket] * BATCH < BATCH


def test_buckets_are_chosen_in_proportion_to_their_sizes():
    batches = Counter(found.bucket for found in FOUND)
    assert [batches[bucket] * BATCH for bucket in range(4)] == [CYCLES * n for n in TOTALS]


def test_any_step_is_found_without_those_before_it():
    steps = np.random.default_rng(0).integers(STEPS, size=50).tolist()
    for step in steps:
        assert BucketOrder(TOTALS, BATCH, seed=3).locate(step) == FOUND[step]


@pytest.mark.parametrize("step", [10**6, 10**12, 10**15])
def test_late_steps_are_those_of_their_cycle(step):
    found = ORDER.locate(step)
    assert found.number * BATCH == pytest.approx(step * BATCH * TOTALS[found.bucket] / 136, abs=40)


def test_the_seed_and_the_cycle_change_the_order():
    first = ORDER.first_step(1)
    cycle = [found.bucket for found in FOUND[:first]]
    other_seed = [found.bucket for found in locate_all(BucketOrder(TOTALS, BATCH, 4), range(first))]
    assert cycle != other_seed
    cycles = []
    for number in range(4):  # cycles 5, 10, ... hold the same batches
        start = ORDER.first_step(5 * number)
        cycles.append([found.bucket for found in FOUND[start : start + 20]])
    assert len(set(map(tuple, cycles))) == 4


def test_the_order_of_a_seed_stays():
    """A run of an older version resumes with the same batches."""
    found = locate_all(BucketOrder([8, 20], 4, 0), range(10))
    assert [batch.bucket for batch in found] == [1, 0, 1, 0, 1, 1, 1, 0, 1, 1]
    assert [batch.number for batch in found] == [0, 0, 1, 1, 2, 3, 4, 2, 5, 6]


def test_one_bucket_has_every_step():
    assert locate_all(BucketOrder([7], 3, 0), range(9)) == [BucketBatch(0, i) for i in range(9)]


def test_an_order_of_buckets_can_be_pickled():
    copy = pickle.loads(pickle.dumps(ORDER))
    assert locate_all(copy, range(40)) == FOUND[:40]


def test_a_bucket_without_a_whole_batch_is_refused():
    with refused(5, 6):
        BucketOrder(TOTALS, 6, 0)
