"""Pixels: every kind of file is read alike by `pack`, an indexed set and sequential tars."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.images import Images
from data.index import index
from data.pack import pack
from data.pixels import PixelOptions, convert_image, open_image, pixels_of
from data.sequential import SequentialTars
from tests.data.odd_images import (
    SIZE,
    encoded,
    quadrants,
    readable_images,
    unclear_images,
    with_hidden_corner,
)
from tests.helpers.refusals import refused

READABLE = readable_images()
UNCLEAR = unclear_images()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """Write a tar of files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def as_pixels(x: np.ndarray) -> np.ndarray:
    """Return a batch in [-1, 1] as (B, H, W, C) in 0 .. 255."""
    return np.rint((x.numpy() + 1) * 127.5).transpose(0, 2, 3, 1)


def read_packed(folder: Path, files: dict[str, bytes], **options) -> np.ndarray:
    """Return the pixels of files through `pack`."""
    for name, data in files.items():
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    pack(folder / "set", folder / "photos", size=SIZE, holdout=0, **options)
    return as_pixels(Images(str(folder / "set/train")).read(np.arange(len(files))).x)


def read_indexed(folder: Path, files: dict[str, bytes], **options) -> np.ndarray:
    """Return the pixels of files through `index`, in the order of their names."""
    write_tar(folder / "tars/a.tar", dict(sorted(files.items())))
    index(folder / "tars", **options)
    return as_pixels(Images(str(folder / "tars")).read(np.arange(len(files))).x)


def read_sequentially(folder: Path, files: dict[str, bytes], **options) -> np.ndarray:
    """Return the pixels of files from sequential tars, in the order of their names."""
    pixels = []
    for name, data in sorted(files.items()):
        tar = folder / "single" / f"{name}.tar"
        write_tar(tar, {name: data})
        pixels.append(as_pixels(SequentialTars(str(tar), **options).sample().x))
    return np.concatenate(pixels)


READERS = {"pack": read_packed, "index": read_indexed, "sequential": read_sequentially}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """The pixels of all readable files, by reader."""
    # One key may have one image only.
    files = {f"{i:02d}_{image.name}": image.data for i, image in enumerate(READABLE)}
    found = {}
    for name, read in READERS.items():
        found[name] = read(tmp_path_factory.mktemp(name), files)
    return found


def test_forty_files_are_tried():
    assert len(READABLE) + len(UNCLEAR) >= 40


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("number", range(len(READABLE)), ids=[image.name for image in READABLE])
def test_a_file_shows_what_it_is_of(pixels, reader, number):
    image = READABLE[number]
    got = pixels[reader][number]
    assert got.shape == image.shows.shape
    np.testing.assert_allclose(got, image.shows, atol=image.error + 1e-3)
    np.testing.assert_allclose(got, pixels["pack"][number], atol=1)


@pytest.mark.parametrize("reader", READERS)
def test_grey_is_one_channel_of_every_file(tmp_path, reader):
    chosen = [image for image in READABLE if image.name in ("hidden.png", "p3.png", "palette.png")]
    files = {image.name: image.data for image in chosen}
    got = READERS[reader](tmp_path, files, grey=True)
    for one, image in zip(got, sorted(chosen)):
        shows = np.asarray(Image.fromarray(image.shows).convert("L"))
        np.testing.assert_allclose(one[..., 0], shows, atol=image.error)


@pytest.mark.parametrize("reader", READERS)
def test_the_background_is_an_option(tmp_path, reader):
    hidden, _ = with_hidden_corner(quadrants())
    files = {"a.png": encoded(hidden, "PNG")}
    got = READERS[reader](tmp_path, files, background="#102030")
    assert got[0, 0, 0].tolist() == [16, 32, 48]
    assert got[0, 5, 5].tolist() == list(quadrants()[5, 5])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("image", UNCLEAR, ids=[image.name for image in UNCLEAR])
def test_an_unclear_file_is_refused_or_read_with_the_value_of_white(tmp_path, reader, image):
    files = {image.name: image.data}
    with refused(image.name.partition(".")[0], *image.named, kind=ValueError):
        READERS[reader](tmp_path / "unclear", files)
    if image.white is not None:
        got = READERS[reader](tmp_path / "clear", files, white=image.white)
        np.testing.assert_allclose(got[0], image.shows, atol=1)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("option", [{"background": "no colour"}, {"white": -1}])
def test_an_impossible_option_is_named(tmp_path, reader, option):
    (name, value), *_ = option.items()
    with refused(name, value, kind=ValueError):
        READERS[reader](tmp_path, {"a.png": encoded(quadrants(), "PNG")}, **option)


def test_white_does_not_replace_what_a_file_declares(tmp_path):
    levels = bytes([0x0F, 0xFF, 0x00, 0x00])  # of two bytes, the larger first
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 4095\n" + levels)
    image = open_image(tmp_path / "a.pgm", ".pgm")
    converted = convert_image(image, PixelOptions(grey=True, white=4095), "a.pgm")
    assert pixels_of(converted).ravel().tolist() == [255, 0]


def test_a_value_of_white_that_makes_an_image_black_is_refused():
    image = Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4))
    with refused("white", "65535", "black"):
        convert_image(image, PixelOptions(white=65535), "a.tif")


def test_a_dark_image_of_16_bits_a_pixel_is_no_image_of_16_bits_a_channel(tmp_path):
    header = struct.pack("<2sIHHI", b"BM", 66 + 8, 0, 0, 66)
    header += struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)
    header += struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    (tmp_path / "a.bmp").write_bytes(header + struct.pack("<4H", *(4 * [1 << 11])))
    image = open_image(tmp_path / "a.bmp", ".bmp")
    assert pixels_of(convert_image(image, PixelOptions(), "a.bmp"))[:, 0, 0].tolist() == [8, 0, 0]


def test_values_above_white_are_refused():
    image = open_image(io.BytesIO(encoded(np.full((2, 2), 65535, np.uint16), "PNG")), ".png")
    with refused("65535", "4095", kind=ValueError):
        convert_image(image, PixelOptions(white=4095), "a.png")


def test_odd_exif_blocks_are_those_that_pillow_cannot_write():
    for image in READABLE:
        if image.name.startswith("exif_") and image.name != "exif_garbage.png":
            with pytest.raises(Exception, match="."):
                ImageOps.exif_transpose(Image.open(io.BytesIO(image.data)))


def test_what_is_ignored_is_logged_with_the_file(caplog):
    for image in READABLE:
        if image.name in ("exif_garbage.png", "damaged_profile.png"):
            opened = open_image(io.BytesIO(image.data), ".png")
            convert_image(opened, PixelOptions(), f"set/{image.name}")
    assert "set/exif_garbage.png: its EXIF" in caplog.text
    assert "set/damaged_profile.png: its colour profile" in caplog.text


def test_images_of_several_sizes_are_named(tmp_path):
    small = encoded(quadrants()[:8], "PNG")
    write_tar(tmp_path / "a.tar", {"big.png": encoded(quadrants(), "PNG"), "small.png": small})
    with refused("small", "16 x 8", "16 x 16", "size", kind=ValueError):
        index(tmp_path)
