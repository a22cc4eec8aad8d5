"""Packing: any folder of images, the digits, and folders with broken images."""

import errno
import json

import numpy as np
import pytest
from PIL import Image

from data.digits import digits
from data.images import Images
from data.noise import permutation
from data.pack import HOLDOUT_SEED, pack, split_images
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


def test_all_unreadable_images_are_named_with_the_way_out(tmp_path, capsys):
    folder = write_photos(tmp_path / "photos", 50)
    for i in (10, 12, 14):
        (folder / "cat" / f"{i:03d}.png").write_bytes(b"no image")
    with refused("cat/010.png", "cat/012.png", "cat/014.png", "--tolerance", kind=ValueError):
        pack(tmp_path / "set", folder, size=8, holdout=0)
    pack(tmp_path / "set", folder, size=8, holdout=0, tolerance=0.1)
    assert len(Images(str(tmp_path / "set" / "train"))) == 47
    assert "cat/014.png (not an image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(errno.EIO, "Input/output error"), PermissionError(13, "denied", "x")],
)
def test_a_fault_of_the_machine_is_no_unreadable_image(tmp_path, monkeypatch, error):
    folder = write_photos(tmp_path / "photos", 150)
    opened = Image.open

    def fail(file, **options):
        if str(file).endswith("010.png"):
            raise error
        return opened(file, **options)

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(type(error)) as raised:
        pack(tmp_path / "set", folder, size=8)
    assert "cat/010.png" in str(raised.value) or raised.value.filename in ("x", "cat/010.png")
    monkeypatch.undo()
    pack(tmp_path / "set", folder, size=8)
    assert len(Images(str(tmp_path / "set" / "train"))) == 135


def test_a_refused_command_binds_nothing(tmp_path):
    folder = write_photos(tmp_path / "photos", 40, classes=None)
    pixels = np.full((4, 4), 4000, dtype=np.uint16)
    Image.fromarray(pixels).save(folder / "039.png")
    with refused("039.png", "4000", "white", kind=ValueError):
        pack(tmp_path / "set", folder, size=8, shard=10)
    pack(tmp_path / "set", folder, size=8, shard=10, white=4095)
    assert len(Images(str(tmp_path / "set" / "train"))) == 36


@pytest.mark.parametrize(
    "option", [{"size": 0}, {"size": -8}, {"shard": 0}, {"tolerance": 2}, {"holdout": 1}]
)
def test_an_impossible_option_is_named_before_anything_is_written(tmp_path, option):
    folder = write_photos(tmp_path / "photos", 10)
    (name, value), *_ = option.items()
    with refused(name, value, kind=ValueError):
        pack(tmp_path / "set", folder, **option)
    assert not (tmp_path / "set").exists()


def test_a_file_instead_of_the_sets_folder_is_named(tmp_path):
    folder = write_photos(tmp_path / "photos", 10)
    with refused(folder / "cat/000.png", "is a file", kind=NotADirectoryError):
        pack(folder / "cat/000.png", folder)


def test_the_split_of_the_digits_is_the_plain_random_one():
    labels = [item.label for item in digits()]
    heldout = sorted(permutation(1797, HOLDOUT_SEED)[:180].tolist())
    assert split_images(labels, 0.1)["heldout"] == heldout
    assert split_images([None] * 1797, 0.1)["heldout"] == heldout


@pytest.mark.parametrize("holdout", [0.1, 0.3, 0.5, 0.9])
def test_no_class_is_held_out_whole_or_for_more_than_its_part(holdout):
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(1, 8, 30)
        labels = np.repeat(np.arange(30), sizes).tolist()
        splits = split_images(labels, holdout)
        assert sorted(splits["train"] + splits["heldout"]) == list(range(len(labels)))
        lost = np.bincount([labels[i] for i in splits["heldout"]], minlength=30)
        assert (lost < sizes).all()
        assert (lost <= np.maximum(sizes // 2, np.rint(2 * holdout * sizes))).all()
        if holdout <= 0.3:
            assert len(splits["heldout"]) == round(holdout * len(labels))
