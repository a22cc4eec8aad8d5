"""Sets of several sizes and captions in training: nothing is left out, on any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data.batch import RankBatches, Request
from data.captions import draw_caption
from data.datamodule import BucketsInTurn, DataModule, checksum_samples
from data.dequantised import Dequantised
from data.images import Images, read_all
from data.latents import Latents
from data.mixed import Mixed
from tests.helpers.bucketed import SIZES, TextLengths, captions_of, write_set
from tests.helpers.refusals import refused

BATCH = 4
EPOCHS = BATCH  # cycles, after which every bucket is at the end of an epoch
STEPS = EPOCHS * 60 // BATCH
NAMES = [f"{width}x{height}" for width, height, _ in SIZES]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "images")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set") / "latents", "latents")


def global_batches(source, first, end, world=1, parts=1, workers=0):
    """Return (bucket, indices, captions) of steps `first` to `end` - 1, joined from all ranks."""
    batches = []
    for rank in range(world):
        steps = RankBatches(source, BATCH, 5, first, rank, world, parts)
        loader = iter(DataLoader(steps, batch_size=None, num_workers=workers))
        batches += [next(loader) for _ in range((end - first) * parts)]
    joined = []
    for step in range(first, end):
        micro_batches = [batch for batch in batches if batch.step == step]
        micro_batches.sort(key=lambda batch: batch.start)
        (name,) = {batch.bucket for batch in micro_batches}
        indices = torch.cat([identify(batch) for batch in micro_batches]).tolist()
        captions = sum((batch.captions for batch in micro_batches), ())
        joined.append((name, indices, captions))
    return joined


def identify(batch):
    """Return the indices of samples, which are their first numbers."""
    first = batch.x[:, 0, 0, 0]
    scaled = first * 1024 if batch.latent else (first + 1) * 127.5
    return scaled.round().long()


@pytest.fixture(scope="module")
def whole(images):
    return global_batches(Images(images), 0, STEPS)


# The sequence


def test_each_picture_is_read_once_in_each_epoch(whole):
    read = Counter(index for _, indices, _ in whole for index in indices)
    assert read == {index: EPOCHS for index in range(60)}


@pytest.mark.parametrize(("bucket", "first"), [(0, 0), (1, 20), (2, 33)])
def test_each_pass_over_a_bucket_has_each_picture_once(whole, bucket, first):
    width, height, count = SIZES[bucket]
    read = sum((indices for name, indices, _ in whole if name == NAMES[bucket]), [])
    assert len(read) == EPOCHS * count
    for start in range(0, len(read), count):
        assert sorted(read[start : start + count]) == list(range(first, first + count))


def test_passes_over_a_bucket_and_buckets_have_other_orders(whole):
    read = sum((indices for name, indices, _ in whole if name == NAMES[0]), [])
    assert read[:20] != read[20:40]


def test_a_batch_has_the_size_of_its_bucket(images):
    for _, batch in zip(range(15), RankBatches(Images(images), BATCH, 5)):
        width, height = batch.x.shape[:1:-1]
        assert batch.bucket == f"{width}x{height}"
        assert batch.bucket_total == dict(zip(NAMES, (20, 13, 27)))[batch.bucket]


WAYS = [(2, 1, 0), (4, 1, 0), (1, 4, 0), (2, 2, 2), (1, 1, 2)]


@pytest.mark.parametrize(("world", "parts", "workers"), WAYS)
def test_ranks_accumulation_and_workers_change_nothing(images, whole, world, parts, workers):
    """Pictures and captions are those of one process."""
    assert global_batches(Images(images), 0, 20, world, parts, workers) == whole[:20]


@pytest.mark.parametrize("step", [1, 14, 15, 37, STEPS - 1])
def test_a_run_resumes_at_any_step(images, whole, step):
    assert global_batches(Images(images), step, step + 1, world=2) == whole[step : step + 1]


def test_latents_have_the_sequence_of_their_images(latents, whole):
    assert global_batches(Latents(latents), 0, 30, world=2) == whole[:30]


def test_a_request_is_located_without_reading(images, whole):
    source = Images(images)
    found = [source.locate(5, Request(7, start, 1, BATCH)).indices[0] for start in range(BATCH)]
    assert found == whole[7][1]


def test_another_division_into_buckets_is_another_set(tmp_path):
    divided = write_set(tmp_path / "divided", sizes=[(8, 8, 8), (8, 8, 8)])
    joined = write_set(tmp_path / "joined", sizes=[(8, 8, 16)])
    assert checksum_samples(Images(divided)) != checksum_samples(Images(joined))


# Captions


def test_captions_are_a_function_of_seed_index_and_epoch(whole):
    read = Counter()
    for _, indices, captions in whole:
        for index, caption in zip(indices, captions):
            assert caption == draw_caption(captions_of(index), 5, index, read[index])
            read[index] += 1


def test_captions_are_chosen_in_proportion_to_their_weights(latents):
    """Of 60 x 50 captions three quarters, with a standard deviation of 0.8 %, are the first."""
    source = Latents(latents)
    indices = np.arange(60)
    first = 0
    for epoch in range(50):
        found = source.captions.add_captions(
            source.read(indices[:20]), indices, 1, np.full(60, epoch)
        )
        first += sum(caption.startswith("image") for caption in found.captions)
    assert first / 3000 == pytest.approx(0.75, abs=0.03)


def test_a_set_of_one_size_has_captions_by_epoch(tmp_path):
    path = write_set(tmp_path / "set", sizes=[(8, 8, 12)], buckets=False)
    batch = Images(path).take(5, 6, 12)  # the second half of epoch 0, the first half of epoch 1
    epochs = [0] * 6 + [1] * 6
    expected = []
    for index, epoch in zip(identify(batch).tolist(), epochs):
        expected.append(draw_caption(captions_of(index), 5, index, epoch))
    assert list(batch.captions) == expected


def test_text_features_are_those_of_the_captions(images):
    batch = next(iter(RankBatches(Images(images, text=TextLengths()), BATCH, 5)))
    lengths = [len(caption) for caption in batch.captions]
    assert batch.text.pooled.flatten().tolist() == lengths


def test_without_captions_a_batch_has_none(tmp_path):
    path = write_set(tmp_path / "set", captions=False)
    batch = next(iter(RankBatches(Images(path), BATCH, 5)))
    assert batch.captions is None
    assert batch.text is None


def test_features_of_a_set_without_captions_are_refused(tmp_path):
    path = write_set(tmp_path / "set", captions=False)
    with refused(path, "captions", "text"):
        Images(path, text=TextLengths())


def test_a_run_with_other_text_features_is_not_resumed(images):
    state = DataModule(Images(images, text=TextLengths(1.0)), batch=4).state_dict()
    with refused("data.source.text"):
        DataModule(Images(images, text=TextLengths(2.0)), batch=4).load_state_dict(state)


# Held-out batches


def test_held_out_batches_are_those_of_every_bucket(images):
    batches = RankBatches(BucketsInTurn(Images(images)), 16, 5, steps=6)
    found = [(batch.bucket, batch.step) for batch in batches]
    assert [name for name, _ in found] == [*NAMES, *NAMES]


def test_held_out_batches_do_not_depend_on_ranks(images):
    turns = BucketsInTurn(Images(images))
    expected = global_batches(turns, 0, 6)
    assert global_batches(turns, 0, 6, world=2) == expected
    assert [len(set(indices)) for _, indices, _ in expected] == [BATCH] * 6


# Refusals


def test_a_bucket_without_a_whole_batch_is_refused(images):
    with refused("data.batch", 14, "12x8", 13, "bucket_minimum", images):
        DataModule(Images(images), batch=14)


def test_a_small_held_out_bucket_is_accepted(images):
    data = DataModule(Images(images), batch=13, heldout=Images(images), heldout_batches=1)
    batches = list(RankBatches(BucketsInTurn(data.heldout), 16, 0, steps=3))
    assert [len(batch.x) for batch in batches] == [16] * 3


@pytest.mark.parametrize(
    "use",
    [
        lambda path: Mixed([Images(path)], [1]),
        lambda path: Dequantised(path),
        lambda path: list(read_all(Images(path), 4)),
        lambda path: Images(path).take(0, 0, 4),
    ],
    ids=["Mixed", "Dequantised", "read_all", "take"],
)
def test_what_needs_one_size_is_refused(images, use):
    with refused(images, *NAMES, "--buckets"):
        use(images)


def test_one_bucket_is_one_size(tmp_path):
    path = write_set(tmp_path / "set", sizes=[(12, 8, 12)])
    assert Mixed([Images(path)], [1]).take(0, 0, 4).x.shape == (4, 1, 8, 12)


def test_a_mixture_with_text_features_is_refused(tmp_path):
    path = write_set(tmp_path / "set", sizes=[(8, 8, 12)], buckets=False)
    with refused("Mixed", "text"):
        Mixed([Images(path, text=TextLengths())], [1])


def test_a_mixture_has_captions_of_the_sources_that_have_them(tmp_path):
    captioned = write_set(tmp_path / "captioned", sizes=[(8, 8, 12)], buckets=False)
    plain = write_set(tmp_path / "plain", sizes=[(8, 8, 12)], buckets=False, captions=False)
    mixed = Mixed([Images(captioned), Images(plain)], [1, 1])
    source_of, positions = mixed.locate(0, 0, 8)
    alone = Images(captioned).take(0, 0, 8).captions
    expected = []
    for source, position in zip(source_of, positions):
        expected.append("" if source else alone[position])
    assert list(mixed.take(0, 0, 8).captions) == expected
