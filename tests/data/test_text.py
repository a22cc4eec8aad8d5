"""Text features read from a cache, and the captions that it is made of."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from data.files import read_json, sample_checksum, write_json
from data.text import (
    TextCache,
    check_same_embeddings,
    find_captioned_sets,
    find_distinct_captions,
    text_sample,
)
from tests.helpers.refusals import refused
from tests.helpers.text_sets import write_cache, write_captions

TEXTS = ["", "a", "abc", "a red apple \U0001f34e", "two\nlines", "x" * 700]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return TextCache(str(write_cache(tmp_path_factory.mktemp("cache") / "text", TEXTS, shard=2)))


def test_tokens_are_padded_to_the_longest_text_of_the_cache(cache):
    found = cache.features(["abc", "", "abc"])
    assert found.tokens.shape == (3, 701, 3)
    assert found.mask.sum(1).tolist() == [4, 1, 4]
    expected = torch.where(found.mask[..., None], torch.tensor([3.0, 0, 3])[:, None, None], 0.0)
    assert torch.equal(found.tokens, expected.expand_as(found.tokens))


def test_pooled_embeddings_are_those_of_the_texts(cache):
    found = cache.features(TEXTS)
    assert found.pooled.tolist() == [[len(text), 1.0] for text in TEXTS]
    assert found.pooled.dtype == torch.float32


def test_a_worker_reads_what_its_process_reads(cache):
    cache.features(["a"])
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.features(TEXTS).pooled, cache.features(TEXTS).pooled)


def test_captions_with_equal_checksums_are_compared_in_full(tmp_path):
    cache = TextCache(str(write_cache(tmp_path, TEXTS)))
    cache._checksums[:] = np.uint64(sample_checksum(b"abc"))
    assert cache.features(["abc"]).pooled.tolist() == [[3, 1.0]]


def test_a_caption_without_embedding_is_refused(cache):
    with refused(cache.path, "a blue apple", "rectify encode --text", kind=ValueError):
        cache.features(["a", "a blue apple"])


def test_another_set_is_no_cache(tmp_path):
    write_captions(tmp_path, [["a"]])
    with refused(tmp_path, "images", "text", kind=ValueError):
        TextCache(str(tmp_path))


def test_damaged_offsets_are_refused(cache, tmp_path):
    bad = shutil.copytree(cache.path, tmp_path / "bad")
    data = bytearray((bad / "000001.npy").read_bytes())
    data[-1] ^= 1
    (bad / "000001.npy").write_bytes(data)
    with refused(bad / "000001.npy", kind=ValueError):
        TextCache(str(bad))


def test_distinct_captions_are_in_the_order_of_their_first_occurrence(tmp_path):
    write_captions(tmp_path / "b", [["dog"], [], ["cat", "dog"], ["cat"], ["ünï\ncode"]], shard=2)
    write_captions(tmp_path / "a", [["bird"], ["cat"]], kind="latents")
    write_cache(tmp_path / "text", ["x"])
    sets = find_captioned_sets(tmp_path)
    assert sets == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert find_distinct_captions(sets) == ["", "bird", "cat", "dog", "ünï\ncode"]


def test_a_set_without_captions_is_refused(tmp_path):
    write_captions(tmp_path / "set", [["dog"]])
    manifest = read_json(tmp_path / "set/manifest.json")
    manifest.pop("captions")
    write_json(tmp_path / "set/manifest.json", manifest)
    for folder in (tmp_path / "set", tmp_path):
        with refused(tmp_path / "set", "captions", kind=ValueError):
            find_captioned_sets(folder)


def test_damaged_captions_are_refused(tmp_path):
    write_captions(tmp_path, [["dog"], ["cat"]])
    data = (tmp_path / "000000.tar").read_bytes()
    (tmp_path / "000000.tar").write_bytes(data.replace(b'"cat"', b'"cut"'))
    with refused(tmp_path / "000000.tar", kind=ValueError):
        find_distinct_captions([str(tmp_path)])


def test_a_folder_without_sets_is_refused(tmp_path):
    with refused(tmp_path, "manifest.json", kind=OSError):
        find_captioned_sets(tmp_path)


@pytest.mark.parametrize("value", [70000, float("nan")])
def test_an_embedding_that_overflows_float16_is_refused(value):
    with refused("a red apple", value, "float16", "init_args.text", kind=ValueError):
        text_sample("0", "a red apple", None, np.array([1.0, value], np.float32))


def test_a_source_of_other_embeddings_is_named_by_what_differs():
    before = {"class": "BertModel", "weights": "a" * 64, "max_tokens": 128}
    check_same_embeddings(before, dict(before), "runs/teacher")
    with refused("runs/teacher", "encoder.max_tokens", 128, 77, kind=ValueError):
        check_same_embeddings(before, {**before, "max_tokens": 77}, "runs/teacher")
