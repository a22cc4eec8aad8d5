"""Captions: cleaned alike whatever they come from, stored as JSON, drawn in proportion."""

import json
from collections import Counter

import pytest

from data.captions import (
    MAX_LENGTH,
    Caption,
    captions_from_json,
    captions_to_json,
    checksum_captions,
    clean_captions,
    draw_caption,
)
from tests.helpers.refusals import refused


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("  a cat\t", "a cat"),
        ("\ufeffa cat", "a cat"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("שלום 👩‍🚀", "שלום 👩‍🚀"),
    ],
)
def test_blanks_and_line_ends_are_cleaned(text, cleaned):
    assert clean_captions([Caption(text, 2)], "test") == (Caption(cleaned, 2.0),)


def test_empty_captions_are_left_out():
    assert clean_captions([Caption(""), Caption(" \n"), Caption("a")], "test") == (Caption("a"),)


def test_equal_captions_are_one_with_the_sum_of_their_weights():
    captions = [Caption("a", 2), Caption("b"), Caption(" a ", 0.5)]
    assert clean_captions(captions, "test") == (Caption("a", 2.5), Caption("b", 1.0))


def test_the_longest_caption_is_read():
    (caption,) = clean_captions([Caption("x" * MAX_LENGTH)], "test")
    assert len(caption.text) == 8192


def test_longer_captions_are_refused():
    with refused("1.txt", "10,000", "8,192", kind=ValueError):
        clean_captions([Caption("x" * 10000)], "1.txt")


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_weights_are_positive(weight):
    with refused("list.csv: line 3", weight, kind=ValueError):
        clean_captions([Caption("a", weight)], "list.csv: line 3")


def test_half_of_a_character_is_refused():
    with refused("1.json", "ud83d", kind=ValueError):
        clean_captions([Caption("moon \ud83d")], "1.json")


def test_captions_are_read_as_they_are_stored():
    captions = (Caption("a\n'b'", 1.0), Caption("👩‍🚀", 0.25))
    data = json.dumps({"captions": captions_to_json(captions), "name": "x"}).encode()
    assert captions_from_json(data, "test") == captions


@pytest.mark.parametrize(
    "data, named",
    [
        (b"{", "not valid"),
        (b"{}", "captions"),
        (b'{"captions": ["a"]}', "captions[0]"),
        (b'{"captions": [{"text": "a"}]}', "weight"),
    ],
)
def test_damaged_captions_of_a_set_are_refused(data, named):
    with refused("sample 7", named, kind=ValueError):
        captions_from_json(data, "sample 7")


def test_the_checksum_covers_texts_weights_and_images():
    images = [
        [(Caption("a"),), ()],
        [(), (Caption("a"),)],
        [(Caption("a", 2.0),), ()],
        [(Caption("a"), Caption("b")), ()],
        [(Caption("a"),), (Caption("b"),)],
    ]
    assert len({checksum_captions(captions) for captions in images}) == len(images)


def test_a_caption_is_chosen_in_proportion_to_its_weight():
    captions = (Caption("a", 3.0), Caption("b", 1.0))
    counts = Counter(draw_caption(captions, 0, i, 0) for i in range(4000))
    assert counts["a"] == pytest.approx(3000, abs=110)  # 4 standard deviations


def test_the_draw_is_a_function_of_seed_index_and_epoch():
    captions = tuple(Caption(str(i)) for i in range(1000))
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    texts = [draw_caption(captions, *key) for key in keys]
    assert texts == [draw_caption(captions, *key) for key in keys]
    assert len(set(texts)) == len(keys)


def test_without_captions_the_caption_is_empty():
    assert draw_caption((), 0, 0, 0) == ""
