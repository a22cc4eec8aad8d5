"""Indexing tars that other programs wrote."""

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.images import Images
from data.index import index
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
