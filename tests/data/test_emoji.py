"""The emoji set: its counts, held-out pictures, captions and files are those of its README."""

import io
import json
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.emoji import make
from data.emoji.make import FOLDER, STYLE_WORDS, Emoji
from tests.helpers.commands import REPOSITORY

APPLE = Emoji("1f34e", "red apple", "Food & Drink", "food-fruit")


@cache
def read_samples(split: str) -> list[dict[str, Any]]:
    """Return the samples of a split as webdataset reads them, with the facts of their .json."""
    tars = sorted(str(path) for path in (FOLDER / split).glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    return [{**sample, **json.loads(sample["json"])} for sample in samples]


def read_all_samples() -> list[dict[str, Any]]:
    """Return the samples of both splits."""
    return read_samples("train") + read_samples("heldout")


def styles_by_name(split: str) -> dict[str, set[str]]:
    """Return the styles of each name of a split."""
    styles = defaultdict(set)
    for sample in read_samples(split):
        styles[sample["name"]].add(sample["style"])
    return styles


@pytest.mark.parametrize(
    ("split", "counts"),
    [
        ("train", {"noto": 1839, "3d": 1537, "flat": 1840}),
        ("heldout", {"noto": 67, "3d": 67, "flat": 66}),
    ],
)
def test_styles_have_the_stated_counts(split, counts):
    assert Counter(sample["style"] for sample in read_samples(split)) == counts


def test_the_set_has_1906_names():
    assert len({sample["name"] for sample in read_all_samples()}) == 1906


def test_1604_names_have_all_styles():
    counts = Counter(sample["name"] for sample in read_all_samples())
    assert Counter(counts.values()) == {3: 1604, 2: 302}


def test_a_key_occurs_once():
    keys = [sample["__key__"] for sample in read_all_samples()]
    assert len(set(keys)) == len(keys)


def test_a_held_out_name_is_in_train_in_its_two_other_styles():
    train = styles_by_name("train")
    for name, styles in styles_by_name("heldout").items():
        assert len(styles) == 1
        assert train[name] == set(STYLE_WORDS) - styles, name


def test_no_held_out_picture_is_in_train():
    train = {sample["webp"] for sample in read_samples("train")}
    assert not any(sample["webp"] in train for sample in read_samples("heldout"))


def test_no_key_has_a_skin_tone():
    tones = {f"{ord(tone):x}" for tone in make.SKIN_TONES}
    for sample in read_all_samples():
        assert not tones & set(sample["__key__"].split("-")), sample["name"]


def test_pictures_are_lossless_rgb_of_64_pixels():
    for sample in read_all_samples():
        image = Image.open(io.BytesIO(sample["webp"]))
        assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB")
        assert sample["webp"][12:16] == b"VP8L", sample["__key__"]  # the lossless kind of WebP


def test_pictures_decode_to_more_than_white():
    for sample in read_samples("heldout"):
        pixels = np.asarray(Image.open(io.BytesIO(sample["webp"])))
        assert pixels.min() < 250, sample["__key__"]


def test_captions_have_the_name_and_a_weight():
    for sample in read_all_samples():
        assert [caption["weight"] for caption in sample["captions"]] == [3, 1, 1]
        for caption in sample["captions"]:
            assert sample["name"] in caption["text"]
            assert caption["text"].isprintable()


def test_all_captions_but_the_last_have_the_style():
    for sample in read_all_samples():
        first, second, last = (caption["text"] for caption in sample["captions"])
        assert first.startswith(f"a {sample['style']} emoji of ")
        assert second.endswith(f", {sample['style']} emoji")
        assert last == first.replace(f"a {sample['style']}", "an", 1)


def test_tars_have_the_listed_checksums():
    assert make.list_checksums(FOLDER) == (FOLDER / "SHA256SUMS").read_text()


def test_all_tars_together_have_less_than_26_mb():
    assert sum(path.stat().st_size for path in FOLDER.glob("*/*.tar")) < 26e6


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Apache-2.0.txt", "Apache License"),
        ("MIT.txt", "Microsoft Corporation"),
        ("CC-BY-4.0.txt", "Attribution 4.0 International"),
    ],
)
def test_the_licences_are_beside_the_pictures(name, words):
    assert words in (FOLDER / "LICENSES" / name).read_text()


def test_the_contact_sheet_is_small():
    assert (REPOSITORY / "docs/emoji.png").stat().st_size < 300_000


def test_every_name_with_a_listed_article_is_in_the_set():
    names = {sample["name"] for sample in read_all_samples()}
    listed = {name for group in make.ARTICLES.values() for name in group}
    assert listed <= names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (":red_apple:", "red apple"),
        (":family_man_girl_boy:", "family: man, girl, boy"),
        (":couple_with_heart_man_man:", "couple with heart: man, man"),
        (":kiss_mark:", "kiss mark"),
        (":woman_red_hair:", "woman: red hair"),
        (":man_bald:", "man: bald"),
    ],
)
def test_names_get_their_punctuation(text, name):
    assert make.clean_name(text) == name


@pytest.mark.parametrize(
    ("name", "subcategory", "shown"),
    [
        ("red apple", "food-fruit", "a red apple"),
        ("eye", "body-parts", "an eye"),
        ("unicorn", "animal-mammal", "a unicorn"),
        ("hourglass done", "time", "an hourglass done"),
        ("grapes", "food-fruit", "grapes"),
        ("Statue of Liberty", "place-building", "the Statue of Liberty"),
        ("Chad", "country-flag", "the flag of Chad"),
        ("Netherlands", "country-flag", "the flag of the Netherlands"),
        ("Leo", "zodiac", "the zodiac sign Leo"),
        ("one-thirty", "time", "a clock at one-thirty"),
    ],
)
def test_an_emoji_is_described_in_english(name, subcategory, shown):
    assert make.describe_emoji(Emoji("0", name, "", subcategory)) == shown


def test_captions_of_a_red_apple():
    texts = [caption.text for caption in make.write_captions(APPLE, "flat")]
    assert texts == [
        "a flat emoji of a red apple",
        "a red apple, flat emoji",
        "an emoji of a red apple",
    ]


def test_a_transparent_picture_becomes_white_at_64_pixels():
    buffer = io.BytesIO()
    Image.new("RGBA", (256, 264)).save(buffer, "PNG")
    webp = make.convert_picture(buffer.getvalue(), ".png", "empty")
    pixels = np.asarray(Image.open(io.BytesIO(webp)))
    assert pixels.shape == (64, 64, 3)
    assert (pixels == 255).all()


def test_the_table_is_read_in_the_order_of_unicode():
    entry = {"category": "Food & Drink", "subcategory": "food-fruit"}
    table = [
        {**entry, "unified": "1F34F", "sort_order": 2},
        {**entry, "unified": "1F34E", "sort_order": 1},
        {**entry, "unified": "1F3FB", "sort_order": 0},
    ]
    names = {"1f34e": "red apple", "1f34f": "green apple"}
    found = make.list_emoji(json.dumps(table).encode(), names)
    assert [emoji.name for emoji in found] == ["red apple", "green apple"]


def test_the_same_pictures_give_the_same_tars(tmp_path: Path):
    picture = make.Picture(APPLE, "flat", b"webp")
    make.write_tars(tmp_path / "a/train", [picture])
    make.write_tars(tmp_path / "b/train", [picture])
    assert make.list_checksums(tmp_path / "a") == make.list_checksums(tmp_path / "b")
