"""Tars read from front to back that are broken, forged or none: what is skipped, counted and named."""

import io
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from webdataset import TarWriter

from data.shards import encode_array
from data.streamed import Streamed
from tests.data.remote import latent, png, spied, tars


def first_tar(path, tolerance=0.01, **options):
    """Return the values of a single shard's epoch."""
    one = Streamed(str(path), tolerance=tolerance, **options)
    samples = one._samples(0, one.lanes(1), 0)
    values = []
    for (x, _), (finished, *_) in samples:
        values.append(int(x[0, 0, 0]))
        if finished:
            return sorted(values)


def rewritten(path, content):
    """A file of its own: a walk that was left may still be reading ahead in the old one."""
    path.unlink()
    path.write_bytes(content)
    return path


def cut(path, keep):
    return rewritten(path, path.read_bytes()[:keep])


def member(path, number):
    with tarfile.open(path) as tar:
        return tar.getmembers()[number]


def spoil(path, place, data):
    content = bytearray(path.read_bytes())
    content[place : place + len(data)] = data
    rewritten(path, content)


@pytest.fixture
def shard(tmp_path):
    tars(tmp_path / "one", [100])
    return tmp_path / "one/shard-000.tar"


@pytest.mark.parametrize("cut_at", ["header", "data", "padding", "between"])
def test_a_truncated_shard_loses_its_tail(shard, cut_at, caplog):
    last = member(shard, 150)  # the .cls or .npy of sample 75
    places = {"header": last.offset + 100, "data": last.offset_data + 1, "padding": last.offset_data + last.size + 1}
    cut(shard, places.get(cut_at, last.offset))
    assert first_tar(shard) in (list(range(75)), list(range(76)))
    assert "shard-000.tar: 7" in caplog.text and "1 of them skipped" in caplog.text
    with pytest.raises(ValueError, match=r"shard-000.tar: 1 of its 7\d samples are unreadable \(the tar breaks off at byte"):
        first_tar(shard, tolerance=0)


def test_one_broken_sample_is_skipped_and_two_percent_are_not(shard, caplog):
    spoil(shard, member(shard, 21).offset_data, b"garbage")  # an .npy
    assert len(first_tar(shard)) == 99
    assert "shard-000.tar: 100 samples, 1 of them skipped" in caplog.text
    spoil(shard, member(shard, 41).offset_data, b"garbage")
    with pytest.raises(ValueError, match=r"shard-000.tar: 2 of its 100 samples are unreadable \(0_0\d+: not an .npy array"):
        first_tar(shard)
    assert len(first_tar(shard, tolerance=0.02)) == 98


def test_what_was_skipped_before_a_restart_still_counts(shard):
    for number in (21, 41):
        spoil(shard, member(shard, number).offset_data, b"garbage")
    one = Streamed(str(shard))
    samples = one._samples(0, one.lanes(1), 0)
    row = next(row for _, row in samples if row[2])
    one.resume(one.state(replace(one.lanes(1), rows=(row,))))
    with pytest.raises(ValueError, match="2 of its 100"):
        list(zip(range(100), one._samples(0, one.lanes(1), 0)))


def test_a_broken_header_in_the_middle_is_no_end(shard):
    spoil(shard, member(shard, 100).offset + 150, b"\xff\xff\xff")
    with pytest.raises(ValueError, match=r"shard-000.tar: \d\d of its 1\d\d samples are unreadable \(the tar breaks off"):
        first_tar(shard)


def test_a_forged_size_is_no_endless_loop(shard):
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[100]
    raw = bytearray(shard.read_bytes()[header.offset : header.offset + 512])
    raw[124:136] = b"\xff" * 10 + (-2048 & 0xFFFF).to_bytes(2, "big")  # leads back
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    spoil(shard, header.offset, bytes(raw))
    with pytest.raises(ValueError, match="the tar breaks off"):
        first_tar(shard)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\0" * 10240, b"\x1f\x8b" + b"x" * 3000, b"x" * 100_000])
def test_garbage_is_named(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.tar: (empty|no whole sample)"):
        first_tar(tmp_path / "x.tar", tolerance=0.9)


def test_a_shard_of_nothing_but_broken_samples_is_an_error(tmp_path):
    tars(tmp_path / "one", [5])
    path = tmp_path / "one/shard-000.tar"
    for number in range(5):
        spoil(path, member(path, 2 * number + 1).offset_data, b"garbage")
    with pytest.raises(ValueError, match="5 of its 5 samples are unreadable"):
        first_tar(path, tolerance=0.99)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_unpickled_and_nothing_runs(tmp_path, monkeypatch):
    """Pickles, object arrays and PostScript in the guise of a JPEG are foreign members, or unreadable ones."""
    spied(tmp_path, monkeypatch)
    bomb = pickle.dumps(Bomb(str(tmp_path / "ran")))
    extra = dict.fromkeys(("pyd", "pickle", "pth", "pkl", "pt", "x.npy"), bomb)
    assert len(first_tar(tars(tmp_path / "one", [9], extra)[0])) == 9
    objects = encode_array(latent(0, 0)).replace(b"'<f4'", b"'|O' ") + bomb
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n%%EOF\n"
    for name, good, bad in (("npy", encode_array(latent(0, 1)), objects), ("jpg", png(9), postscript)):
        path = tmp_path / f"{name}.tar"
        with tarfile.open(path, "w") as tar:
            for i, data in enumerate([good, bad, good]):
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert len(first_tar(path)) == 2
    assert not (tmp_path / "ran").exists()


def images(folder, members):
    with TarWriter(str(folder / "x.tar"), encoder=False) as writer:
        for i, (field, data) in enumerate(members):
            writer.write({"__key__": str(i), field: data, "json": b"{}", "cls": b"1"})
    return str(folder / "x.tar")


def test_images_are_scaled_to_one_size_or_must_be_of_one(tmp_path):
    url = images(tmp_path, [("png", png(255)), ("JPG", png(0, 16, "JPEG")), ("webp", png(0, 9, "WEBP"))])
    batch = next(Streamed(url, size=8).walk(0, 0, 1, iter([(0, 3)])))
    assert batch.x.shape == (3, 3, 8, 8) and sorted(batch.x.mean((1, 2, 3)).tolist()) == [-1, -1, 1]
    assert not batch.latent and batch.condition is None and batch.x.dtype == torch.float32
    grey = Streamed(url, size=8, grey=True, classes=2)
    assert grey.manifest == {"kind": "images", "classes": ["0", "1"]} and grey.sample().x.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"x.tar: \d is \(3, \d+, \d+\), others are \(3, \d+, \d+\); data.source.size"):
        next(Streamed(url).walk(0, 0, 1, iter([(0, 3)])))
    with pytest.raises(ValueError, match=r"x.tar: \d is of class 1, data.source.classes is 1"):
        Streamed(url, size=8, classes=1).sample()


def test_samples_without_the_classes_asked_for(tmp_path):
    path = tmp_path / "x.tar"
    with TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": "a", "png": png(1)})
    with pytest.raises(ValueError, match="a: no .cls; set data.source.classes to 0"):
        Streamed(str(path), classes=2).sample()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "urls is empty"),
        ({"urls": "x.tar", "tolerance": 1.0}, "tolerance"),
        ({"urls": "x.tar", "block": 0}, "block"),
        ({"urls": ["x.tar", "pipe:touch ran"]}, "pipe: runs a shell command, which is refused"),
        ({"urls": "ssh://x/{0..3}.tar"}, "neither a path"),
    ],
)
def test_refused_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        Streamed(**options)


def test_latents_that_are_none(tmp_path):
    for array in (np.zeros(4, np.float32), np.zeros((1, 2, 2), np.int64), np.full((1, 2, 2), np.nan, np.float32)):
        with pytest.raises(ValueError, match="1 of its 1 samples are unreadable"):
            Streamed(images(tmp_path, [("npy", encode_array(array))])).sample()
