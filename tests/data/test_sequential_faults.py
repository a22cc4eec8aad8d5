"""Tars read from front to back that are broken, forged or no tars: skipped, counted and named."""

import io
import pickle
import re
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from webdataset import TarWriter

from data.batch import Request
from data.sequential import SequentialTars
from data.shards import array_to_npy
from tests.data.remote import latent, png, replace_ghostscript, write_tars
from tests.helpers.refusals import refused


def read_first_epoch(path, tolerance=0.01, **options):
    """Return the values of the samples in the first epoch of a single shard."""
    source = SequentialTars(str(path), tolerance=tolerance, **options)
    values = []
    for (x, _), (finished, *_) in source._samples(0, source.assign_readers(1), 0):
        values.append(int(x[0, 0, 0]))
        if finished:
            return sorted(values)


def replace_file(path, content):
    """Give a path a new file: an abandoned reader may still read ahead in the old one."""
    path.unlink()
    path.write_bytes(content)


def tar_member(path, number):
    with tarfile.open(path) as tar:
        return tar.getmembers()[number]


def overwrite(path, start, data):
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    replace_file(path, content)


def whole_numbers(message):
    """Return the whole numbers that stand after the tar's path, none of names or fractions."""
    text = message.partition(".tar")[2]
    return {int(number) for number in re.findall(r"(?<![\w.,])\d+(?!\w|[.,]\d)", text)}


@pytest.fixture
def shard(tmp_path):
    """A tar of 100 latents with classes; members 2 i and 2 i + 1 are the fields of sample i."""
    write_tars(tmp_path / "one", [100])
    return tmp_path / "one/shard-000.tar"


@pytest.fixture
def lossy_shard(shard):
    """The tar with two latents that are unreadable."""
    for number in (21, 41):
        overwrite(shard, tar_member(shard, number).offset_data, b"garbage")
    return shard


@pytest.fixture(params=["header", "data", "padding", "between"])
def truncated_shard(shard, request):
    """The tar that ends in or before a member of sample 75."""
    last = tar_member(shard, 150)
    ends = {
        "header": last.offset + 100,
        "data": last.offset_data + 1,
        "padding": last.offset_data + last.size + 1,
        "between": last.offset,
    }
    replace_file(shard, shard.read_bytes()[: ends[request.param]])
    return shard


def test_a_truncated_shard_loses_only_its_tail(truncated_shard, caplog):
    values = read_first_epoch(truncated_shard)
    assert values in (list(range(75)), list(range(76)))
    (message,) = caplog.messages
    assert "shard-000.tar" in message
    assert whole_numbers(message) == {len(values) + 1, 1}


def test_a_truncated_shard_is_refused_without_tolerance(truncated_shard):
    size = truncated_shard.stat().st_size
    with refused(truncated_shard, f"{size:,}", kind=ValueError) as error:
        read_first_epoch(truncated_shard, tolerance=0)
    numbers = whole_numbers(error.line)
    assert 1 in numbers
    assert numbers & {76, 77}


def test_one_percent_of_broken_samples_is_skipped_and_logged(shard, caplog):
    overwrite(shard, tar_member(shard, 21).offset_data, b"garbage")
    assert len(read_first_epoch(shard)) == 99
    (message,) = caplog.messages
    assert "shard-000.tar" in message
    assert whole_numbers(message) == {100, 1}


def test_more_broken_samples_than_the_tolerance_are_refused(lossy_shard):
    with refused(lossy_shard, ".npy", kind=ValueError) as error:
        read_first_epoch(lossy_shard)
    assert {2, 100} <= whole_numbers(error.line)
    assert re.search(r"\b0_0(10|20)\b", error.line), "it names the sample"


def test_a_higher_tolerance_skips_more_broken_samples(lossy_shard):
    assert len(read_first_epoch(lossy_shard, tolerance=0.02)) == 98


def test_samples_skipped_before_a_restart_still_count(lossy_shard):
    # Resume after the first broken sample.
    source = SequentialTars(str(lossy_shard))
    samples = source._samples(0, source.assign_readers(1), 0)
    progress = next(progress for _, progress in samples if progress[2])
    source.resume(source.state(replace(source.assign_readers(1), progress=(progress,))))

    samples = source._samples(0, source.assign_readers(1), 0)
    with refused(lossy_shard, kind=ValueError) as error:
        for _ in range(100):
            next(samples)
    assert {2, 100} <= whole_numbers(error.line)


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(shard):
    overwrite(shard, tar_member(shard, 100).offset + 150, b"\xff\xff\xff")
    size = shard.stat().st_size
    with refused(shard, f"{size:,}", kind=ValueError) as error:
        read_first_epoch(shard)
    numbers = whole_numbers(error.line)
    assert any(10 <= lost < 100 for lost in numbers)
    assert any(100 <= total < 200 for total in numbers)


def test_a_forged_size_is_no_endless_loop(shard):
    header = tar_member(shard, 100)
    raw = bytearray(shard.read_bytes()[header.offset : header.offset + 512])
    raw[124:136] = b"\xff" * 10 + (-2048 & 0xFFFF).to_bytes(2, "big")  # leads back
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    overwrite(shard, header.offset, bytes(raw))
    size = shard.stat().st_size
    with refused(shard, f"{size:,}", kind=ValueError):
        read_first_epoch(shard)


GARBAGE = {
    "empty": b"",
    "html": b"<html>not found</html>",
    "zeros": b"\0" * 10240,
    "gzip": b"\x1f\x8b" + b"x" * 3000,
    "text": b"x" * 100_000,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_file_that_is_no_tar_is_named(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with refused(tmp_path / "x.tar", kind=ValueError):
        read_first_epoch(tmp_path / "x.tar", tolerance=0.9)


def test_a_shard_of_nothing_but_broken_samples_is_an_error(tmp_path):
    write_tars(tmp_path / "one", [5])
    path = tmp_path / "one/shard-000.tar"
    for number in range(5):
        overwrite(path, tar_member(path, 2 * number + 1).offset_data, b"garbage")
    with refused(path, kind=ValueError) as error:
        read_first_epoch(path, tolerance=0.99)
    assert 5 in whole_numbers(error.line)


class Bomb:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def bomb(tmp_path):
    """A pickle that writes TMP_PATH/ran."""
    return pickle.dumps(Bomb(str(tmp_path / "ran")))


def test_pickled_members_are_ignored(tmp_path, bomb):
    extra = dict.fromkeys(("pyd", "pickle", "pth", "pkl", "pt", "x.npy"), bomb)
    (path,) = write_tars(tmp_path / "one", [9], extra)
    assert len(read_first_epoch(path)) == 9
    assert not (tmp_path / "ran").exists()


def write_three(path, field, good, bad):
    """Write a tar of three samples with one field; the second one is bad."""
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate([good, bad, good]):
            info = tarfile.TarInfo(f"{i}.{field}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_an_array_of_objects_is_unreadable_and_not_unpickled(tmp_path, bomb):
    objects = array_to_npy(latent(0, 0)).replace(b"'<f4'", b"'|O' ") + bomb
    path = write_three(tmp_path / "npy.tar", "npy", array_to_npy(latent(0, 1)), objects)
    assert len(read_first_epoch(path)) == 2
    assert not (tmp_path / "ran").exists()


def test_postscript_named_like_a_jpeg_is_unreadable_and_not_run(tmp_path, monkeypatch):
    replace_ghostscript(tmp_path, monkeypatch)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n%%EOF\n"
    path = write_three(tmp_path / "jpg.tar", "jpg", png(9), postscript)
    assert len(read_first_epoch(path)) == 2
    assert not (tmp_path / "ran").exists()


def write_members(folder, members):
    """Write x.tar with a sample of class 1 for each (field, bytes); return its path."""
    with TarWriter(str(folder / "x.tar"), encoder=False) as writer:
        for i, (field, data) in enumerate(members):
            writer.write({"__key__": str(i), field: data, "json": b"{}", "cls": b"1"})
    return str(folder / "x.tar")


@pytest.fixture
def three_sizes(tmp_path):
    """A tar of three images: PNG, JPEG and WebP, each of another size."""
    members = [("png", png(255)), ("JPG", png(0, 16, "JPEG")), ("webp", png(0, 9, "WEBP"))]
    return write_members(tmp_path, members)


def first_batch(source):
    return next(source.read_batches(0, 0, 1, iter([Request(0, 0, 3, 3)])))


def test_images_are_scaled_to_one_size(three_sizes):
    batch = first_batch(SequentialTars(three_sizes, size=8))
    assert batch.x.shape == (3, 3, 8, 8)
    assert batch.x.dtype == torch.float32
    assert sorted(batch.x.mean((1, 2, 3)).tolist()) == [-1, -1, 1]
    assert not batch.latent
    assert batch.condition is None


def test_grey_images_have_one_channel(three_sizes):
    source = SequentialTars(three_sizes, size=8, grey=True, classes=2)
    assert source.manifest == {"kind": "images", "classes": ["0", "1"]}
    assert source.sample().x.shape == (1, 1, 8, 8)


def test_images_of_several_sizes_are_refused_unless_scaled(three_sizes):
    with refused(three_sizes, "data.source.size", kind=ValueError) as error:
        first_batch(SequentialTars(three_sizes))
    shapes = re.findall(r"\(3, \d+, \d+\)", error.line)
    assert len(set(shapes)) == 2, "it names both shapes"


def test_a_class_beyond_the_number_of_classes_is_refused(three_sizes):
    with refused(three_sizes, "data.source.classes", kind=ValueError) as error:
        SequentialTars(three_sizes, size=8, classes=1).sample()
    assert 1 in whole_numbers(error.line)


def test_a_sample_without_a_class_is_refused_where_classes_are_wanted(tmp_path):
    path = tmp_path / "x.tar"
    with TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": "lonely", "png": png(1)})
    with refused(path, "lonely", ".cls", "data.source.classes", 0, kind=ValueError):
        SequentialTars(str(path), classes=2).sample()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"urls": []}, ("urls",)),
        ({"urls": "x.tar", "tolerance": 1.0}, ("tolerance", 1.0)),
        ({"urls": "x.tar", "block": 0}, ("block", 0)),
        ({"urls": ["x.tar", "pipe:touch ran"]}, ("pipe:touch ran", "allow_pipe")),
        ({"urls": "ssh://x/{0..3}.tar"}, ("ssh://x/0.tar", "https")),
    ],
    ids=["no urls", "tolerance of all", "empty block", "pipe", "unknown scheme"],
)
def test_invalid_options_are_refused_before_anything_is_read(options, named):
    with refused(*named, kind=ValueError):
        SequentialTars(**options)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(4, np.float32),
        np.zeros((1, 2, 2), np.int64),
        np.full((1, 2, 2), np.nan, np.float32),
    ],
    ids=["one axis", "integers", "not a number"],
)
def test_an_array_that_is_no_latent_is_unreadable(tmp_path, array):
    path = write_members(tmp_path, [("npy", array_to_npy(array))])
    with refused(path, kind=ValueError) as error:
        SequentialTars(path).sample()
    assert 1 in whole_numbers(error.line)
