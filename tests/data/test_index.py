"""Tars that others made."""

import io
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.images import Images
from data.index import index
from data.shards import ShardReader


def foreign(folder, shards=3, each=7, suffix="jpg", prefix=""):
    for number in range(shards):
        with webdataset.TarWriter(str(folder / f"part-{number}.tar")) as writer:
            for i in range(each):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (number * 20, i * 10, 0)).save(buffer, "jpeg", quality=100)
                writer.write({"__key__": f"{prefix}{number}_{i}", suffix: buffer.getvalue(), "cls": str(i % 4)})
    return folder


@pytest.mark.parametrize("prefix", ["", "a/b.c/", "./x/"])
def test_foreign_tars_are_read(tmp_path, prefix):
    index(foreign(tmp_path, prefix=prefix))
    source = Images(str(tmp_path))
    assert len(source) == 21 and source.manifest["classes"] == ["0", "1", "2", "3"]
    assert source.reader[9]["__key__"] == f"{prefix}1_2"
    batch = source.read(np.array([0, 20]))
    assert batch.x.shape == (2, 3, 8, 8) and batch.condition.tolist() == [0, 2]
    plain = list(webdataset.WebDataset([str(p) for p in sorted(tmp_path.glob("*.tar"))], shardshuffle=False))
    assert [sample["__key__"] for sample in plain] == [source.reader[i]["__key__"] for i in range(21)]


def test_indexing_again_notices_what_changed(tmp_path):
    index(foreign(tmp_path))
    before = (tmp_path / "part-0.npy").stat().st_mtime_ns
    foreign(tmp_path / ".", shards=1, each=9)
    index(tmp_path)
    assert len(ShardReader(tmp_path)) == 23 and (tmp_path / "part-0.npy").stat().st_mtime_ns != before


@pytest.mark.parametrize("cut", [1, 300, 700, 5000])
def test_a_truncated_tar_is_named(tmp_path, cut):
    foreign(tmp_path, shards=1)
    path = tmp_path / "part-0.tar"
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + last.size - cut])
    with pytest.raises(ValueError, match="part-0.tar: (truncated|not a whole tar)"):
        index(tmp_path)


def test_folders_that_are_none_of_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .tar files"):
        index(tmp_path)
    foreign(tmp_path, suffix="mp4")
    with pytest.raises(ValueError, match=r"samples hold \['cls', 'mp4'\]"):
        index(tmp_path)
