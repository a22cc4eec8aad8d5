"""Shapes: sizes, buckets of aspect ratios, crops, and the sizes of upright images."""

import io
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageOps

from data.noise import CROP_STREAM, generator
from data.pixels import PixelOptions, convert_image, open_image
from data.shapes import (
    Size,
    assign_buckets,
    choose_buckets,
    crop_loss,
    describe_buckets,
    fill_size,
    mirror,
    pad_to_size,
    parse_size,
    read_upright_size,
)
from tests.data.odd_images import readable_images
from tests.helpers.refusals import refused


def noisy_image(width, height, seed=0):
    """Return an image of random pixels, whose levels do not overshoot when it is scaled."""
    pixels = np.random.default_rng(seed).integers(80, 176, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_sizes(count, seed=0):
    """Return sizes of images of aspect ratios between 1 / 6 and 6."""
    sides = np.exp(np.random.default_rng(seed).uniform(-0.9, 0.9, (count, 2)))
    return [Size(*sides_of_one) for sides_of_one in np.rint(300 * sides).astype(int).tolist()]


def largest_difference(left, right):
    """Return the largest difference of two images, in levels."""
    return np.abs(np.asarray(left).astype(int) - np.asarray(right).astype(int)).max()


@pytest.mark.parametrize(
    ("text", "size"), [("64", (64, 64)), (64, (64, 64)), ("64x96", (64, 96)), ("96x64", (96, 64))]
)
def test_a_size_is_a_square_or_width_x_height(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["64x", "x64", "0", "0x8", "64x96x3", "-8", "", "64.5", "64 x 96"])
def test_other_sizes_are_refused(text):
    with refused("size", repr(text), "64x96", kind=ValueError):
        parse_size(text)


def test_buckets_of_64_pixels_in_multiples_of_16():
    names = [str(size) for size in choose_buckets(Size(64, 64), 16, 4)]
    narrow = ["32x128", "32x112", "32x96", "48x80"]
    assert names == [*narrow, "64x64", "80x48", "96x32", "112x32", "128x32"]


@pytest.mark.parametrize(("side", "multiple"), [(64, 8), (256, 32), (512, 64), (1024, 64)])
def test_buckets_are_divisible_of_at_most_the_area_and_as_large_as_can_be(side, multiple):
    sizes = choose_buckets(Size(side, side), multiple, 4)
    assert Size(side, side) in sizes
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert width * height <= side**2
        wider = (width + multiple) * height
        taller = width * (height + multiple)
        assert max(wider, taller) > side**2
        assert max(width, height) <= 4 * min(width, height)
        assert Size(height, width) in sizes


@pytest.mark.parametrize(
    ("size", "multiple", "named"),
    [
        (Size(60, 60), 16, ("size", 60, 16, "48 or 64")),
        (Size(8, 8), 16, ("size", 8, 16)),
        (Size(64, 96), 16, ("size", "64x96", "--buckets")),
        (Size(64, 64), -16, ("buckets", -16)),
    ],
)
def test_sizes_that_are_no_multiples_are_refused(size, multiple, named):
    with refused(*named, kind=ValueError):
        choose_buckets(size, multiple, 4)


@pytest.mark.parametrize("aspect", [0.5, float("inf"), float("nan")])
def test_an_impossible_aspect_ratio_is_refused(aspect):
    with refused("max_aspect", aspect, kind=ValueError):
        choose_buckets(Size(64, 64), 16, aspect)


def test_each_image_is_in_the_bucket_of_the_nearest_log_aspect_ratio():
    images = random_sizes(500)
    assigned = assign_buckets(images, choose_buckets(Size(64, 64), 8, 4), 1)
    for image, number in zip(images, assigned.numbers):
        distances = [abs(size.log_aspect - image.log_aspect) for size in assigned.sizes]
        assert distances[number] == min(distances)


def test_small_buckets_are_merged_and_no_image_is_dropped():
    images = random_sizes(500)
    buckets = choose_buckets(Size(64, 64), 8, 4)
    assigned = assign_buckets(images, buckets, 40)
    counts = np.bincount(assigned.numbers, minlength=len(assigned.sizes))
    assert counts.sum() == 500
    assert counts.min() >= 40
    assert 0 < assigned.merged < len(buckets)
    for image, number in zip(images, assigned.numbers):
        distances = [abs(size.log_aspect - image.log_aspect) for size in assigned.sizes]
        assert distances[number] == min(distances)


def test_fewer_images_than_a_bucket_must_have_are_one_bucket():
    assigned = assign_buckets(random_sizes(30), choose_buckets(Size(64, 64), 8, 4), 64)
    assert len(assigned.sizes) == 1
    assert assigned.numbers.tolist() == [0] * 30


def test_twelve_images_of_four_shapes_keep_their_buckets_by_default():
    images = [Size(*size) for size in ((64, 64), (100, 50), (50, 100), (90, 60))] * 3
    assigned = assign_buckets(images, choose_buckets(Size(64, 64), 16, 4))
    assert [str(size) for size in assigned.sizes] == ["48x80", "64x64", "80x48"]
    assert np.bincount(assigned.numbers).tolist() == [3, 3, 6]


def test_an_unknown_size_counts_as_a_square():
    assigned = assign_buckets([Size(100, 50), None], choose_buckets(Size(64, 64), 16, 4), 1)
    assert assigned.sizes[assigned.numbers[1]] == (64, 64)


def test_the_largest_loss_is_that_of_the_worst_image():
    images = random_sizes(300)
    assigned = assign_buckets(images, choose_buckets(Size(64, 64), 16, 4), 20)
    losses = []
    for image, number in zip(images, assigned.numbers):
        ratio = image.width / image.height / np.exp(assigned.sizes[number].log_aspect)
        losses.append(1 - min(ratio, 1 / ratio))
    assert max(losses) <= assigned.largest_loss <= max(losses) + 1e-4


def test_a_crop_from_2_to_1_into_a_square_loses_half():
    assert crop_loss(Size(100, 50), Size(64, 64)) == Fraction(1, 2)
    assert crop_loss(Size(30, 60), Size(32, 64)) == 0


def test_the_histogram_has_a_line_for_each_bucket_and_the_largest_loss():
    images = [Size(64, 64)] * 40 + [Size(100, 50)] * 10
    lines = describe_buckets(
        assign_buckets(images, choose_buckets(Size(64, 64), 16, 4), 1), "center"
    )
    assert lines[1].split() == ["64x64", "40", "#" * 40]
    assert lines[2].split() == ["80x48", "10", "#" * 10]
    assert "16.67 %" in lines[3]


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (33, 97), (64, 64), (7, 5)])
def test_the_centre_crop_is_pillows_bit_for_bit(size):
    image = noisy_image(*size)
    expected = ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC)
    assert fill_size(image, Size(32, 32)).image.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("size", "target", "scaled"),
    [
        ((100, 50), (64, 64), (128, 64)),
        ((50, 100), (64, 64), (64, 128)),
        ((60, 60), (96, 64), (96, 96)),
        ((20, 10), (32, 32), (64, 32)),
    ],
)
@pytest.mark.parametrize("u", [None, 0.0, 0.37, 0.999])
def test_a_crop_is_that_part_of_the_scaled_image(size, target, scaled, u):
    image = noisy_image(*size)
    fitted = fill_size(image, Size(*target), u)
    top, left = fitted.crop
    whole = image.resize(scaled, Image.Resampling.BICUBIC)
    expected = whole.crop((left, top, left + target[0], top + target[1]))
    assert fitted.image.size == target
    assert largest_difference(fitted.image, expected) <= 1
    assert fitted.describe() == {
        "original_size": [size[1], size[0]],
        "crops_coords_top_left": [top, left],
        "target_size": [target[1], target[0]],
    }


def test_random_crops_reach_every_position():
    image = noisy_image(72, 64)
    lefts = set()
    for i in range(200):
        u = generator(0, i, stream=CROP_STREAM).random()
        lefts.add(fill_size(image, Size(64, 64), u).crop[1])
    assert lefts == set(range(9))


@pytest.mark.parametrize(
    ("size", "scaled", "padding"),
    [((100, 50), (64, 32), [16, 0]), ((50, 100), (32, 64), [0, 16]), ((30, 30), (64, 64), [0, 0])],
)
def test_a_padded_image_is_whole_on_the_background(size, scaled, padding):
    image = noisy_image(*size)
    fitted = pad_to_size(image, Size(64, 64), "#204060")
    expected = Image.new("RGB", (64, 64), (0x20, 0x40, 0x60))
    expected.paste(image.resize(scaled, Image.Resampling.BICUBIC), (padding[1], padding[0]))
    assert fitted.image.tobytes() == expected.tobytes()
    assert fitted.describe()["padding"] == padding
    assert fitted.describe()["crops_coords_top_left"] == [0, 0]


def test_a_mirrored_crop_is_that_part_of_the_mirrored_image():
    image = noisy_image(100, 50)
    mirrored = mirror(fill_size(image, Size(64, 64), 0.2))
    top, left = mirrored.crop
    whole = ImageOps.mirror(image).resize((128, 64), Image.Resampling.BICUBIC)
    expected = whole.crop((left, top, left + 64, top + 64))
    assert left > 32
    assert largest_difference(mirrored.image, expected) <= 1


def test_mirrored_padding_is_that_of_the_mirrored_image():
    image = noisy_image(33, 64)
    mirrored = mirror(pad_to_size(image, Size(64, 64), "white"))
    padding = mirrored.describe()["padding"]
    assert padding == [0, 64 - 33 - 15]
    inside = mirrored.image.crop((padding[1], 0, padding[1] + 33, 64))
    assert inside.tobytes() == ImageOps.mirror(image).tobytes()


@pytest.mark.parametrize("image", readable_images(), ids=lambda image: image.name)
def test_the_size_from_the_header_is_that_of_the_upright_image(image):
    suffix = "." + image.name.rpartition(".")[2]
    header = read_upright_size(open_image(io.BytesIO(image.data), suffix), image.name)
    opened = open_image(io.BytesIO(image.data), suffix)
    options = PixelOptions(white=65535 if opened.mode.startswith("I;16") else None)
    try:
        converted = convert_image(opened, options, image.name)
    except ValueError:
        pytest.skip("needs its value of white")
    assert header == converted.size


def test_an_orientation_after_the_pixels_of_a_png_is_read():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    plain = io.BytesIO()
    noisy_image(30, 10).save(plain, "png")
    content = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    data = plain.getvalue()
    end = data.index(b"IEND") - 4
    image = open_image(io.BytesIO(data[:end] + chunk + data[end:]), ".png")
    assert read_upright_size(image, "x.png") == (10, 30)
