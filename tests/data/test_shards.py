"""Sets of shards: written samples are read, damage is refused, and the order is a pure function."""

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
from data.latents import Latents
from data.noise import noise
from data.pairs import Pairs, PairSet, PairWriter
from data.shards import Order, ShardReader, ShardWriter, array_to_npy, npy_to_array
from tests.helpers.refusals import refused


def write_set(folder, count=25, shard=10, **provenance):
    """Write a set in which sample i has the latent [i, i, i] and the class i; return its writer."""
    writer = ShardWriter(folder, "latents", provenance, count, shard)
    for number in writer.missing():
        samples = []
        for i in writer.indices(number):
            latent = array_to_npy(np.full(3, i))
            samples.append({"__key__": f"{i:09d}", "npy": latent, "cls": str(i).encode()})
        writer.write(number, samples)
    assert writer.finish()
    return writer


def test_written_samples_are_read(tmp_path):
    write_set(tmp_path)
    reader = ShardReader(tmp_path)
    assert len(reader) == 25
    for i in (0, 9, 10, 24):
        sample = reader[i]
        assert sample["__key__"] == f"{i:09d}"
        assert npy_to_array(sample["npy"]).tolist() == [i] * 3
        assert sample["cls"].tobytes() == str(i).encode()
    with pytest.raises(IndexError):
        reader[25]


def test_plain_webdataset_reads_the_tars(tmp_path):
    write_set(tmp_path)
    files = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    assert [sample["cls"] for sample in samples] == list(range(25))
    assert samples[7]["npy"].tolist() == [7] * 3


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    write_set(tmp_path / "a")
    write_set(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "manifest.json" in names
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_no_temporary_files_are_left(tmp_path):
    (tmp_path / ".000001.tar.elsewhere-999-00aa.tmp").write_text("torn by a kill")
    write_set(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_torn_shard_is_refused_and_made_again(tmp_path):
    writer = write_set(tmp_path)
    path = tmp_path / "000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-700])
    with refused(path, len(content) - 700, len(content), kind=ValueError):
        ShardReader(tmp_path)
    assert writer.missing() == [1]
    write_set(tmp_path)
    assert path.read_bytes() == content


def test_a_flipped_bit_is_found_when_the_shard_is_opened(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "000000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    reader = ShardReader(tmp_path)
    assert reader[12]["cls"].tobytes() == b"12", "another shard is not affected"
    with refused(path, "checksum", kind=ValueError):
        reader[0]


def test_changed_offsets_are_found_when_the_shard_is_opened(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "000000.npy"
    np.save(path, np.load(path)[::-1])
    with refused(path, "checksum", kind=ValueError):
        ShardReader(tmp_path)[0]


def test_a_bit_that_flips_later_is_found_when_every_read_is_verified(tmp_path):
    write_set(tmp_path)
    verifying = ShardReader(tmp_path, verify="read")
    trusting = ShardReader(tmp_path)
    indices = np.arange(10)
    for reader in (verifying, trusting):
        assert reader.arrays("npy", indices)[:, 0].tolist() == list(range(10))

    # Overwrite a byte within the array of sample 4.
    start = int(np.load(tmp_path / "000000.npy")[4, 1, 0])
    with (tmp_path / "000000.tar").open("r+b") as file:
        file.seek(start + 130)
        file.write(b"\xff")

    assert verifying[3]
    assert trusting[4]
    with refused(tmp_path / "000000.tar", "checksum", kind=ValueError):
        verifying[4]
    with refused(tmp_path / "000000.tar", "checksum", kind=ValueError):
        verifying.arrays("npy", indices)


def test_a_batch_is_its_samples_in_any_order(tmp_path):
    write_set(tmp_path, count=1300, shard=10)  # more shards than are kept open
    reader = ShardReader(tmp_path)
    indices = np.random.default_rng(0).permutation(1300)
    assert reader.numbers("cls", indices).tolist() == indices.tolist()
    assert reader.arrays("npy", indices)[:, 1].tolist() == indices.tolist()
    assert [int(reader[int(i)]["__key__"]) for i in indices] == indices.tolist()
    assert len(os.listdir("/proc/self/fd")) < 400


@pytest.fixture
def uneven(tmp_path):
    """A set of four samples: a class that is no number, then arrays of several lengths."""
    writer = ShardWriter(tmp_path, "latents", {}, 4, 2)
    lengths = [3, 3, 300, 4]
    classes = [b"x", b"1", b"1", b"1"]
    for number in writer.numbers():
        samples = []
        for i in writer.indices(number):
            latent = array_to_npy(np.zeros(lengths[i]))
            samples.append({"__key__": str(i), "npy": latent, "cls": classes[i]})
        writer.write(number, samples)
    writer.finish()
    return tmp_path


def test_arrays_of_several_lengths_are_refused(uneven):
    with refused(uneven / "000001.tar", ".npy", kind=ValueError):
        ShardReader(uneven).arrays("npy", np.array([2, 3]))


def test_a_class_that_is_no_number_is_refused(uneven):
    with refused(uneven / "000000.tar", ".cls", kind=ValueError):
        ShardReader(uneven).numbers("cls", np.array([0, 1]))


def test_a_missing_field_is_named_with_those_of_the_set(uneven):
    with refused(uneven / "000000.tar", ".txt", "cls", "npy", kind=ValueError):
        ShardReader(uneven).arrays("txt", np.array([0]))


@pytest.mark.parametrize("indices", [[], [4], [-1]])
def test_indices_out_of_range_are_refused(uneven, indices):
    with pytest.raises(IndexError):
        ShardReader(uneven).arrays("npy", np.array(indices, dtype=int))


def test_a_missing_folder_is_named(tmp_path):
    with refused(tmp_path / "nowhere", kind=FileNotFoundError):
        ShardReader(tmp_path / "nowhere")


def test_a_folder_without_a_set_is_named_with_the_commands_that_make_one(tmp_path):
    with refused(tmp_path, "manifest.json", "rectify pack", kind=FileNotFoundError):
        ShardReader(tmp_path)


def test_the_sets_of_a_folder_are_named(tmp_path):
    write_set(tmp_path / "train")
    with refused(tmp_path / "train", kind=FileNotFoundError):
        ShardReader(tmp_path)
    with refused(tmp_path / "train/plan.json", "is a file", kind=NotADirectoryError):
        ShardReader(tmp_path / "train/plan.json")


def test_a_missing_shard_is_named(tmp_path):
    write_set(tmp_path)
    (tmp_path / "000002.tar").unlink()
    with refused(tmp_path / "000002.tar", kind=FileNotFoundError):
        ShardReader(tmp_path)


def test_an_unfinished_set_is_not_taken_for_a_folder_without_a_set(tmp_path):
    write_set(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with refused(tmp_path, kind=FileNotFoundError) as error:
        ShardReader(tmp_path)
    assert "rectify pack" not in error.line


def test_a_torn_manifest_is_named(tmp_path):
    write_set(tmp_path)
    (tmp_path / "manifest.json").write_text("{torn")
    with refused(tmp_path / "manifest.json", "JSON", kind=ValueError):
        ShardReader(tmp_path)


def test_another_kind_is_refused(tmp_path):
    write_set(tmp_path)
    with refused(tmp_path, "latents", "pairs", kind=ValueError):
        ShardReader(tmp_path, "pairs")


@pytest.mark.parametrize("other", [2, 99])
def test_another_format_is_refused(tmp_path, other):
    write_set(tmp_path)
    path = tmp_path / "manifest.json"
    write_json(path, {**read_json(path), "format": other})
    with refused(path, f"format {other}", "format 3", kind=ValueError):
        ShardReader(tmp_path)


def test_a_folder_begun_with_other_settings_is_refused(tmp_path):
    write_set(tmp_path, guidance=1.0)
    with refused(tmp_path, "guidance", 1.0, 2.0, kind=ValueError):
        ShardWriter(tmp_path, "latents", {"guidance": 2.0}, 25, 10)


def test_pickled_arrays_are_never_loaded():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with refused("object", kind=ValueError):
        npy_to_array(np.frombuffer(buffer.getvalue(), np.uint8))


@pytest.mark.parametrize("counts", [[10], [7, 3, 9, 1], [5] * 40])
def test_every_epoch_holds_every_sample_once_in_another_order(counts):
    total = sum(counts)
    endless = Order(counts, 3)
    first = endless.indices(0, total).tolist()
    second = endless.indices(total, total).tolist()
    assert sorted(first) == list(range(total))
    assert sorted(second) == list(range(total))
    assert first != second


def test_the_order_does_not_depend_on_how_it_is_split():
    whole = Order([5] * 40, 0).indices(0, 500)
    parts = []
    position = 0
    for size in (1, 99, 150, 1, 249):
        parts.append(Order([5] * 40, 0).indices(position, size))
        position += size
    assert np.array_equal(np.concatenate(parts), whole)


def test_another_seed_is_another_order():
    first = Order([5] * 40, 0).indices(0, 500).tolist()
    second = Order([5] * 40, 1).indices(0, 500).tolist()
    assert first != second


def test_the_order_of_a_hundred_million_samples_is_ready_at_once():
    large = Order([1000] * 100_000, 0)
    assert len(set(large.indices(73_456_789, 256).tolist())) == 256
    assert large.indices(99_999_999, 2).size == 2


def write_pairs(folder, count=20, store_noise=False, **changes):
    """Write a set of pairs: a sample is twice its noise, the class of pair i is i mod 3."""
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


@pytest.mark.parametrize("i", [0, 7, 8, 19])
def test_a_pair_has_its_noise_and_its_condition(tmp_path, i):
    pair_set = PairSet(write_pairs(tmp_path))
    assert len(pair_set) == 20
    pair = pair_set[i]
    assert pair["index"] == i
    assert pair["condition"] == i % 3
    assert torch.equal(pair["noise"], noise(7, i, (2, 4, 4)))
    torch.testing.assert_close(pair["sample"], 2 * pair["noise"], rtol=1e-3, atol=1e-3)


def test_a_batch_of_pairs_has_their_noises_and_conditions(tmp_path):
    batch = Pairs(str(write_pairs(tmp_path))).read(np.array([5, 3]))
    assert batch.latent
    assert batch.condition.tolist() == [2, 0]
    assert torch.equal(batch.noise[1], noise(7, 3, (2, 4, 4)))


def test_noise_can_be_stored(tmp_path):
    sample = ShardReader(write_pairs(tmp_path, store_noise=True))[3]
    stored = npy_to_array(sample["noise.npy"])
    assert np.array_equal(stored, noise(7, 3, (2, 4, 4)).numpy())


def test_another_scale_is_refused_with_both_values(tmp_path):
    write_pairs(tmp_path, guidance=5.0)
    with refused(tmp_path, "guidance", 5.0, 1.0, kind=ValueError):
        Pairs(str(tmp_path), guidance=1.0)


def test_another_teacher_is_refused_with_both_values(tmp_path):
    source = Pairs(str(write_pairs(tmp_path, guidance=5.0)), guidance=5.0)
    with refused(tmp_path, "teacher", "abc", "abd", kind=ValueError):
        source.check_provenance("teacher", "abd")


def test_noise_with_other_bits_is_refused(tmp_path):
    write_pairs(tmp_path)
    manifest = read_json(tmp_path / "manifest.json")
    manifest["noise"]["checksums"]["0"] = "0" * 64
    write_json(tmp_path / "manifest.json", manifest)
    with refused(tmp_path, "noise 0", kind=ValueError):
        PairSet(tmp_path)


def test_pairs_hold_no_pickle(tmp_path):
    write_pairs(tmp_path)
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            fields = {name.partition(".")[2] for name in tar.getnames()}
        assert fields == {"npy", "cls"}


def far_batch(reader):
    """Return the indices of 512 samples in the eighth epoch of 10^8 samples."""
    counts = [shard["count"] for shard in reader.manifest["shards"]]
    return Order(counts, 3).indices(798_765_432, 512)


def test_a_set_of_a_hundred_million_samples_opens_at_once(tmp_path):
    """Manifest, order and a batch at any position take less than 2 s and 100 MB."""
    # Write a set with a full manifest and empty tars.
    record = {
        "count": 10_000,
        "bytes": 0,
        "fields": ["cls", "npy"],
        "sha256": "0" * 64,
        "xxh3": "0" * 32,
        "offsets": "0" * 32,
    }
    shards = [{"name": f"{n:06d}.tar", **record} for n in range(10_000)]
    for shard in shards:
        (tmp_path / shard["name"]).touch()
    manifest = {"format": 3, "kind": "latents", "samples": 10**8, "shards": shards}
    write_json(tmp_path / "manifest.json", manifest)

    # Measure the time of this process: other processes change the wall clock's. Tracing is slow.
    began = time.process_time()
    reader = ShardReader(tmp_path)
    indices = far_batch(reader)
    seconds = time.process_time() - began

    # Measure the memory, traced, in a second run.
    tracemalloc.start()
    far_batch(ShardReader(tmp_path))
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(reader) == 10**8
    assert len(set(indices.tolist())) == 512
    assert seconds < 2
    assert memory < 100e6


def test_a_set_does_not_overwrite_files_of_others(tmp_path):
    (tmp_path / "000001.tar").write_bytes(b"mine")
    with refused(tmp_path / "000001.tar", kind=ValueError):
        ShardWriter(tmp_path, "latents", {}, 25, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["000001.tar"]


def failing_samples():
    yield {"__key__": "0", "npy": array_to_npy(np.zeros(3))}
    raise ValueError("refused")


def test_a_set_that_was_refused_in_its_first_shard_binds_nothing(tmp_path):
    writer = ShardWriter(tmp_path, "latents", {"guidance": 1.0}, 25, 10)
    with refused("refused", kind=ValueError):
        writer.write(0, failing_samples())
    assert not list(tmp_path.iterdir())
    write_set(tmp_path, guidance=2.0)


def test_an_unfinished_set_is_begun_anew_if_only_its_inputs_changed(tmp_path):
    first = ShardWriter(tmp_path, "latents", {"images": "a"}, 25, 10, ("images", "count"))
    for number in first.numbers():
        first.write(number, [{"__key__": "0", "npy": array_to_npy(np.zeros(3))}])
    with refused("size", kind=ValueError):
        ShardWriter(tmp_path, "latents", {"images": "b", "size": 3}, 25, 10, ("images", "count"))
    second = ShardWriter(tmp_path, "latents", {"images": "b"}, 15, 10, ("images", "count"))
    assert second.missing() == [0, 1]
    for number in second.missing():
        second.write(number, [{"__key__": "0", "npy": array_to_npy(np.ones(3))}])
    assert second.finish()
    assert not (tmp_path / "000002.tar").exists()
    assert ShardReader(tmp_path).arrays("npy", np.arange(2)).tolist() == [[1.0] * 3] * 2
    with refused("images", kind=ValueError):  # it is finished now
        ShardWriter(tmp_path, "latents", {"images": "c"}, 15, 10, ("images", "count"))


def test_an_empty_first_shard_loses_no_classes(tmp_path):
    writer = ShardWriter(tmp_path, "latents", {}, 20, 10)
    latent = array_to_npy(np.zeros((1, 2, 2), np.float32))
    writer.write(0, [])
    writer.write(1, [{"__key__": "10", "npy": latent, "cls": b"4"}])
    assert writer.finish()
    assert Latents(str(tmp_path)).read(np.array([0])).condition.tolist() == [4]


def test_a_set_of_which_one_shard_has_no_classes_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, "latents", {}, 2, 1)
    latent = array_to_npy(np.zeros((1, 2, 2), np.float32))
    writer.write(0, [{"__key__": "0", "npy": latent}])
    writer.write(1, [{"__key__": "1", "npy": latent, "cls": b"4"}])
    assert writer.finish()
    with refused(tmp_path, "000000.tar", "000001.tar", ".cls", kind=ValueError):
        Latents(str(tmp_path)).read(np.array([0]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_latent_that_is_not_finite_is_named(tmp_path, value):
    writer = ShardWriter(tmp_path, "latents", {}, 3, 2)
    for number in writer.numbers():
        samples = []
        for i in writer.indices(number):
            array = np.full((1, 2, 2), value if i == 2 else 0.5, np.float16)
            samples.append({"__key__": f"cat{i}", "npy": array_to_npy(array)})
        writer.write(number, samples)
    assert writer.finish()
    source = Latents(str(tmp_path))
    assert source.read(np.array([0, 1])).x.isfinite().all()
    with refused(tmp_path / "000001.tar", "cat2", kind=ValueError):
        source.read(np.array([0, 2, 1]))


@pytest.mark.parametrize("dtype", [np.uint8, np.complex64, np.uint16, ">f4"])
def test_latents_that_are_no_floats_are_refused(tmp_path, dtype):
    writer = ShardWriter(tmp_path, "latents", {}, 1, 1)
    writer.write(0, [{"__key__": "0", "npy": array_to_npy(np.ones((1, 2, 2), dtype))}])
    assert writer.finish()
    with refused(tmp_path, np.dtype(dtype).str, kind=ValueError):
        Latents(str(tmp_path)).read(np.array([0]))
