"""Dequantised images: the level can be read back, the rest is uniform, and drawn anew in every epoch but not on resume."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.dequantised import Dequantised
from data.images import pack


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    pack(folder, size=8)
    return folder


def test_levels_come_back_and_the_rest_is_uniform(digits):
    from sklearn.datasets import load_digits

    source, heldout = (Dequantised(str(digits / split), levels=17) for split in ("train", "heldout"))
    x = torch.cat([part.read(np.arange(len(part.images))).x for part in (source, heldout)])
    u = (x + 1) * 17 / 2
    assert x.dtype == torch.float32 and x.shape == (1797, 1, 8, 8) and x.min() >= -1 and x.max() <= 1
    counts = np.bincount(load_digits().data.astype(int).ravel(), minlength=17)
    assert u.floor().clamp(max=16).long().flatten().bincount(minlength=17).tolist() == counts.tolist()
    rest = u - u.floor()
    assert rest.mean().item() == pytest.approx(0.5, abs=5e-3) and rest.var().item() == pytest.approx(1 / 12, rel=0.02)


def test_draws_are_a_function_of_seed_and_position(digits):
    source = Dequantised(str(digits / "heldout"), levels=17)
    whole = source.take(3, 0, 360)
    cut = torch.cat([source.take(3, start, size).x for start, size in [(0, 7), (7, 200), (207, 153)]])
    assert torch.equal(whole.x, cut) and whole.latent and whole.condition.shape == (360,)
    order = source.order(3).indices(0, 360)
    twice = [np.flatnonzero(order == 11)[i] for i in (0, 1)]  # in two epochs
    first, second = whole.x[twice]
    assert not torch.equal(first, second) and (first - second).abs().max() < 2 / 17
    assert torch.equal(source.read(np.array([11])).x, source.read(np.array([5, 11])).x[1:])


def test_levels_that_the_images_do_not_have_are_refused(tmp_path):
    for i in range(4):
        Image.effect_noise((8, 8), 60 + i).save(tmp_path / f"{i}.png")
    pack(tmp_path / "set", tmp_path, size=8, grey=True, holdout=0.25)
    path = str(tmp_path / "set" / "train")
    with pytest.raises(ValueError, match="more than 17 evenly spread grey levels"):
        Dequantised(path, levels=17).take(0, 0, 3)
    x = Dequantised(path).take(0, 0, 3).x
    bytes_ = Dequantised(path).images.take(0, 0, 3).x
    assert torch.equal(((x + 1) * 128).floor(), ((bytes_ + 1) * 127.5).round())
    with pytest.raises(ValueError, match="levels is 1,"):
        Dequantised(path, levels=1)
