"""Packing: any folder of images, the digits, and what is wrong with some of them."""

import json

import numpy as np
import pytest
from PIL import Image

from data.digits import digits
from data.images import Images, pack
from tests.data.remote import spied


def photos(folder, count=120, classes=("cat", "dog"), mode="RGB", size=(50, 40)):
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / (classes[i % len(classes)] if classes else "") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
        Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8), mode).save(path)
    return folder


def test_digits_are_split_and_read_back(tmp_path):
    pack(tmp_path)
    train, heldout = Images(str(tmp_path / "train")), Images(str(tmp_path / "heldout"))
    assert (len(train), len(heldout)) == (1617, 180)
    batch = train.read(np.arange(64))
    assert batch.x.shape == (64, 1, 32, 32) and batch.x.min() >= -1 and batch.x.max() <= 1 and not batch.latent
    assert set(batch.condition.tolist()) <= set(range(10))
    assert len(digits()) == len(train) + len(heldout)
    counts = np.bincount(heldout.read(np.arange(180)).condition)
    assert counts.min() >= 8 and counts.max() <= 30  # no class is held out more than chance would have it


def test_a_folder_of_colours_with_classes(tmp_path):
    pack(tmp_path / "set", photos(tmp_path / "photos"), size=16, shard=50)
    train = Images(str(tmp_path / "set" / "train"))
    assert train.manifest["classes"] == ["cat", "dog"] and len(train) == 108
    assert train.read(np.array([0, 107])).x.shape == (2, 3, 16, 16)
    assert sorted(set(train.read(np.arange(108)).condition.tolist())) == [0, 1]


def test_a_flat_folder_has_no_classes_and_grey_is_one_channel(tmp_path):
    pack(tmp_path / "set", photos(tmp_path / "photos", 20, classes=None), size=8, grey=True, holdout=0)
    train = Images(str(tmp_path / "set" / "train"))
    assert len(train) == 20 and train.manifest["classes"] is None and not (tmp_path / "set" / "heldout").exists()
    assert train.read(np.array([3])).x.shape == (1, 1, 8, 8) and train.read(np.array([3])).condition is None


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1", "CMYK"])
def test_every_pixel_format_is_read(tmp_path, mode):
    folder = tmp_path / "photos"
    folder.mkdir()
    gradient = np.tile(np.linspace(0, 255, 20, dtype=np.uint8), (10, 1))
    image = Image.fromarray(gradient.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(gradient).convert(mode)
    image.save(folder / ("a.tiff" if mode == "CMYK" else "a.png"))
    pack(tmp_path / "set", folder, size=10, holdout=0)
    x = Images(str(tmp_path / "set" / "train")).read(np.array([0])).x
    assert x.shape == (1, 3, 10, 10)
    assert x[..., -1].mean() - x[..., 0].mean() > 0.5  # the gradient is there, neither clipped nor wrapped


def test_one_corrupt_image_is_skipped_counted_and_named(tmp_path, capsys):
    folder = photos(tmp_path / "photos", 150)
    (folder / "cat" / "010.png").write_bytes(b"\x89PNG no more")
    pack(tmp_path / "set", folder, size=8)
    manifest = json.loads((tmp_path / "set" / "train" / "manifest.json").read_text())
    assert manifest["samples"] == 134 and [n for shard in manifest["shards"] for n in shard["skipped"]] == ["cat/010.png"]
    assert "skipped unreadable cat/010.png" in capsys.readouterr().err
    assert len(Images(str(tmp_path / "set" / "train"))) == 134


def test_too_many_corrupt_images_are_an_error(tmp_path):
    folder = photos(tmp_path / "photos", 150)
    for i in (10, 12):
        (folder / "cat" / f"{i:03d}.png").write_bytes((folder / "cat" / f"{i:03d}.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cat/012.png: unreadable .* over 1 %"):
        pack(tmp_path / "set", folder, size=8)
    assert not (tmp_path / "set" / "train" / "manifest.json").exists()


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        pack(tmp_path / "set", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images there"):
        pack(tmp_path / "set", tmp_path)
    folder = photos(tmp_path / "photos", 10)
    Image.new("L", (4, 4)).save(folder / "loose.png")
    with pytest.raises(ValueError, match=r"loose.png: lies beside class folders"):
        pack(tmp_path / "set", folder)


def test_a_changed_folder_is_another_set(tmp_path):
    folder = photos(tmp_path / "photos", 30)
    pack(tmp_path / "set", folder, size=8)
    pack(tmp_path / "set", folder, size=8)  # the same again: nothing to do
    photos(folder, 31)
    with pytest.raises(ValueError, match="holds another set"):
        pack(tmp_path / "set", folder, size=8)


def test_postscript_in_the_guise_of_a_photo_is_never_run(tmp_path, monkeypatch):
    spied(tmp_path, monkeypatch)
    photos(tmp_path / "photos")
    (tmp_path / "photos/cat/evil.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    pack(tmp_path / "set", tmp_path / "photos", size=16)
    assert not (tmp_path / "ran").exists()
