"""Tars of other programs: every sample is read, or counted and named; both readers agree."""

import gzip
import io
import tarfile
from typing import Any, NamedTuple

import numpy as np
import pytest

from data.images import Images
from data.index import index
from data.latents import Latents
from data.sequential import SequentialTars
from data.shards import ShardReader, array_to_npy
from tests.data.remote import png
from tests.helpers.refusals import refused

LONG = "folder/" * 20  # 140 characters
EMPTY_TAR = b"\0" * tarfile.RECORDSIZE


class Layout(NamedTuple):
    """Tars, and what must be read of them."""

    shards: list[bytes]
    samples: list[tuple[float, int]] = []  # value and class, by value; 0 without classes
    lost: str = ""  # names the one sample that is left out
    named: tuple[object, ...] = ()  # if the tars are refused: what the message names
    options: dict[str, Any] = {}
    classes: int = 3


def member(name, data=b"", **changes):
    """Return a member of a tar: its header and content."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, data


def link(name, target, kind=tarfile.LNKTYPE):
    return member(name, type=kind, linkname=target)


def tar(*members, kind=tarfile.GNU_FORMAT, **options):
    """Return the bytes of a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, **options) as file:
        for info, data in members:
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def sample(key, value, label=None, image="png", cls="cls", text=None):
    """Return the members of one sample: an image of one grey value, and its class."""
    members = [member(f"{key}.{image}", png(value))]
    if label is not None:
        members.append(member(f"{key}.{cls}", text or str(label).encode()))
    return members


def latent(key, value, label=None, dtype=np.float32, shape=(1, 2, 2)):
    """Return the members of a latent, half of whose numbers are `value`, and half -1."""
    array = np.full(shape, value, dtype)
    array.reshape(-1)[::2] = 0 if array.dtype.kind == "u" else -1
    members = [member(f"{key}.npy", array_to_npy(array))]
    if label is not None:
        members.append(member(f"{key}.cls", str(label).encode()))
    return members


def three(prefix="", **changes):
    """Return the members of samples of the values 10, 20, 30 and the classes 0, 1, 2."""
    members = []
    for i in range(3):
        members += sample(f"{prefix}s{i}", 10 * (i + 1), i, **changes)
    return members


ALL = [(10, 0), (20, 1), (30, 2)]
UNLABELLED = [(10, 0), (20, 0), (30, 0)]
FOUR = [*ALL, (40, 0)]
DOTTED = [part for i in range(3) for part in sample(f"s.v{i}", 10, i)]
MASKED = [
    part for i in range(3) for part in (*three()[2 * i : 2 * i + 2], member(f"s{i}.jpg", b"x"))
]

# Names, formats and the order of members.
NAMED = {
    "plain": Layout([tar(*three())], ALL),
    "no classes": Layout(
        [tar(*(m for m in three() if "cls" not in m[0].name))], UNLABELLED, classes=0
    ),
    "classes first": Layout([tar(*reversed(three()))], ALL),
    "all images before all classes": Layout([tar(*three()[::2], *three()[1::2])], ALL),
    "USTAR": Layout([tar(*three(), kind=tarfile.USTAR_FORMAT)], ALL),
    "PAX": Layout([tar(*three(), kind=tarfile.PAX_FORMAT)], ALL),
    "long USTAR names": Layout([tar(*three(LONG), kind=tarfile.USTAR_FORMAT)], ALL),
    "long GNU names": Layout([tar(*three(LONG))], ALL),
    "long PAX names": Layout([tar(*three(LONG), kind=tarfile.PAX_FORMAT)], ALL),
    "PAX names in other letters": Layout(
        [tar(*three("Ärger/日本/"), kind=tarfile.PAX_FORMAT)], ALL
    ),
    "a global PAX header": Layout(
        [tar(*three(), kind=tarfile.PAX_FORMAT, pax_headers={"comment": "x"})], ALL
    ),
    "folders with dots": Layout([tar(*three("a/b.c/d.e/"))], ALL),
    "names that begin with ./": Layout([tar(*three("./x/"))], ALL),
    "folders as members": Layout([tar(member("x.d", type=tarfile.DIRTYPE), *three("x.d/"))], ALL),
    "upper-case fields": Layout([tar(*three(image="PNG", cls="CLS"))], ALL),
    "several kinds of image": Layout(
        [tar(*three()[:2], *sample("b", 20, 1, image="JPG"), *sample("c", 30, 2, image="webp"))],
        ALL,
    ),
    "a class with a newline": Layout([tar(*three()[:4], *sample("s2", 30, 2, text=b"2\n"))], ALL),
    "a class between blanks": Layout(
        [tar(*three()[:4], *sample("s2", 30, 2, text=b" 2\r\n"))], ALL
    ),
    "other fields in every sample": Layout(
        [tar(*three(), *(member(f"s{i}.json", b"{}") for i in range(3)))], ALL
    ),
    "another field in one sample": Layout([tar(*three(), member("s1.txt", b"a cat"))], ALL),
    "hidden files": Layout(
        [tar(member("._s0.png", b"x"), member(".DS_Store", b"x"), *three())], ALL
    ),
    "a file without suffix": Layout([tar(*three(), member("README", b"x"))], ALL),
}

# Links, and keys that stand twice.
LINKED = {
    "a hard link to an image": Layout(
        [tar(*three(), link("t.png", "s0.png"), member("t.cls", b"2"))],
        [(10, 0), (10, 2), *ALL[1:]],
    ),
    "a hard link to a class": Layout(
        [tar(*three(), member("t.png", png(40)), link("t.cls", "s0.cls"))], FOUR
    ),
    "a sample of hard links": Layout(
        [tar(*three(), link("t.png", "s1.png"), link("t.cls", "s1.cls"))],
        [(10, 0), (20, 1), (20, 1), (30, 2)],
    ),
    "a symbolic link": Layout(
        [tar(*three("x/"), link("x/t.png", "s0.png", tarfile.SYMTYPE), member("x/t.cls", b"2"))],
        [(10, 0), (10, 2), *ALL[1:]],
    ),
    "links by other names of a path": Layout(
        [
            tar(
                *three("x/"),
                link("y/t.png", "../x/./s0.png", tarfile.SYMTYPE),
                link("y/t.cls", "./x/s2.cls"),
            )
        ],
        [(10, 0), (10, 2), *ALL[1:]],
    ),
    "a link to nothing": Layout(
        [tar(*three(), link("t.png", "u.png"), member("t.cls", b"2"))], ALL, lost="t"
    ),
    "a pipe": Layout([tar(*three(), member("t.png", type=tarfile.FIFOTYPE))], ALL, lost="t"),
    "a key again": Layout([tar(*three(), *sample("s0", 40, 0))], FOUR),
    "a key twice in a row": Layout([tar(*sample("s2", 40, 0), *reversed(three()))], FOUR),
    "a key in two cases of its field": Layout(
        [tar(*three(), *sample("s0", 40, 0, image="PNG"))], FOUR
    ),
}

# Names with dots, and several images of one key.
AMBIGUOUS = {
    "one name with a dot": Layout([tar(*three(), *sample("t.v2", 40, 0))], ALL, lost="t"),
    "names with dots": Layout([tar(*three(), *DOTTED)], named=("v0.png",)),
    "only names with dots": Layout([tar(*DOTTED)], named=("v0.png",)),
    "a mask in every sample": Layout(
        [tar(*three(), *(member(f"s{i}.seg.png", png(99)) for i in range(3)))], ALL
    ),
    "a mask in some samples": Layout(
        [tar(*three(), *(member(f"s{i}.seg.png", png(99)) for i in range(2)))],
        ALL,
    ),
    "a mask in some samples, and a field": Layout(
        [tar(*three(), *(member(f"s{i}.seg.png", png(99)) for i in range(2)))],
        ALL,
        options={"field": "png"},
    ),
    "a field with a dot": Layout(
        [tar(*three(image="rgb.png"), *(member(f"s{i}.depth.png", b"x") for i in range(3)))],
        ALL,
        options={"field": "rgb.png"},
    ),
    "two images of a key": Layout([tar(*MASKED)], named=("s0", "png", "jpg", "field")),
    "two images of a key, and a field": Layout([tar(*MASKED)], ALL, options={"field": "png"}),
}

# Samples that lack something.
INCOMPLETE = {
    "an image in the next tar": Layout(
        [tar(*three(), member("t.cls", b"0")), tar(*sample("t", 40), *sample("u", 50, 0))],
        named=("shard-1.tar", "t", ".cls"),
    ),
    "an image in the next tar, without classes": Layout(
        [tar(*three(), member("t.json", b"{}")), tar(*sample("u", 40, 0))], FOUR, lost="t"
    ),
    "an empty first tar": Layout([EMPTY_TAR, tar(*three())], ALL),
    "an empty last tar": Layout([tar(*three()), EMPTY_TAR], ALL),
    "an empty tar between": Layout([tar(*three()), EMPTY_TAR, tar(*sample("t", 40, 0))], FOUR),
    "only empty tars": Layout([EMPTY_TAR, EMPTY_TAR], named=("no samples",)),
    "an unlabelled first tar": Layout(
        [tar(*sample("t", 40)), tar(*three())], named=("shard-0.tar", ".cls")
    ),
    "an unlabelled last tar": Layout(
        [tar(*three()), tar(*sample("t", 40))], named=("shard-1.tar", ".cls")
    ),
    "classes that are not read": Layout(
        [tar(*three()), tar(*sample("t", 40))], [*UNLABELLED, (40, 0)], classes=0
    ),
    "one sample without a class": Layout([tar(*three(), *sample("t", 40))], named=("t", ".cls")),
    "one sample without an image": Layout([tar(*three(), member("t.cls", b"1"))], ALL, lost="t"),
    "two samples without an image": Layout(
        [tar(*three(), member("t.cls", b"1"), member("u.cls", b"1"))], named=("t", "png")
    ),
    "an empty image": Layout(
        [tar(*three(), member("t.png"), member("t.cls", b"1"))], ALL, lost="t"
    ),
    "a truncated image": Layout(
        [tar(*three(), member("t.png", png(40)[:40]), member("t.cls", b"1"))], ALL, lost="t"
    ),
    "two images that are none": Layout(
        [tar(*three(), member("t.jpg", b"x"), member("u.jpg", b"x"))],
        named=("t", "not an image"),
        classes=0,
    ),
    "two images that are none, and a tolerance": Layout(
        [tar(*three(), *(member(f"{key}.{end}", b"1") for key in "tu" for end in ("jpg", "cls")))],
        ALL,
        lost="t",
        options={"tolerance": 0.4},
    ),
    "an image of another size": Layout(
        [tar(*three(), member("t.png", png(40, 9)), member("t.cls", b"1"))], named=("t", "9")
    ),
    "images of another size in another tar": Layout(
        [tar(*three()), tar(member("t.png", png(40, 9)), member("t.cls", b"1"))], named=("9",)
    ),
    "classes that are fractions": Layout(
        [tar(*sample("t", 40, "1.0"), *sample("u", 50, "2.0"))], named=("t", "1.0", "`classes` 0")
    ),
    "a class that is a word": Layout([tar(*three(), *sample("t", 40, "cat"))], ALL, lost="t"),
    "classes that are words": Layout(
        [tar(*sample("t", 40, "cat"), *sample("u", 50, "cat"))], named=("t", ".cls", "cat")
    ),
    "a class that is an id": Layout(
        [tar(*three(), *sample("t", 40, 987654321))], named=(987654321,)
    ),
    "a compressed tar": Layout([gzip.compress(tar(*three()))], named=("shard-0.tar", "gzip")),
    "joined tars": Layout([tar(*three()) + tar(*sample("t", 40, 0))], named=("shard-0.tar", "cat")),
}

# Latents.
THREE_LATENTS = [part for i in range(3) for part in latent(f"s{i}", i + 1, i)]
LATENTS = {
    "latents": Layout([tar(*THREE_LATENTS)], [(1, 0), (2, 1), (3, 2)]),
    "latents that are bytes": Layout(
        [tar(*latent("a", 1, 0, np.uint8), *latent("b", 1, 0, np.uint8))], named=("a", "u1")
    ),
    "complex latents": Layout(
        [tar(*latent("a", 1, 0, np.complex64), *latent("b", 1, 0, np.complex64))], named=("a", "c8")
    ),
    "latents of bfloat16's bits": Layout(
        [tar(*latent("a", 1, 0, np.uint16), *latent("b", 1, 0, np.uint16))], named=("a", "bfloat16")
    ),
    "a latent that is not a number": Layout(
        [tar(*THREE_LATENTS, *latent("t", np.nan, 0))], [(1, 0), (2, 1), (3, 2)], lost="t"
    ),
    "latents that are not scaled": Layout(
        [tar(*latent("a", 9, 0), *latent("b", 10, 1))], named=("standard deviation", "scale")
    ),
    "latents with a scale": Layout(
        [tar(*latent("a", 16, 0), *latent("b", 32, 1))],
        [(4, 0), (8, 1)],
        options={"scale": 0.25},
    ),
    "latents that are read as they are": Layout(
        [tar(*latent("a", 16, 0), *latent("b", 32, 1))], [(16, 0), (32, 1)], options={"scale": 1.0}
    ),
    "latents of two shapes": Layout(
        [tar(*latent("a", 1, 0), *latent("b", 2, 1, shape=(1, 4, 4)))], named=("b", "(1, 4, 4)")
    ),
    "latents of two types": Layout(
        [tar(*latent("a", 1, 0), *latent("b", 2, 1, np.float64))], named=("b", "float64", "float32")
    ),
    "latents of two types in two tars": Layout(
        [tar(*latent("a", 1, 0)), tar(*latent("b", 2, 1, np.float16))],
        named=("float16", "float32"),
    ),
    "latents that are cut": Layout(
        [
            tar(
                *THREE_LATENTS,
                member("t.npy", array_to_npy(np.ones((1, 2, 2), "f4"))[:-4]),
                member("t.cls", b"1"),
            )
        ],
        [(1, 0), (2, 1), (3, 2)],
        lost="t",
    ),
    "options of images for latents": Layout(
        [tar(*THREE_LATENTS)], named=("grey", "latents"), options={"grey": True}
    ),
    "options of latents for images": Layout(
        [tar(*three())], named=("scale", "images"), options={"scale": 0.5}
    ),
    "latents that a scale makes infinite": Layout(
        [tar(*latent("a", 1e30, 0), *latent("b", 1e30, 1))],
        named=("a", "not finite"),
        options={"scale": 1e20},
    ),
    "empty latents": Layout(
        [tar(*latent("a", 1, 0, shape=(1, 0, 2)), *latent("b", 1, 1, shape=(1, 0, 2)))],
        named=("a", "(1, 0, 2)"),
    ),
    "latents and images": Layout(
        [tar(*latent("a", 1, 0), *latent("b", 2, 1)), tar(*three())], named=("images", "latents")
    ),
}
LAYOUTS = NAMED | LINKED | AMBIGUOUS | INCOMPLETE | LATENTS


def read_indexed(folder, layout):
    """Return the value and class of each sample of the indexed set."""
    classes = 0 if layout.classes == 0 else None
    index(folder, classes=classes, **layout.options)
    reader = ShardReader(folder)
    assert all(reader[i]["__key__"] for i in range(len(reader)))
    kind = Images if reader.manifest["kind"] == "images" else Latents
    batch = kind(str(folder)).read(np.arange(len(reader)))
    x = batch.x if batch.latent else (batch.x + 1) * 127.5
    labels = [0] * len(x) if batch.condition is None else batch.condition.tolist()
    return sorted(zip(x[:, 0, 0, 1].tolist(), labels))


def read_sequentially(paths, layout):
    """Return the value and class of each sample of the first epoch."""
    source = SequentialTars([str(path) for path in paths], classes=layout.classes, **layout.options)
    source.sample()
    samples = []
    for sample, (finished, position, _) in source._samples(0, source.assign_readers(1), 0):
        if finished - (position == 0) >= len(paths):
            return sorted(samples)
        batch = source._batch([sample])
        x = batch.x if batch.latent else (batch.x + 1) * 127.5
        samples.append((float(x[0, 0, 0, 1]), sample.label))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_sample_is_read_or_named_by_both_readers(layout, tmp_path, capsys, caplog):
    paths = []
    for number, content in enumerate(layout.shards):
        paths.append(tmp_path / f"shard-{number}.tar")
        paths[-1].write_bytes(content)
    if layout.named:
        with refused(*layout.named):
            read_indexed(tmp_path, layout)
        assert not (tmp_path / "manifest.json").exists()
        with refused(*layout.named):
            read_sequentially(paths, layout)
        return

    for found in (read_indexed(tmp_path, layout), read_sequentially(paths, layout)):
        assert [label for _, label in found] == [label for _, label in layout.samples]
        values = [value for value, _ in found]
        assert values == pytest.approx([value for value, _ in layout.samples], abs=1.5)
    if layout.lost:
        assert f"({layout.lost}: " in capsys.readouterr().err
        assert f"({layout.lost}: " in caplog.text


@pytest.mark.parametrize("name", ["long USTAR names", "long GNU names", "long PAX names"])
def test_long_names_are_whole(name, tmp_path):
    (tmp_path / "shard-0.tar").write_bytes(LAYOUTS[name].shards[0])
    index(tmp_path)
    reader = ShardReader(tmp_path)
    assert [reader[i]["__key__"] for i in range(3)] == [f"{LONG}s{i}" for i in range(3)]


def test_names_with_dots_do_not_fill_the_memory(tmp_path):
    """Every sample has a field of its own: a table of samples and fields has 16 million spans."""
    members = []
    for i in range(4000):
        members += [member(f"{i}.png", png(9)), member(f"{i}.{i}.txt", b"x")]
    (tmp_path / "shard-0.tar").write_bytes(tar(*members))
    index(tmp_path)
    assert (tmp_path / "shard-0.npy").stat().st_size < 200_000
    assert len(ShardReader(tmp_path)) == 4000
