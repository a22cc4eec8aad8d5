"""Tars read from front to back: dealt out, resumed, and as far as they are whole."""

import io
import os
import pickle
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin
from torch.utils.data import DataLoader
from webdataset import TarWriter

from data.batch import Steps
from data.lanes import restored
from data.noise import permutation
from data.shards import encode_array
from data.stream import Taken
from data.streamed import Streamed
from tests.data.remote import latent, png, served, tars

COUNTS = [7, 5, 9, 8, 6, 7, 4]  # 46 samples
BATCH = 8


class Run:
    """Training that only reads: what all ranks saw, and the state that a checkpoint would keep."""

    def __init__(self, source, world=1, workers=0, parts=1, first=0, state=None):
        self.source, self.world, self.workers, self.parts, self.step = source, world, workers, parts, first
        self.seen = []
        if state:
            source.resume(state)
        rows = source.lanes(world * max(1, workers)).rows
        self.taken = [Taken(dict(list(enumerate(rows))[rank::world])) for rank in range(world)]
        steps = [Steps(source, BATCH, 5, first, rank, world, parts) for rank in range(world)]
        self.loaders = [iter(DataLoader(one, batch_size=None, num_workers=workers)) for one in steps]

    def go(self, steps, torn=0):
        """Take a number of steps, then `torn` batches of an unfinished one."""
        for _ in range(steps):
            for part in range(self.parts):
                for rank in range(self.world):
                    batch = self._next(rank)
                    assert (batch.seed, batch.step, batch.size) == (5, self.step, BATCH)
                    assert batch.start == (part * self.world + rank) * BATCH // self.world // self.parts
                    assert torch.equal(batch.condition, (batch.x[:, 0, 0, 0] % 100 % 3).long())
                    self.seen += batch.x[:, 0, 0, 0].int().tolist()
            self.step += 1
        for _ in range(torn):
            self._next(0)
        return self

    def _next(self, rank):
        batch = next(self.loaders[rank])
        self.taken[rank].note(batch)
        return batch

    def state(self):
        rows = [taken.rows(self.step) for taken in self.taken]
        dealt = tuple(rows[rank][worker] for worker in range(max(1, self.workers)) for rank in range(self.world))
        return self.source.state(replace(self.source.lanes(len(dealt)), rows=dealt))


@pytest.fixture
def urls(tmp_path):
    return tars(tmp_path / "tars", COUNTS)


def source(urls, **options):
    return Streamed(urls, classes=3, **options)


EVERY = sorted(number * 100 + i for number, count in enumerate(COUNTS) for i in range(count))


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2), (3, 4)])
@pytest.mark.parametrize("block", [1, 2])
def test_every_shard_once_an_epoch(urls, world, workers, block):
    """Over all lanes; twelve of them are more than there are shards, and nobody waits for one."""
    epochs, lanes, tickets = Counter(), world * max(1, workers), 3 * len(COUNTS)
    one = source(urls, block=block)
    begin = one.lanes(lanes)
    for lane in range(lanes):
        for number in range(tickets):
            mine = [ticket for ticket in begin.tickets(lane, number) if ticket < tickets]
            for ticket, tar in zip(mine, one._open(5, mine)):
                epochs[ticket // len(COUNTS), tar.url] += 1
    assert epochs == {(epoch, url): 1 for epoch in range(3) for url in urls}


@pytest.mark.parametrize("block", [1, 3])
def test_one_lane_sees_every_sample_once_an_epoch_in_another_order(urls, block):
    seen = Run(source(urls, block=block)).go(12).seen
    assert sorted(seen[:46]) == EVERY or block == 3
    assert seen[:46] != EVERY and seen[46:92] != seen[:46]
    assert Run(source(urls, block=block)).go(12).seen == seen


@pytest.mark.parametrize(("world", "workers", "parts"), [(1, 0, 1), (2, 0, 1), (1, 2, 1), (1, 3, 2), (2, 2, 2)])
@pytest.mark.parametrize("steps", [1, 4, 11])
def test_resumed_on_as_many_lanes_goes_on_exactly(urls, world, workers, parts, steps):
    whole = Run(source(urls, block=2), world, workers, parts).go(steps + 6).seen
    torn = 1 if parts > 1 else 0  # stopped in the middle of a step, which is done again
    first = Run(source(urls, block=2), world, workers, parts).go(steps, torn)
    second = Run(source(urls, block=2), world, workers, parts, steps, first.state()).go(6)
    assert first.seen + second.seen == whole


def done(state):
    """Return the numbers of the shards of epoch 0 that a state counts as finished."""
    lanes = restored(state).dealt(99, 1)
    order = permutation(len(COUNTS), 5, 0, 0)
    return {int(order[ticket]) for ticket in range(len(COUNTS)) if ticket < lanes.low or ticket in lanes.ahead}


def test_resumed_on_another_number_of_lanes_begins_unfinished_shards_anew(urls):
    first = Run(source(urls), 2, 2).go(2)
    second = Run(source(urls), 1, 0, first=2, state=first.state()).go(1)
    third = Run(source(urls), 4, 1, first=3, state=second.state()).go(3)
    assert done(first.state()) < done(second.state()) < done(third.state())
    for earlier, later in ((first, second), (second, third)):
        finished, more = done(earlier.state()), later.seen[: 46 - sum(COUNTS[number] for number in done(earlier.state()))]
        assert finished.isdisjoint(value // 100 for value in more), "no finished shard is read again in its epoch"
    fourth = Run(source(urls), 2, 0, first=6, state=third.state())
    while len(done(fourth.state())) < len(COUNTS):
        fourth.go(1)
    assert set(first.seen + second.seen + third.seen + fourth.seen) == set(EVERY), "none is lost"


def test_a_state_of_other_shards_is_refused(urls):
    state = Run(source(urls)).go(2).state()
    source([url.replace("/tars/", "/elsewhere/") for url in urls]).resume(state)
    with pytest.raises(ValueError, match=r"data.source.urls: .*7 then, 6 now"):
        source(urls[:-1]).resume(state)
    with pytest.raises(ValueError, match="in another order"):
        source(urls[::-1]).resume(state)


def test_patterns_and_urls(tmp_path, urls):
    with served(tmp_path / "tars") as server:
        pattern = server.url + "/shard-{000..006}.tar"
        remote = Streamed(pattern, classes=3, cache=str(tmp_path / "cache"))
        assert Run(remote, 1, 2).go(8).seen == Run(source(urls), 1, 2).go(8).seen
        assert max(Counter(server.asked).values()) == 1 and len(remote.urls) == 7
        pickle.loads(pickle.dumps(remote)).sample()
        missing = Streamed(server.url + "/shard-{006..007}.tar", classes=3, cache=str(tmp_path / "cache"))
        with pytest.raises(OSError, match="shard-007.tar: no such file"):
            Run(missing).go(4)


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
    spy = tmp_path / "bin/gs"
    spy.parent.mkdir()
    spy.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
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


def test_allowed_pipes_are_read(tmp_path, urls):
    pipes = [f"pipe:cat {url}" for url in urls]
    piped = source(pipes, allow_pipe=True, cache=str(tmp_path / "cache"))
    assert sorted(Run(piped).go(6).seen[:46]) == EVERY


def test_latents_that_are_none(tmp_path):
    for array in (np.zeros(4, np.float32), np.zeros((1, 2, 2), np.int64), np.full((1, 2, 2), np.nan, np.float32)):
        with pytest.raises(ValueError, match="1 of its 1 samples are unreadable"):
            Streamed(images(tmp_path, [("npy", encode_array(array))])).sample()
