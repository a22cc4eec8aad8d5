"""Mixed sources: exact shares, no gaps, and noise only for samples of pairs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import Batch, RandomAccessSource
from data.mixed import Mixed
from tests.helpers.refusals import refused
from trainer.module import couple_noise
from trainer.step_random import StepRandom


class CountingSource(RandomAccessSource):
    """A source in which a sample is `sign` times its position; with `paired` it brings noise."""

    def __init__(self, sign, paired=False):
        self.sign = sign
        self.paired = paired

    def take(self, seed, position, count):
        positions = torch.arange(position, position + count)
        x = self.sign * positions.float().view(-1, 1, 1, 1)
        noise = 100 + x if self.paired else None
        return Batch(x, True, positions, noise)


def test_shares_are_exact_and_nothing_is_skipped():
    mixed = Mixed([CountingSource(1), CountingSource(-1)], [3, 1])
    x = mixed.take(0, 1, 400).x.flatten()  # position 0 belongs to one of the two
    source_of, position_of = mixed.locate(0, 0, 401)
    assert np.bincount(source_of[:400]).tolist() == [300, 100]
    for source in (0, 1):
        positions = position_of[source_of == source]
        assert positions.tolist() == list(range(len(positions)))
    expected = np.where(source_of == 0, position_of, -position_of)
    assert torch.equal(x, torch.from_numpy(expected[1:]).float())


def test_the_sequence_does_not_depend_on_how_it_is_split():
    mixed = Mixed([CountingSource(1), CountingSource(-1), CountingSource(0.5)], [2, 5, 4])
    whole = mixed.take(3, 0, 97).x
    parts = [mixed.take(3, start, size).x for start, size in [(0, 1), (1, 50), (51, 46)]]
    assert torch.equal(whole, torch.cat(parts))


def test_only_pairs_bring_their_noise():
    mixed = Mixed([CountingSource(1, paired=True), CountingSource(-1)], [1, 1])
    batch = replace(mixed.take(0, 2, 64), size=64)
    eps = couple_noise(batch, StepRandom(batch), batch.x)
    independent = StepRandom(batch).noise(batch.x)
    assert batch.paired.sum() == 32
    assert torch.equal(eps[batch.paired], 100 + batch.x[batch.paired])
    assert torch.equal(eps[~batch.paired], independent[~batch.paired])
    assert torch.equal(batch.condition, batch.x.abs().flatten().long())


class Few(CountingSource):
    """A source of samples with other properties."""

    def __init__(self, **changes):
        super().__init__(1)
        self.changes = changes

    def take(self, seed, position, count):
        return replace(super().take(seed, position, count), **self.changes)


UNLIKE = {"latents": {"latent": False}, "conditions": {"condition": None}}
UNLIKE["(2, 2, 2)"] = {"x": torch.zeros(1, 2, 2, 2)}


@pytest.mark.parametrize(("named", "change"), UNLIKE.items(), ids=UNLIKE)
def test_sources_that_differ_are_refused_at_once(named, change):
    with refused("Mixed", named, kind=ValueError):
        Mixed([CountingSource(1), Few(**change)], [3, 1])


@pytest.mark.parametrize(("sources", "shares"), [(1, [1, 2]), (2, [1, 0])])
def test_every_source_needs_a_positive_share(sources, shares):
    with refused("Mixed", sources, shares, kind=ValueError):
        Mixed([CountingSource(1)] * sources, shares)
