"""`rectify pack`: the same bytes as ever, shapes, flips, small images, and worker processes."""

import hashlib
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image, ImageOps

from data.buckets import read_buckets
from data.digits import digits
from data.images import Images
from data.pack import pack, split_images
from data.shards import ShardReader
from data.shards.write import measure_offsets, scan_complete_tar, write_tar
from deploy.cli import main
from tests.data.test_images import write_photos
from tests.helpers.refusals import PREFIX, assert_refused, refused

SHAPES = ((64, 64), (100, 50), (50, 100), (90, 60))
# sha256 of keys, pixels and classes of all samples, and of plan.json, of the digits.
DIGITS = {
    "train": "bc47648d2317b46cdea66c00b50a843c55af2f10647160121d3a4e1d25934fff",
    "heldout": "c0f5f5a65e8b08309918a7b967fe54fc66172805693eb6a1cf8a8e9d54e99a9c",
}
DIGIT_PLANS = {
    "train": "87e5a633f05e435c8c923281db52defb40853aa0100adc2239f72d51da37dfc4",
    "heldout": "08a0fc466472d2f86581fb8993ea37d3e5be292ad8237e58d0174db7aeeca3a1",
}


def write_shapes(folder, count=48, shapes=SHAPES):
    """Write images of random pixels, of each shape in turn; return the folder."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        width, height = shapes[i % len(shapes)]
        pixels = generator.integers(80, 176, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def read_files(folder):
    """Return the bytes of all files below a folder, by name."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def read_samples(path):
    """Return the samples of a set as they are stored."""
    reader = ShardReader(path, "images")
    return [{**reader[i]} for i in range(len(reader))]


def read_facts(path):
    """Return the .json of each sample of a set."""
    return [json.loads(bytes(sample["json"])) for sample in read_samples(path)]


def png_bytes(image):
    """Return an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def tar_bytes(samples):
    """Return the tar that webdataset writes of samples."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0.0) as writer:
        for sample in samples:
            writer.write(sample)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def packed_digits(tmp_path_factory):
    """Return the folder of the packed digits."""
    folder = tmp_path_factory.mktemp("digits")
    pack(folder)
    return folder


@pytest.mark.parametrize("split", DIGITS)
def test_the_digits_are_what_they_have_always_been(packed_digits, split):
    digest = hashlib.sha256()
    images = Images(str(packed_digits / split))
    for i in range(len(images)):
        sample = images.reader[i]
        assert sample.keys() == {"__key__", "png", "cls"}
        digest.update(sample["__key__"].encode() + images.pixels(i).tobytes())
        digest.update(bytes(sample["cls"]))
    assert digest.hexdigest() == DIGITS[split]


@pytest.mark.parametrize("split", DIGITS)
def test_the_plan_of_the_digits_is_what_it_has_always_been(packed_digits, split):
    plan = (packed_digits / split / "plan.json").read_bytes()
    assert hashlib.sha256(plan).hexdigest() == DIGIT_PLANS[split]


def test_a_shard_of_the_digits_is_what_webdataset_writes_of_pillows_crops(packed_digits):
    items = digits()
    members = split_images([item.label for item in items], 0.1)["heldout"]
    samples = []
    for i, member in enumerate(members):
        image = items[member].open().convert("L")
        png = png_bytes(ImageOps.fit(image, (32, 32), Image.Resampling.BICUBIC))
        cls = str(items[member].label).encode()
        samples.append({"__key__": f"{i:09d}", "png": png, "cls": cls})
    assert (packed_digits / "heldout/000000.tar").read_bytes() == tar_bytes(samples)


def test_a_labelled_set_is_what_webdataset_writes_of_pillows_crops(tmp_path):
    photos = write_photos(tmp_path / "photos", 20)
    pack(tmp_path / "set", photos, size=16, holdout=0)
    samples = []
    for i, path in enumerate(sorted(photos.rglob("*.png"))):
        image = ImageOps.fit(Image.open(path), (16, 16), Image.Resampling.BICUBIC)
        cls = b"1" if path.parent.name == "dog" else b"0"
        samples.append({"__key__": f"{i:09d}", "png": png_bytes(image), "cls": cls})
    assert (tmp_path / "set/train/000000.tar").read_bytes() == tar_bytes(samples)
    plan = json.loads((tmp_path / "set/train/plan.json").read_text())
    names = "classes count format grey holdout kind listing seal shard size source split"
    assert " ".join(sorted(plan)) == names


def test_the_offsets_that_are_noted_while_writing_are_those_of_the_tar(packed_digits):
    tar = packed_digits / "heldout/000000.tar"
    spans = [spans for _, spans in scan_complete_tar(tar).samples]
    offsets = np.load(packed_digits / "heldout/000000.npy")
    assert (offsets == measure_offsets(tar, spans, ["cls", "png"])).all()


@pytest.mark.parametrize("key", ["000000000", "a/b", "x" * 96, "x" * 97, "x" * 300, "\u00fcber"])
def test_a_tar_is_what_webdataset_writes(key):
    samples = []
    for size in (0, 1, 511, 512, 513, 20_000):
        samples.append(
            {"__key__": f"{size}{key}", "png": bytes(size), "noise.npy": b"1", "cls": b""}
        )
    file = io.BytesIO()
    write_tar(file, samples)
    assert file.getvalue() == tar_bytes(samples)


def test_a_size_that_is_no_square(tmp_path):
    photos = write_shapes(tmp_path / "photos", 8)
    pack(tmp_path / "set", photos, size="32x48", holdout=0)
    images = Images(str(tmp_path / "set/train"))
    assert images.manifest["size"] == [32, 48]
    assert images.read(np.arange(8)).x.shape == (8, 3, 48, 32)
    assert read_facts(tmp_path / "set/train")[1] == {
        "captions": [],
        "original_size": [50, 100],
        "crops_coords_top_left": [0, 32],
        "target_size": [48, 32],
    }


def test_buckets_hold_each_image_once_in_shards_of_one_size(tmp_path):
    photos = write_shapes(tmp_path / "photos")
    pack(tmp_path / "set", photos, size=64, buckets=16, shard=5)
    shapes = Counter()
    for split in ("train", "heldout"):
        reader = ShardReader(tmp_path / "set" / split, "images")
        buckets = read_buckets(reader.manifest, "manifest.json")
        for bucket in buckets:
            for i in range(bucket.start, bucket.start + bucket.total):
                with Image.open(io.BytesIO(bytes(reader[i]["png"]))) as image:
                    assert image.size == (bucket.width, bucket.height)
                facts = json.loads(bytes(reader[i]["json"]))
                assert facts["target_size"] == [bucket.height, bucket.width]
                shapes[bucket.name, *facts["original_size"]] += 1
    assert shapes == {
        ("64x64", 64, 64): 12,
        ("80x48", 50, 100): 12,
        ("48x80", 100, 50): 12,
        ("80x48", 60, 90): 12,
    }


def test_both_splits_have_the_same_list_of_buckets(tmp_path):
    photos = write_shapes(tmp_path / "photos")
    pack(tmp_path / "set", photos, size=64, buckets=16)
    counts = Counter()
    names = []
    for split in ("train", "heldout"):
        manifest = json.loads((tmp_path / "set" / split / "manifest.json").read_text())
        names.append([(one["width"], one["height"]) for one in manifest["buckets"]])
        for one in manifest["buckets"]:
            counts[one["width"], one["height"]] += one["count"]
    assert names[0] == names[1]
    assert counts == {(48, 80): 12, (64, 64): 12, (80, 48): 24}


def test_the_histogram_is_printed_and_the_largest_loss_is_recorded(tmp_path, capsys):
    photos = write_shapes(tmp_path / "photos")
    pack(tmp_path / "set", photos, size=64, buckets=16)
    err = capsys.readouterr().err
    assert "80x48        24 ###" in err
    assert "16.67 %" in err
    manifest = json.loads((tmp_path / "set/train/manifest.json").read_text())
    assert manifest["largest_loss"] == 0.1667


def test_an_image_without_a_readable_header_is_reported_when_it_is_packed(tmp_path, capsys):
    photos = write_shapes(tmp_path / "photos")
    (photos / "001.png").write_bytes(b"\x89PNG no more")
    pack(tmp_path / "set", photos, size=64, buckets=16, minimum=8, tolerance=0.1)
    assert "skipped unreadable 001.png" in capsys.readouterr().err


def test_random_crops_differ_and_are_the_same_every_time(tmp_path):
    photos = write_shapes(tmp_path / "photos", 12, shapes=((120, 60),))
    for name in ("first", "second"):
        pack(tmp_path / name, photos, size=32, crop="random", holdout=0)
    facts = read_facts(tmp_path / "first/train")
    lefts = {one["crops_coords_top_left"][1] for one in facts}
    assert len(lefts) > 6
    assert lefts <= set(range(33))
    assert read_files(tmp_path / "first") == read_files(tmp_path / "second")


def test_padded_images_lie_on_the_background(tmp_path):
    photos = write_shapes(tmp_path / "photos", 4, shapes=((100, 50),))
    pack(tmp_path / "set", photos, size=64, crop="pad", background="#204060", holdout=0)
    pixels = Images(str(tmp_path / "set/train")).pixels(0)
    assert pixels[:, :16].reshape(3, -1).T.tolist() == [[0x20, 0x40, 0x60]] * (16 * 64)
    assert read_facts(tmp_path / "set/train")[0]["padding"] == [16, 0]


def test_each_training_image_is_packed_once_more_mirrored(tmp_path):
    photos = write_photos(tmp_path / "photos", 20)
    pack(tmp_path / "set", photos, size=16, flips=True, holdout=0.2, shard=7)
    train = Images(str(tmp_path / "set/train"))
    facts = read_facts(tmp_path / "set/train")
    assert (len(train), len(Images(str(tmp_path / "set/heldout")))) == (32, 4)
    for i in range(0, 32, 2):
        assert (train.pixels(i)[..., ::-1] == train.pixels(i + 1)).all()
        assert "flipped" not in facts[i]
        assert facts[i + 1]["flipped"] is True
    labels = train.read(np.arange(32)).condition
    assert labels[::2].tolist() == labels[1::2].tolist()


def test_small_images_are_left_out_and_counted(tmp_path, capsys):
    photos = write_shapes(tmp_path / "photos", 40)
    pack(tmp_path / "set", photos, size=16, minimum=55, holdout=0)
    line = "pack: 20 images; passed over: 20 smaller than 55 pixels\n"
    assert capsys.readouterr().err.endswith(line)
    manifest = json.loads((tmp_path / "set/train/manifest.json").read_text())
    assert (manifest["samples"], manifest["minimum"]) == (20, 55)


def test_a_minimum_above_all_images_is_refused(tmp_path):
    photos = write_shapes(tmp_path / "photos", 8)
    with refused("minimum", 65, 64, kind=ValueError):
        pack(tmp_path / "set", photos, size=16, minimum=65)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", "64x"),
        ("size", "0"),
        ("size", "64x96x3"),
        ("size", "-8"),
        ("minimum", "-1"),
        ("workers", "0"),
        ("workers", "-2"),
        ("buckets", "-16"),
        ("buckets", "60"),
        ("bucket_minimum", "5"),
        ("crop", "middle"),
        ("captions", "caption"),
        ("keep", "name"),
    ],
)
def test_an_impossible_option_is_one_line_before_anything_is_written(
    tmp_path, capfd, option, value
):
    words = ("pack", "--out", tmp_path / "set", f"--{option}={value}")
    assert_refused(capfd, words, option, value, alone=True)
    assert not (tmp_path / "set").exists()


def test_a_size_that_is_no_multiple_is_refused_with_both(tmp_path, capfd):
    words = ("pack", "--out", tmp_path / "set", "--size", "60", "--buckets", "16")
    assert_refused(capfd, words, "60", "16", "48 or 64", alone=True)


@pytest.mark.parametrize("names", ["captions", "a,,b", "a,a", "target_size"])
def test_columns_that_cannot_be_kept_are_refused(tmp_path, names):
    photos = write_shapes(tmp_path / "photos", 4)
    with refused("keep", names.split(",")[0], kind=ValueError):
        pack(tmp_path / "set", photos, keep=names)


def test_another_crop_in_the_same_folder_is_another_set(tmp_path):
    photos = write_shapes(tmp_path / "photos", 8)
    pack(tmp_path / "set", photos, size=16)
    with refused(tmp_path / "set", "crop", "random", kind=ValueError):
        pack(tmp_path / "set", photos, size=16, crop="random")


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, workers):
    photos = write_shapes(tmp_path / "photos")
    options = {"size": 64, "buckets": 16, "shard": 4, "crop": "random", "flips": True}
    pack(tmp_path / "one", photos, **options)
    pack(tmp_path / "several", photos, **options, workers=workers)
    assert read_files(tmp_path / "one") == read_files(tmp_path / "several")


def test_the_progress_of_workers_is_counted_image_by_image(tmp_path, capsys):
    photos = write_shapes(tmp_path / "photos", 30)
    pack(tmp_path / "set", photos, size=16, shard=4, workers=2)
    assert "pack: 30/30 images" in capsys.readouterr().err


def test_unreadable_images_of_all_workers_are_counted_together(tmp_path):
    photos = write_shapes(tmp_path / "photos", 40)
    for i in (1, 11, 21, 31):
        (photos / f"{i:03d}.png").write_bytes(b"no image")
    options = {"size": 16, "shard": 10, "holdout": 0, "workers": 2}
    with refused("unreadable", "5 %", kind=ValueError):
        pack(tmp_path / "set", photos, **options, tolerance=0.05)
    assert not (tmp_path / "set/train/manifest.json").exists()
    pack(tmp_path / "set", photos, **options, tolerance=0.1)
    assert len(Images(str(tmp_path / "set/train"))) == 36


def test_a_fault_of_the_machine_in_a_worker_is_raised(tmp_path):
    photos = write_shapes(tmp_path / "photos", 20)
    (photos / "013.png").unlink()
    (photos / "013.png").symlink_to("013.png")
    with refused("013.png", kind=OSError):
        pack(tmp_path / "set", photos, size=16, shard=5, workers=2)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Return a folder of images, and the files of the sets that one process makes of them."""
    folder = tmp_path_factory.mktemp("many")
    photos = write_shapes(folder / "photos", 120)
    pack(folder / "set", photos, size=96, shard=8)
    return photos, read_files(folder / "set")


def start_packing(photos, out, log):
    """Start `rectify pack --workers 2` in another process, and wait for its first shard."""

    def run():
        os.setpgid(0, 0)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        words = ("--out", out, "--images", photos, "--size", 96, "--shard", 8, "--workers", 2)
        sys.exit(main(["pack", *map(str, words)]))

    process = get_context("fork").Process(target=run)
    process.start()
    while not list(out.rglob("*.tar")):
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)
    return process


def find_children(process):
    """Return the ids of a process's children."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def is_running(process):
    """Whether a process has not ended."""
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_command_that_is_stopped_leaves_no_worker_and_goes_on_later(tmp_path, many, number, code):
    photos, expected = many
    process = start_packing(photos, tmp_path / "set", tmp_path / "log.txt")
    children = find_children(process.pid)
    assert len(children) == 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as the terminal does
    else:
        os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == code
    log = (tmp_path / "log.txt").read_text()
    assert "Traceback" not in log
    while any(map(is_running, children)):
        time.sleep(0.01)
    if number != signal.SIGKILL:
        assert not list(tmp_path.rglob(".*.tmp"))
    pack(tmp_path / "set", photos, size=96, shard=8, workers=2)
    assert read_files(tmp_path / "set") == expected


def test_a_worker_that_is_killed_is_one_line_and_the_others_end(tmp_path, many):
    photos, expected = many
    process = start_packing(photos, tmp_path / "set", tmp_path / "log.txt")
    killed, other = find_children(process.pid)
    os.kill(killed, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == 2
    errors = [
        line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith(PREFIX)
    ]
    assert len(errors) == 1
    assert str(killed) in errors[0]
    assert "SIGKILL" in errors[0]
    assert "--workers" in errors[0]
    assert not is_running(other)
    pack(tmp_path / "set", photos, size=96, shard=8)
    assert read_files(tmp_path / "set") == expected
