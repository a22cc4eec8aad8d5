"""Indexing tars that other programs wrote."""

import io
import os
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.datamodule import checksum_samples
from data.files import read_json, write_json
from data.images import Images
from data.index import index
from data.sequential import SequentialTars
from data.shards import ShardReader
from tests.helpers.refusals import refused


def write_foreign_tars(folder, shards=3, each=7, suffix="jpg", prefix=""):
    """Write tars of JPEG images with classes, as webdataset writes them; return the folder."""
    for number in range(shards):
        with webdataset.TarWriter(str(folder / f"part-{number}.tar")) as writer:
            for i in range(each):
                buffer = io.BytesIO()
                image = Image.new("RGB", (8, 8), (number * 20, i * 10, 0))
                image.save(buffer, "jpeg", quality=100)
                sample = {"__key__": f"{prefix}{number}_{i}", suffix: buffer.getvalue()}
                writer.write({**sample, "cls": str(i % 4)})
    return folder


@pytest.mark.parametrize("prefix", ["", "a/b.c/", "./x/"])
def test_foreign_tars_are_read(tmp_path, prefix):
    index(write_foreign_tars(tmp_path, prefix=prefix))
    source = Images(str(tmp_path))
    assert len(source) == 21
    assert source.manifest["classes"] == ["0", "1", "2", "3"]
    assert source.reader[9]["__key__"] == f"{prefix}1_2"

    batch = source.read(np.array([0, 20]))
    assert batch.x.shape == (2, 3, 8, 8)
    assert batch.condition.tolist() == [0, 2]

    files = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    plain = webdataset.WebDataset(files, shardshuffle=False)
    keys = [source.reader[i]["__key__"] for i in range(21)]
    assert [sample["__key__"] for sample in plain] == keys


def test_indexing_again_notices_what_changed(tmp_path):
    index(write_foreign_tars(tmp_path))
    before = (tmp_path / "part-0.npy").stat().st_mtime_ns
    write_foreign_tars(tmp_path, shards=1, each=9)
    index(tmp_path)
    assert len(ShardReader(tmp_path)) == 23
    assert (tmp_path / "part-0.npy").stat().st_mtime_ns != before


@pytest.mark.parametrize("lost", [1, 300, 700, 5000])
def test_a_truncated_tar_is_named(tmp_path, lost):
    write_foreign_tars(tmp_path, shards=1)
    path = tmp_path / "part-0.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    end = last.offset_data + last.size
    path.write_bytes(path.read_bytes()[: end - lost])
    with refused(path, kind=ValueError):
        index(tmp_path)


def test_a_folder_without_tars_is_named(tmp_path):
    with refused(tmp_path, ".tar", kind=FileNotFoundError):
        index(tmp_path)


def test_samples_without_images_or_latents_are_named(tmp_path):
    write_foreign_tars(tmp_path, suffix="mp4")
    with refused(tmp_path, "cls", "mp4", "jpg", "npy", kind=ValueError):
        index(tmp_path)


@pytest.mark.parametrize("name", ["part-1.json", "part-1.npy", "manifest.json"])
def test_files_of_the_user_are_not_replaced(tmp_path, name):
    write_foreign_tars(tmp_path)
    buffer = io.BytesIO()
    np.save(buffer, np.ones((7, 512), np.float32))
    content = buffer.getvalue() if name.endswith("npy") else b'{"license": "CC-BY"}'
    (tmp_path / name).write_bytes(content)
    before = sorted(path.name for path in tmp_path.iterdir())
    with refused(tmp_path / name, "--out", kind=ValueError):
        index(tmp_path)
    assert (tmp_path / name).read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == before

    index(tmp_path, out=tmp_path / "set")
    assert len(Images(str(tmp_path / "set"))) == 21
    assert (tmp_path / name).read_bytes() == content


def test_a_set_in_another_folder_leaves_the_tars_folder_alone(tmp_path):
    (tmp_path / "tars").mkdir()
    before = sorted(write_foreign_tars(tmp_path / "tars").iterdir())
    for _ in range(2):  # the second time nothing is to be done
        index(tmp_path / "tars", out=tmp_path / "set")
    assert sorted((tmp_path / "tars").iterdir()) == before
    found = Images(str(tmp_path / "set")).read(np.arange(21))
    index(tmp_path / "tars")
    expected = Images(str(tmp_path / "tars")).read(np.arange(21))
    assert found.x.equal(expected.x)
    assert found.condition.equal(expected.condition)


def test_a_tar_of_another_folder_is_not_linked_over(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_foreign_tars(tmp_path / name)
    index(tmp_path / "a", out=tmp_path / "set")
    with refused(tmp_path / "set/part-0.tar", "--out", kind=ValueError):
        index(tmp_path / "b", out=tmp_path / "set")


def test_offsets_of_an_index_that_was_killed_are_made_again(tmp_path):
    index(write_foreign_tars(tmp_path))
    (tmp_path / "part-1.json").unlink()
    (tmp_path / "manifest.json").unlink()
    index(tmp_path)
    assert len(ShardReader(tmp_path)) == 21


def test_a_folder_with_compressed_tars_is_refused(tmp_path):
    write_foreign_tars(tmp_path)
    (tmp_path / "part-3.tar.gz").write_bytes(b"\x1f\x8b")
    with refused(tmp_path / "part-3.tar.gz", kind=ValueError):
        index(tmp_path)


def test_other_options_index_again(tmp_path):
    index(write_foreign_tars(tmp_path))
    assert Images(str(tmp_path)).read(np.array([2])).condition.tolist() == [2]
    index(tmp_path, classes=0)
    assert Images(str(tmp_path)).read(np.array([2])).condition is None
    assert Images(str(tmp_path)).manifest["classes"] is None


def test_a_run_notices_that_its_set_was_indexed_with_other_options(tmp_path):
    index(write_foreign_tars(tmp_path))
    before = checksum_samples(Images(str(tmp_path)))
    index(tmp_path)
    assert checksum_samples(Images(str(tmp_path))) == before
    index(tmp_path, background="black")
    assert checksum_samples(Images(str(tmp_path))) != before


def test_a_given_number_of_classes_allows_more_of_them_than_samples(tmp_path):
    write_foreign_tars(tmp_path, shards=1, each=4)
    index(tmp_path, classes=1000)
    assert len(Images(str(tmp_path)).manifest["classes"]) == 1000
    with refused(3, "classes", kind=ValueError):
        index(tmp_path, classes=3)


@pytest.mark.parametrize(
    "options",
    [
        {"field": "txt"},
        {"tolerance": 1.0},
        {"classes": -1},
        {"classes": 10**9},
        {"scale": 0.0},
        {"white": -1.0},
    ],
    ids=str,
)
def test_invalid_options_are_refused_before_anything_is_written(tmp_path, options):
    write_foreign_tars(tmp_path)
    before = sorted(tmp_path.iterdir())
    with refused(*options, kind=ValueError):
        index(tmp_path, **options)
    assert sorted(tmp_path.iterdir()) == before


def test_offsets_of_another_program_are_not_replaced(tmp_path):
    """They look like those of an index that was killed before it wrote the record."""
    write_foreign_tars(tmp_path)
    np.save(tmp_path / "part-1.npy", np.full((7, 2, 3), 5))
    with refused(tmp_path / "part-1.npy", "--out", kind=ValueError):
        index(tmp_path)
    assert (np.load(tmp_path / "part-1.npy") == 5).all()


def test_tars_that_are_not_read_are_named(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    write_foreign_tars(tmp_path / "sub", shards=1)
    with refused(tmp_path, "sub/part-0.tar", kind=FileNotFoundError):
        index(tmp_path)
    write_foreign_tars(tmp_path)
    (tmp_path / "part-0.tar").rename(tmp_path / "part-0.TAR")
    (tmp_path / "part-1.tar").rename(tmp_path / "._part-1.tar")
    index(tmp_path)
    assert len(Images(str(tmp_path))) == 7
    assert f"3 tars, such as {tmp_path / '._part-1.tar'}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_named_with_the_way_out(tmp_path, monkeypatch):
    write_foreign_tars(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with refused(tmp_path, "--out", kind=PermissionError):
        index(tmp_path)
    index(tmp_path, out=tmp_path / "set")
    (tmp_path / "file").touch()
    with refused(tmp_path / "file", "is a file", kind=NotADirectoryError):
        index(tmp_path, out=tmp_path / "file")


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error")])
def test_a_fault_of_the_machine_is_no_unreadable_sample(tmp_path, monkeypatch, error):
    write_foreign_tars(tmp_path, shards=1)

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    for read in (index, lambda folder: SequentialTars(str(folder / "part-0.tar")).sample()):
        with refused(kind=type(error)) as found:
            read(tmp_path)
        assert "part-0.tar: 0_0" in found.line


def test_a_set_that_an_older_version_indexed_is_refused(tmp_path):
    index(write_foreign_tars(tmp_path))
    path = tmp_path / "manifest.json"
    manifest = read_json(path)
    del manifest["grey"]
    write_json(path, manifest)
    with refused(path, "grey", "rectify index"):
        Images(str(tmp_path))
