"""Packing: any folder of images, the digits, and folders with broken images."""

import json

import numpy as np
import pytest
from PIL import Image

from data.digits import digits
from data.images import Images
from data.pack import pack
from tests.data.remote import replace_ghostscript
from tests.helpers.refusals import refused


def write_photos(folder, count=120, classes=("cat", "dog"), mode="RGB", size=(50, 40)):
    """Write images of random pixels, in turn into the folders of the classes; return the folder."""
    generator = np.random.default_rng(0)
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    for i in range(count):
        subfolder = classes[i % len(classes)] if classes else ""
        path = folder / subfolder / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 255, shape, dtype=np.uint8)
        Image.fromarray(pixels, mode).save(path)
    return folder


def test_digits_are_split_and_read_back(tmp_path):
    pack(tmp_path)
    train = Images(str(tmp_path / "train"))
    heldout = Images(str(tmp_path / "heldout"))
    assert len(train) == 1617
    assert len(heldout) == 180
    assert len(digits()) == len(train) + len(heldout)

    batch = train.read(np.arange(64))
    assert batch.x.shape == (64, 1, 32, 32)
    assert batch.x.min() >= -1
    assert batch.x.max() <= 1
    assert not batch.latent
    assert set(batch.condition.tolist()) <= set(range(10))

    counts = np.bincount(heldout.read(np.arange(180)).condition)
    assert counts.min() >= 8, "every class is held out about as often as chance gives"
    assert counts.max() <= 30, "every class is held out about as often as chance gives"


def test_subfolders_are_classes(tmp_path):
    pack(tmp_path / "set", write_photos(tmp_path / "photos"), size=16, shard=50)
    train = Images(str(tmp_path / "set" / "train"))
    assert train.manifest["classes"] == ["cat", "dog"]
    assert len(train) == 108
    assert train.read(np.array([0, 107])).x.shape == (2, 3, 16, 16)
    assert sorted(set(train.read(np.arange(108)).condition.tolist())) == [0, 1]


def test_a_flat_folder_has_no_classes_and_grey_is_one_channel(tmp_path):
    photos = write_photos(tmp_path / "photos", 20, classes=None)
    pack(tmp_path / "set", photos, size=8, grey=True, holdout=0)
    train = Images(str(tmp_path / "set" / "train"))
    assert len(train) == 20
    assert train.manifest["classes"] is None
    assert not (tmp_path / "set" / "heldout").exists()
    batch = train.read(np.array([3]))
    assert batch.x.shape == (1, 1, 8, 8)
    assert batch.condition is None


def gradient(mode):
    """Return an image that gets brighter from left to right."""
    pixels = np.tile(np.linspace(0, 255, 20, dtype=np.uint8), (10, 1))
    if mode == "I;16":
        return Image.fromarray(pixels.astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "1", "CMYK"])
def test_every_pixel_format_is_read(tmp_path, mode):
    folder = tmp_path / "photos"
    folder.mkdir()
    name = "a.tiff" if mode == "CMYK" else "a.png"
    gradient(mode).save(folder / name)
    pack(tmp_path / "set", folder, size=10, holdout=0)
    x = Images(str(tmp_path / "set" / "train")).read(np.array([0])).x
    assert x.shape == (1, 3, 10, 10)
    difference = x[..., -1].mean() - x[..., 0].mean()
    assert difference > 0.5, "the gradient was clipped or wrapped"


def test_one_corrupt_image_is_skipped_counted_and_named(tmp_path, capsys):
    folder = write_photos(tmp_path / "photos", 150)
    (folder / "cat" / "010.png").write_bytes(b"\x89PNG no more")
    pack(tmp_path / "set", folder, size=8)
    manifest = json.loads((tmp_path / "set" / "train" / "manifest.json").read_text())
    assert manifest["samples"] == 134
    skipped = [name for shard in manifest["shards"] for name in shard["skipped"]]
    assert skipped == ["cat/010.png"]
    assert "cat/010.png" in capsys.readouterr().err
    assert len(Images(str(tmp_path / "set" / "train"))) == 134


def test_too_many_corrupt_images_are_an_error(tmp_path):
    folder = write_photos(tmp_path / "photos", 150)
    for i in (10, 12):
        path = folder / "cat" / f"{i:03d}.png"
        path.write_bytes(path.read_bytes()[:200])
    with refused("cat/012.png", "1 %", kind=ValueError):
        pack(tmp_path / "set", folder, size=8)
    assert not (tmp_path / "set" / "train" / "manifest.json").exists()


def test_a_missing_folder_is_named(tmp_path):
    with refused(tmp_path / "nowhere", kind=FileNotFoundError):
        pack(tmp_path / "set", tmp_path / "nowhere")


def test_a_folder_without_images_is_named_with_the_suffixes_that_are_read(tmp_path):
    with refused(tmp_path, ".jpg", ".png", kind=ValueError):
        pack(tmp_path / "set", tmp_path)


def test_an_image_beside_class_folders_is_named(tmp_path):
    folder = write_photos(tmp_path / "photos", 10)
    Image.new("L", (4, 4)).save(folder / "loose.png")
    with refused(folder / "loose.png", kind=ValueError):
        pack(tmp_path / "set", folder)


def test_a_changed_folder_is_another_set(tmp_path):
    folder = write_photos(tmp_path / "photos", 30)
    pack(tmp_path / "set", folder, size=8)
    pack(tmp_path / "set", folder, size=8)  # the same folder again: nothing to do
    write_photos(folder, 31)
    with refused(tmp_path / "set", "count", 27, 28, kind=ValueError):
        pack(tmp_path / "set", folder, size=8)


def test_postscript_named_like_a_photo_is_never_run(tmp_path, monkeypatch):
    replace_ghostscript(tmp_path, monkeypatch)
    folder = write_photos(tmp_path / "photos")
    postscript = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    (folder / "cat/evil.jpg").write_text(postscript)
    pack(tmp_path / "set", folder, size=16)
    assert not (tmp_path / "ran").exists()
