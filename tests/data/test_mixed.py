"""Mixed sources: exact shares, no gaps, and noise only where a pair brings it."""

import numpy as np
import pytest
import torch

from data.batch import Batch, Source
from data.mixed import Mixed
from trainer.draws import Draws
from trainer.module import coupled


class Counted(Source):
    """A source whose samples are their own positions."""

    def __init__(self, sign, paired=False):
        self.sign, self.paired = sign, paired

    def take(self, seed, position, count):
        x = self.sign * torch.arange(position, position + count, dtype=torch.float32).view(-1, 1, 1, 1)
        return Batch(x, True, torch.arange(position, position + count), 100 + x if self.paired else None)


def test_shares_are_exact_and_nothing_is_skipped():
    mixed = Mixed([Counted(1), Counted(-1)], [3, 1])
    x = mixed.take(0, 1, 400).x.flatten()  # position 0 belongs to one of the two
    which, places = mixed.places(0, 0, 401)
    assert np.bincount(which[:400]).tolist() == [300, 100]
    for source in (0, 1):
        assert places[which == source].tolist() == list(range((which == source).sum()))
    assert torch.equal(x, torch.from_numpy(np.where(which == 0, places, -places)[1:]).float())


def test_it_is_the_same_however_it_is_cut():
    mixed = Mixed([Counted(1), Counted(-1), Counted(0.5)], [2, 5, 4])
    whole = mixed.take(3, 0, 97).x
    parts = torch.cat([mixed.take(3, start, size).x for start, size in [(0, 1), (1, 50), (51, 46)]])
    assert torch.equal(whole, parts)


def test_only_pairs_bring_their_noise():
    batch = Mixed([Counted(1, paired=True), Counted(-1)], [1, 1]).take(0, 2, 64)
    batch.size = 64
    eps, fresh = coupled(batch, Draws(batch), batch.x), Draws(batch).noise(batch.x)
    assert batch.paired.sum() == 32
    assert torch.equal(eps[batch.paired], 100 + batch.x[batch.paired])
    assert torch.equal(eps[~batch.paired], fresh[~batch.paired])
    assert torch.equal(batch.condition, batch.x.abs().flatten().long())


def test_shares_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match="needs a positive share"):
        Mixed([Counted(1)], [1, 2])
    with pytest.raises(ValueError, match="needs a positive share"):
        Mixed([Counted(1), Counted(1)], [1, 0])
