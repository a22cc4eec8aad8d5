"""Dequantised images: a level can be recovered, the remainder is uniform and new in every epoch."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.dequantised import Dequantised
from data.pack import pack
from tests.helpers.refusals import refused


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    pack(folder, size=8)
    return folder


@pytest.fixture
def noisy(tmp_path):
    """Packed grey images with far more than 17 levels."""
    for i in range(4):
        Image.effect_noise((8, 8), 60 + i).save(tmp_path / f"{i}.png")
    pack(tmp_path / "set", tmp_path, size=8, grey=True, holdout=0.25)
    return str(tmp_path / "set" / "train")


def test_levels_are_recovered_and_the_remainder_is_uniform(digits):
    from sklearn.datasets import load_digits

    parts = []
    for split in ("train", "heldout"):
        source = Dequantised(str(digits / split), levels=17)
        parts.append(source.read(np.arange(len(source.images))).x)
    x = torch.cat(parts)
    assert x.dtype == torch.float32
    assert x.shape == (1797, 1, 8, 8)
    assert x.min() >= -1
    assert x.max() <= 1

    scaled = (x + 1) * 17 / 2
    counts = np.bincount(load_digits().data.astype(int).ravel(), minlength=17)
    levels = scaled.floor().clamp(max=16).long().flatten()
    assert levels.bincount(minlength=17).tolist() == counts.tolist()

    remainder = scaled - scaled.floor()
    assert remainder.mean().item() == pytest.approx(0.5, abs=5e-3)
    assert remainder.var().item() == pytest.approx(1 / 12, rel=0.02)


def test_a_resumed_epoch_draws_the_same_values(digits):
    source = Dequantised(str(digits / "heldout"), levels=17)
    whole = source.take(3, 0, 360)
    parts = [source.take(3, start, size).x for start, size in [(0, 7), (7, 200), (207, 153)]]
    assert torch.equal(whole.x, torch.cat(parts))
    assert whole.latent
    assert whole.condition.shape == (360,)


def test_another_epoch_draws_other_values_within_the_level(digits):
    source = Dequantised(str(digits / "heldout"), levels=17)
    x = source.take(3, 0, 360).x  # two epochs of 180 images
    positions = np.flatnonzero(source.order(3).indices(0, 360) == 11)
    first = x[positions[0]]
    second = x[positions[1]]
    assert not torch.equal(first, second)
    assert (first - second).abs().max() < 2 / 17


def test_reading_by_index_draws_the_same_values_every_time(digits):
    source = Dequantised(str(digits / "heldout"), levels=17)
    alone = source.read(np.array([11])).x
    together = source.read(np.array([5, 11])).x
    assert torch.equal(alone, together[1:])


def test_256_levels_keep_every_byte(noisy):
    source = Dequantised(noisy)
    x = source.take(0, 0, 3).x
    pixels = source.images.take(0, 0, 3).x
    assert torch.equal(((x + 1) * 128).floor(), ((pixels + 1) * 127.5).round())


def test_images_with_more_levels_are_refused(noisy):
    source = Dequantised(noisy, levels=17)
    with refused(noisy, 17, kind=ValueError):
        source.take(0, 0, 3)


def test_one_level_is_refused(noisy):
    with refused("levels", 1, kind=ValueError):
        Dequantised(noisy, levels=1)
