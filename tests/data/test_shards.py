"""Sets of shards: what is written is read, what is damaged is refused, and the order is a pure function."""

import io
import os
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
import torch
import webdataset

from data.files import read_json, write_json
from data.noise import noise
from data.pairs import Pairs, PairSet, PairWriter
from data.shards import Order, ShardReader, ShardWriter, decode_array, encode_array, order


def write(folder, count=25, shard=10, **provenance):
    writer = ShardWriter(folder, "latents", provenance, count, shard)
    for number in writer.missing():
        rows = [
            {"__key__": f"{i:09d}", "npy": encode_array(np.full(3, i)), "cls": str(i).encode()} for i in writer.indices(number)
        ]
        writer.write(number, rows)
    assert writer.finish()
    return writer


def test_what_is_written_is_read(tmp_path):
    write(tmp_path)
    reader = ShardReader(tmp_path)
    assert len(reader) == 25
    for i in (0, 9, 10, 24):
        sample = reader[i]
        assert sample["__key__"] == f"{i:09d}"
        assert decode_array(sample["npy"]).tolist() == [i] * 3 and sample["cls"].tobytes() == str(i).encode()
    with pytest.raises(IndexError):
        reader[25]


def test_plain_webdataset_reads_them(tmp_path):
    write(tmp_path)
    files = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    assert [sample["cls"] for sample in samples] == list(range(25))
    assert samples[7]["npy"].tolist() == [7] * 3


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    write(tmp_path / "a"), write(tmp_path / "b")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir()) and "manifest.json" in files
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_no_temporary_files_are_left(tmp_path):
    (tmp_path / ".000001.tar.elsewhere-999-00aa.tmp").write_text("torn by a kill")
    write(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_torn_shard_is_made_again(tmp_path):
    writer = write(tmp_path)
    before = (tmp_path / "000001.tar").read_bytes()
    (tmp_path / "000001.tar").write_bytes(before[:-700])
    with pytest.raises(ValueError, match=r"000001.tar: \d+ bytes, the manifest says"):
        ShardReader(tmp_path)
    assert writer.missing() == [1]
    write(tmp_path)
    assert (tmp_path / "000001.tar").read_bytes() == before


def test_a_flipped_bit_is_seen_when_the_shard_is_opened(tmp_path):
    write(tmp_path)
    data = bytearray((tmp_path / "000000.tar").read_bytes())
    data[700] ^= 1
    (tmp_path / "000000.tar").write_bytes(data)
    reader = ShardReader(tmp_path)
    assert reader[12]["cls"].tobytes() == b"12"
    with pytest.raises(ValueError, match="000000.tar: its checksum is not the manifest's"):
        reader[0]


def test_changed_offsets_are_seen_when_the_shard_is_opened(tmp_path):
    write(tmp_path)
    path = tmp_path / "000000.npy"
    offsets = np.load(path)
    np.save(path, offsets[::-1])
    with pytest.raises(ValueError, match="000000.npy: its checksum is not the manifest's"):
        ShardReader(tmp_path)[0]


def test_a_bit_that_flips_later_is_seen_where_every_read_is_verified(tmp_path):
    write(tmp_path)
    reader, blind = ShardReader(tmp_path, verify="read"), ShardReader(tmp_path)
    rows = np.arange(10)
    assert reader.arrays("npy", rows)[:, 0].tolist() == blind.arrays("npy", rows)[:, 0].tolist() == list(range(10))
    with (tmp_path / "000000.tar").open("r+b") as file:
        file.seek(int(np.load(tmp_path / "000000.npy")[4, 1, 0]) + 130)  # within the array of sample 4
        file.write(b"\xff")
    assert reader[3] and blind[4]
    for read in (lambda: reader[4], lambda: reader.arrays("npy", rows)):
        with pytest.raises(ValueError, match="a sample's checksum is not the recorded one"):
            read()


def test_a_batch_is_its_samples_in_any_order(tmp_path):
    write(tmp_path, count=1300, shard=10)  # more shards than are kept open
    reader, indices = ShardReader(tmp_path), np.random.default_rng(0).permutation(1300)
    assert reader.numbers("cls", indices).tolist() == reader.arrays("npy", indices)[:, 1].tolist() == indices.tolist()
    assert [int(reader[int(i)]["__key__"]) for i in indices] == indices.tolist()
    assert len(os.listdir("/proc/self/fd")) < 400


def test_what_makes_no_batch_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, "latents", {}, 4, 2)
    rows = [np.zeros(3), np.zeros(3), np.zeros(300), np.zeros(4)]
    for number in writer.numbers():
        members = [{"__key__": str(i), "npy": encode_array(rows[i]), "cls": b"1" if i else b"x"} for i in writer.indices(number)]
        writer.write(number, members)
    writer.finish()
    reader = ShardReader(tmp_path)
    with pytest.raises(ValueError, match="000001.tar: .npy is missing in some samples, or has several lengths"):
        reader.arrays("npy", np.array([2, 3]))
    with pytest.raises(ValueError, match="000000.tar: .cls is not a whole number"):
        reader.numbers("cls", np.array([0, 1]))
    with pytest.raises(ValueError, match="has no .txt, only cls, npy"):
        reader.arrays("txt", np.array([0]))
    for wrong in ([], [4], [-1]):
        with pytest.raises(IndexError):
            reader.arrays("npy", np.array(wrong, dtype=int))


def test_a_missing_shard_an_unfinished_set_and_a_plain_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        ShardReader(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no manifest.json there"):
        ShardReader(tmp_path)
    write(tmp_path)
    (tmp_path / "000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match="000002.tar: named in the manifest but missing"):
        ShardReader(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="an unfinished set"):
        ShardReader(tmp_path)
    (tmp_path / "manifest.json").write_text("{torn")
    with pytest.raises(ValueError, match="manifest.json: not valid JSON"):
        ShardReader(tmp_path)


def test_another_format_or_kind_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="holds latents, wanted pairs"):
        ShardReader(tmp_path, "pairs")
    manifest = read_json(tmp_path / "manifest.json")
    write_json(tmp_path / "manifest.json", {**manifest, "format": 99})
    with pytest.raises(ValueError, match="not a manifest of format 2"):
        ShardReader(tmp_path)


def test_a_folder_begun_with_other_settings_is_refused(tmp_path):
    write(tmp_path, guidance=1.0)
    with pytest.raises(ValueError, match=r"guidance is 1.0 there and 2.0 here"):
        ShardWriter(tmp_path, "latents", {"guidance": 2.0}, 25, 10)


def test_pickled_arrays_are_never_loaded(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="array of object"):
        decode_array(np.frombuffer(buffer.getvalue(), np.uint8))


@pytest.mark.parametrize("counts", [[10], [7, 3, 9, 1], [5] * 40])
def test_order_shows_every_sample_once_an_epoch(counts):
    manifest = {"shards": [{"count": count} for count in counts]}
    total = sum(counts)
    first, second = (order(manifest, 3, epoch, 0, total).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(total)) and first != second


def test_order_is_the_same_however_it_is_cut():
    manifest = {"shards": [{"count": count} for count in [5] * 40]}
    whole = order(manifest, 0, 0, 0, 500)
    parts, position = [], 0
    for size in (1, 99, 150, 1, 249):
        parts.append(order(manifest, 0, position // 200, position % 200, size))
        position += size
    assert np.array_equal(np.concatenate(parts), whole)
    assert order(manifest, 0, 0, 0, 500).tolist() != order(manifest, 1, 0, 0, 500).tolist()


def test_a_hundred_million_samples_start_at_once():
    large = Order([1000] * 100_000, 0)
    assert len(set(large.indices(73_456_789, 256).tolist())) == 256
    assert large.indices(99_999_999, 2).size == 2


def pairs(folder, count=20, store_noise=False, **changes):
    provenance = {
        "guidance": 1.0,
        "interpolant": "Linear(sigma_min=0.0)",
        "prediction": "Velocity()",
        "teacher": "abc",
        **changes,
    }
    writer = PairWriter(folder, provenance, count, 7, (2, 4, 4), 8, store_noise)
    for number in writer.shards.missing():
        indices = writer.shards.indices(number)
        writer.write(number, writer.noise(number) * 2, torch.tensor(indices) % 3)
    assert writer.shards.finish()
    return folder


def test_pairs_bring_their_noise_and_their_condition(tmp_path):
    found = PairSet(pairs(tmp_path))
    assert len(found) == 20
    for i in (0, 7, 8, 19):
        pair = found[i]
        assert pair["index"] == i and pair["condition"] == i % 3
        assert torch.equal(pair["noise"], noise(7, i, (2, 4, 4)))
        torch.testing.assert_close(pair["sample"], 2 * pair["noise"], rtol=1e-3, atol=1e-3)
    batch = Pairs(str(tmp_path)).read(np.array([5, 3]))
    assert batch.latent and batch.condition.tolist() == [2, 0]
    assert torch.equal(batch.noise[1], noise(7, 3, (2, 4, 4)))


def test_noise_can_be_stored_too(tmp_path):
    row = ShardReader(pairs(tmp_path, store_noise=True))[3]
    assert np.array_equal(decode_array(row["noise.npy"]), noise(7, 3, (2, 4, 4)).numpy())


def test_provenance_that_contradicts_is_refused_with_both_values(tmp_path):
    source = Pairs(str(pairs(tmp_path, guidance=5.0)), guidance=5.0)
    with pytest.raises(ValueError, match=r"collected with guidance 5.0, the configuration says 1.0"):
        Pairs(str(tmp_path), guidance=1.0)
    with pytest.raises(ValueError, match="collected with teacher abc, the configuration says abd"):
        source.agree("teacher", "abd")


def test_other_noise_bits_are_refused(tmp_path):
    pairs(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    manifest["noise"]["checksums"]["0"] = "0" * 64
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(ValueError, match="noise 0 has other bits here"):
        PairSet(tmp_path)


def test_pairs_hold_no_pickle(tmp_path):
    pairs(tmp_path)
    for tar in tmp_path.glob("*.tar"):
        with tarfile.open(tar) as file:
            assert {name.partition(".")[2] for name in file.getnames()} == {"npy", "cls"}


def test_a_set_of_a_hundred_million_samples_opens_at_once(tmp_path):
    """Manifest, order and a batch at any position: under 2 s and 100 MB, whatever the size."""
    record = {"count": 10_000, "bytes": 0, "fields": ["cls", "npy"], "sha256": "0" * 64, "xxh3": "0" * 32, "offsets": "0" * 32}
    shards = [{"name": f"{n:06d}.tar", **record} for n in range(10_000)]
    for shard in shards:
        (tmp_path / shard["name"]).touch()
    manifest = {"format": 2, "kind": "latents", "samples": 10**8, "shards": shards}
    write_json(tmp_path / "manifest.json", manifest)
    began = time.process_time()  # not the wall's, which the machine's other work moves; nor traced, which is slow
    reader = ShardReader(tmp_path)
    found = order(reader.manifest, 3, 7, 98_765_432, 512)
    seconds = time.process_time() - began
    tracemalloc.start()
    order(ShardReader(tmp_path).manifest, 3, 7, 98_765_432, 512)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(reader) == 10**8 and len(set(found.tolist())) == 512
    assert seconds < 2 and memory < 100e6, (seconds, memory)
