"""Listings: every source of captioned images gives the same captions, and bad input is refused."""

import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.captions import Caption
from data.folders import find_images
from data.listings import ListingOptions, list_images
from data.listings.folder import checksum_files
from data.pack import pack
from tests.helpers.captioned import (
    NAMES,
    STORAGES,
    TEXTS,
    expected_captions,
    picture,
    pixels_of_picture,
    write_csv,
    write_jsonl,
    write_metadata_jsonl,
    write_our_set,
    write_pictures,
    write_sidecar_text,
    write_tar,
)
from tests.helpers.refusals import refused

THREE = ["0.png", "1.png", "2.png"]


@pytest.fixture
def photos(tmp_path):
    """Return a folder of three pictures."""
    return write_pictures(tmp_path / "photos", THREE)


def listed(images, **options):
    """Return the listing of images; a quarter of them may have no caption."""
    options = {"uncaptioned": 0.25, **options}
    return list_images(images, ListingOptions(**options), images.parent / "out")


def captions_of(listing):
    """Return the texts of the captions of each image."""
    return [[caption.text for caption in item.captions] for item in listing.items]


def write_list(folder, captions, names=THREE):
    """Write list.jsonl, with captions of pictures."""
    lines = [{"file_name": name, "caption": text} for name, text in zip(names, captions)]
    return write_jsonl(folder / "list.jsonl", lines)


# Every way to store captions.


@pytest.mark.parametrize("name", STORAGES)
def test_every_storage_gives_the_same_captions_and_images(tmp_path, name):
    storage = STORAGES[name]
    images = storage.write(tmp_path / "pictures")
    listing = list_images(images, storage.options(), tmp_path / "out")
    assert [item.captions for item in listing.items] == expected_captions()
    for i, item in enumerate(listing.items):
        assert np.array_equal(item.open().convert("RGB"), pixels_of_picture(i)), item.name
    assert listing.classes is None


def test_storages_of_every_kind_are_packed_into_the_same_bytes(tmp_path):
    found = set()
    kinds = ("JSON files", "CSV", "parquet of Hugging Face", "tars of img2dataset", "our set")
    for name in kinds:
        storage = STORAGES[name]
        images = storage.write(tmp_path / name)
        options = storage.options()._asdict()
        chosen = {key: options[key] for key in ("captions", "classes", "uncaptioned")}
        out = tmp_path / f"set of {name}"
        pack(out, images, size=4, holdout=0, **chosen)
        manifest = json.loads((out / "train/manifest.json").read_text())
        found.add((manifest["captions"], manifest["shards"][0]["sha256"]))
    assert len(found) == 1


@pytest.mark.parametrize("name", STORAGES)
def test_items_can_be_sent_to_another_process(tmp_path, name):
    storage = STORAGES[name]
    listing = list_images(storage.write(tmp_path / "x"), storage.options(), tmp_path / "out")
    item = pickle.loads(pickle.dumps(listing.items[-1]))
    assert np.array_equal(item.open().convert("RGB"), pixels_of_picture(len(TEXTS) - 1))


def test_the_counts_of_captions_are_printed(tmp_path):
    listing = listed(write_metadata_jsonl(tmp_path / "x"))
    assert listing.lines == [
        "captions: 'text' of metadata.jsonl (9 images)",
        "captions per image: 8 have 1, 1 have 2, 3 have none, such as 06.png",
    ]


def test_lists_keep_their_order(photos):
    listing = listed(write_list(photos, ["b", "a"], ["2.png", "0.png"]))
    assert [item.name for item in listing.items] == ["2.png", "0.png"]
    assert captions_of(listing) == [["b"], ["a"]]


# Folders without captions.


def test_a_folder_without_captions_is_listed_as_before(tmp_path):
    photos = write_pictures(tmp_path / "photos", ["cat/0.png", "dog/1.png"])
    (photos / "cat/0.json").write_text('{"boxes": []}')
    (photos / "cat/0.xml").write_text("<a/>")
    listing = listed(photos)
    found = find_images(photos)
    assert listing.checksum == checksum_files(photos, [str(name) for name in found.names])
    assert [item.label for item in listing.items] == [0, 1]
    assert listing.classes == ["cat", "dog"]
    assert dict(listing.passed_over) == {".json": 1, ".xml": 1}
    assert listing.captions is None
    assert listing.lines == []


def test_none_reads_no_captions(tmp_path):
    photos = write_sidecar_text(tmp_path / "x")
    listing = listed(photos, captions="none")
    assert listing.captions is None
    assert listing.checksum == checksum_files(photos, NAMES)
    assert listing.passed_over[".txt"] == len(list(photos.glob("*.txt")))


def test_captions_change_the_checksum(photos):
    before = listed(photos).checksum
    (photos / "0.txt").write_text("a")
    first = listed(photos, uncaptioned=1).checksum
    (photos / "0.txt").write_text("b")
    second = listed(photos, uncaptioned=1).checksum
    assert len({before, first, second}) == 3


def test_text_files_of_numbers_are_boxes_and_no_captions(photos):
    for name in THREE:
        (photos / name).with_suffix(".txt").write_text("0 0.5 0.5 0.25 1e-1\n")
    listing = listed(photos)
    assert listing.captions is None
    assert "3 text files hold numbers" in listing.lines[0]
    assert captions_of(listed(photos, captions="txt"))[0] == ["0 0.5 0.5 0.25 1e-1"]


def test_labelled_folders_have_captions_and_classes(tmp_path):
    photos = write_pictures(tmp_path / "photos", ["cat/0.png", "dog/1.png"])
    (photos / "cat/0.txt").write_text("a cat")
    (photos / "dog/1.txt").write_text("a dog")
    listing = listed(photos)
    assert captions_of(listing) == [["a cat"], ["a dog"]]
    assert listing.classes == ["cat", "dog"]


# Several captions, their names and weights.


def test_weights_of_columns_and_captions_are_multiplied(photos):
    rows = [{"path": name, "long": [{"text": "l", "weight": 2}], "alt": "s"} for name in THREE]
    listing = listed(write_jsonl(photos / "list.jsonl", rows), captions="long=3,alt")
    assert listing.items[0].captions == (Caption("l", 6.0), Caption("s", 1.0))


def test_the_first_common_name_with_a_text_is_read_and_others_are_named(photos):
    rows = [
        ["file_name", "TEXT", "caption"],
        ["0.png", "t", "c"],
        ["1.png", "t", ""],
        ["2.png", "", "c"],
    ]
    listing = listed(write_csv(photos / "list.csv", rows))
    assert captions_of(listing) == [["c"], ["t"], ["c"]]
    assert "'TEXT' of list.csv (1 images), 'caption' of list.csv (2 images)" in listing.lines[1]
    rows = [row[:] for row in rows]
    rows[2][2] = "c"
    listing = listed(write_csv(photos / "list.csv", rows))
    assert "--captions caption,TEXT" in listing.lines[2]


def test_lines_of_text_files_are_captions(photos):
    for name in THREE:
        (photos / name).with_suffix(".txt").write_bytes(b"one\r\n\r\n two\nthree\n")
    assert captions_of(listed(photos, lines=True)) == [["one", "two", "three"]] * 3
    listing = listed(photos)
    assert captions_of(listing)[0] == ["one\n\n two\nthree"]
    assert "3 text files have several lines" in listing.lines[-1]
    assert "--lines" in listing.lines[-1]


def test_lines_without_text_files_are_refused(photos):
    with refused("lines", ".txt", kind=ValueError):
        listed(write_list(photos, "abc"), lines=True)


@pytest.mark.parametrize("names", ["", "a,", "a,a", "a=0", "a=-1", "a=x", "a=inf"])
def test_names_and_weights_of_captions_are_checked(photos, names):
    with refused("captions", repr(names), kind=ValueError):
        listed(photos, captions=names)


# Classes and kept values.


def test_class_values_are_sorted_as_text_or_by_numbers(photos):
    rows = [{"file_name": n, "kind": k} for n, k in zip(THREE, ["x10", "x2", "x10"])]
    images = write_jsonl(photos / "list.jsonl", rows)
    listing = listed(images, captions="none", class_field="kind")
    assert listing.classes == ["x10", "x2"]
    assert [item.label for item in listing.items] == [0, 1, 0]
    listing = listed(images, captions="none", class_field="kind", natural=True)
    assert listing.classes == ["x2", "x10"]


@pytest.mark.parametrize("convert", [int, str])
def test_whole_numbers_are_classes_in_their_order(photos, convert):
    rows = [{"file_name": n, "label": convert(k)} for n, k in zip(THREE, [10, 2, 0])]
    images = write_jsonl(photos / "list.jsonl", rows)
    listing = listed(images, captions="none", class_field="label")
    assert listing.classes == ["0", "2", "10"]
    assert [item.label for item in listing.items] == [2, 1, 0]


def test_an_image_without_a_class_is_refused(photos):
    rows = [{"file_name": n, "kind": k} for n, k in zip(THREE, ["a", None, " "])]
    images = write_jsonl(photos / "list.jsonl", rows)
    with refused("1.png", "kind", "2 of 3", kind=ValueError):
        listed(images, captions="none", class_field="kind")


def test_values_are_kept_with_images(photos):
    for i, name in enumerate(THREE):
        text = json.dumps({"caption": "c", "style": ["flat", i], "other": 1})
        (photos / name).with_suffix(".json").write_text(text)
    listing = listed(photos, keep=("style",))
    assert [item.kept for item in listing.items] == [{"style": ["flat", i]} for i in range(3)]


def test_values_that_json_cannot_store_are_refused(photos):
    table = pa.table({"path": THREE, "text": THREE, "day": pa.array([0, 1, 2], pa.date32())})
    pq.write_table(table, photos / "list.parquet")
    with refused("row 0", "day", "date", kind=ValueError):
        listed(photos / "list.parquet", keep=("day",))


def test_entries_of_a_sample_cannot_be_kept(photos):
    with refused("keep", "captions", kind=ValueError):
        listed(photos, keep=("captions",))


# Tars.


def samples_of_tar(**fields):
    """Return three samples with a picture and further fields."""
    samples = []
    for i in range(3):
        extra = {field: values[i] for field, values in fields.items() if values[i] is not None}
        samples.append((f"{i}", {"png": picture(i), **extra}))
    return samples


def test_classes_of_tars_are_their_numbers(tmp_path):
    tar = write_tar(tmp_path / "x/0.tar", samples_of_tar(cls=[b"1", b"0", b"1"], txt=[b"c"] * 3))
    listing = listed(tar)
    assert [item.label for item in listing.items] == [1, 0, 1]
    assert listing.classes == ["0", "1"]
    assert captions_of(listing) == [["c"]] * 3
    assert listed(tar, classes="none").classes is None


def test_tars_need_no_captions(tmp_path):
    listing = listed(write_tar(tmp_path / "x/0.tar", samples_of_tar()))
    assert len(listing.items) == 3
    assert listing.captions is None


def test_classes_of_some_samples_are_refused(tmp_path):
    tar = write_tar(tmp_path / "x/0.tar", samples_of_tar(cls=[b"1", None, b"1"]))
    with refused("0.tar: 1", ".cls", "--classes none", kind=ValueError):
        listed(tar)


def test_an_unfinished_set_is_refused(tmp_path):
    folder = write_our_set(tmp_path / "set")
    (folder / "manifest.json").unlink()
    with refused(folder, "unfinished", kind=ValueError):
        listed(folder)


def test_several_images_of_a_sample_need_a_field(tmp_path):
    tar = write_tar(tmp_path / "x/0.tar", samples_of_tar(webp=[picture(5)] * 3))
    with refused(tar, "png", "webp", "`image_column`", kind=ValueError):
        listed(tar)
    image = listed(tar, image_column="webp").items[0].open()
    assert np.array_equal(image.convert("RGB"), pixels_of_picture(5))


# Bad input.


def test_no_caption_anywhere_is_refused(photos):
    with refused(photos, "txt", "--captions", kind=ValueError):
        listed(photos, captions="txt")
    with refused("caption", "file_name", "--captions none", kind=ValueError):
        listed(write_list(photos, [None, "", " "]), uncaptioned=1)
    assert listed(write_list(photos, [None] * 3), captions="none").captions is None


def test_too_many_images_without_a_caption_are_refused(photos):
    images = write_list(photos, ["a", None, ""])
    with refused("2 of 3", "1.png", "--uncaptioned 0.67", "--captions none", kind=ValueError):
        listed(images)
    assert captions_of(listed(images, uncaptioned=0.67)) == [["a"], [], []]


def test_images_that_metadata_lacks_have_no_caption(photos):
    write_jsonl(photos / "metadata.jsonl", [{"file_name": "1.png", "text": "a"}])
    assert captions_of(listed(photos, uncaptioned=0.7)) == [[], ["a"], []]


def test_long_captions_are_refused_by_file(photos):
    (photos / "1.txt").write_text("x" * 10000)
    with refused(photos / "1.txt", "10,000", "--captions none", kind=ValueError):
        listed(photos)


def test_text_that_is_not_utf8_is_refused_by_file_and_byte(photos):
    (photos / "1.txt").write_bytes("caf\xe9".encode("latin-1"))
    with refused(photos / "1.txt", "UTF-8", "byte 3", "0xe9", kind=ValueError):
        listed(photos)


def test_a_csv_that_is_not_utf8_is_refused_by_line_and_byte(photos):
    (photos / "list.csv").write_bytes(b"file_name,text\n0.png,a\n1.png,\xff\n")
    with refused("list.csv: line 3", "byte 6", kind=ValueError):
        listed(photos / "list.csv")


def test_captions_without_an_image_are_refused(photos):
    for name in ("0.txt", "1.txt", "2.txt", "3.txt"):
        (photos / name).write_text("a")
    (photos / "README.txt").write_text("what this is")
    with refused(photos / "3.txt", "1 of 4", kind=ValueError):
        listed(photos)


def test_rows_without_an_image_are_refused(photos):
    write_jsonl(
        photos / "metadata.jsonl", [{"file_name": n, "text": "a"} for n in [*THREE, "3.png"]]
    )
    with refused("metadata.jsonl: line 4", "3.png", kind=ValueError):
        listed(photos)
    images = write_list(photos, "abcd", [*THREE, "3.png"])
    with refused("list.jsonl: line 4", "3.png", kind=ValueError):
        listed(images)


def test_metadata_cannot_name_files_elsewhere(tmp_path):
    write_pictures(tmp_path, THREE)
    photos = write_pictures(tmp_path / "photos", ["0.png"])
    write_jsonl(photos / "metadata.jsonl", [{"file_name": "../1.png", "text": "a"}] * 2)
    assert listed(photos).captions is None
    with refused("metadata.jsonl: line 1", "../1.png", kind=ValueError):
        listed(photos, captions="text")


def test_duplicates_are_refused_by_row(photos):
    images = write_list(photos, "abc", ["0.png", "./0.png", str(photos / "0.png")])
    with refused("line 2", "line 3", "0.png", "a second time", kind=ValueError):
        listed(images)


def test_wrong_entries_within_the_tolerance_are_left_out(photos):
    images = write_list(photos, ["a", "x" * 9000, "c", "d"], [*THREE, "3.png"])
    listing = listed(images, tolerance=0.5)
    assert [item.name for item in listing.items] == ["0.png", "2.png"]
    assert listing.passed_over["wrong entries"] == 2
    for part in ("left out 2", "line 2: caption", "line 4: 3.png"):
        assert part in listing.lines[-1]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_columns_that_a_list_lacks_are_refused_with_those_that_it_has(photos, suffix):
    path = photos / f"list.{suffix}"
    columns = {"where": THREE, "words": THREE}
    if suffix == "csv":
        write_csv(path, [list(columns), *map(list, zip(*columns.values()))])
    elif suffix == "jsonl":
        write_jsonl(path, [dict(zip(columns, row)) for row in zip(*columns.values())])
    else:
        pq.write_table(pa.table(columns), path)
    with refused(path, "where, words", "--image_column", kind=ValueError):
        listed(path)
    with refused(path, "'what'", "--image_column", "where, words", kind=ValueError):
        listed(path, image_column="what")
    with refused(path, "where, words", "--captions", kind=ValueError):
        listed(path, image_column="where")
    with refused(path, "'alt'", "--captions", "where, words", kind=ValueError):
        listed(path, image_column="where", captions="alt")
    with refused(path, "'kind'", "--class_field", "where, words", kind=ValueError):
        listed(path, image_column="where", captions="words", class_field="kind")
    assert captions_of(listed(path, image_column="where", captions="words"))[0] == ["0.png"]


@pytest.mark.parametrize("value", [5, 1.5, True, {"a": 1}, ["a", 5], [["a"]]])
def test_captions_that_are_no_text_are_refused(photos, value):
    images = write_list(photos, ["a", value, "c"])
    with refused("list.jsonl: line 2: caption", "text", kind=ValueError):
        listed(images)


BROKEN_LISTS = {
    "broken line": ("list.jsonl", '{"file_name": "0.png", "text": "a"}\n{"file_name":\n', "line 2"),
    "no object": ("list.jsonl", '{"file_name": "0.png", "text": "a"}\n[1]\n', "line 2"),
    "empty": ("list.csv", "", "empty"),
    "empty lines": ("list.jsonl", "\n", "no JSON object"),
    "field too many": ("list.csv", "file_name,text\n0.png,a\n1.png,a,b\n", "line 3"),
    "quotes": ("list.csv", 'file_name,text\n0.png,"a\n1.png,b\n', "line 2"),
    "column twice": ("list.csv", "path,text,text\n0.png,a,b\n", "'text'"),
    "no list": ("list.json", '{"images": []}', "list"),
    "path missing": ("list.csv", "file_name,text\n0.png,a\n,a\n", "line 3: file_name"),
    "URL": ("list.csv", "path,text\nhttp://host/0.png,a\n", "img2dataset"),
    "folder": ("list.csv", "path,text\n.,a\n", "is no file"),
    "parquet": ("list.parquet", "PAR1", "list.parquet"),
    "other file": ("list.xlsx", "PK", "list.xlsx"),
}


@pytest.mark.parametrize("name", BROKEN_LISTS)
def test_broken_lists_are_refused(photos, name):
    file, text, named = BROKEN_LISTS[name]
    (photos / file).write_text(text)
    with refused(photos / file, named, kind=ValueError):
        listed(photos / file)


def test_a_missing_path_is_refused(tmp_path):
    with refused(tmp_path / "x", kind=OSError):
        listed(tmp_path / "x")


def test_folder_classes_are_for_folders(photos):
    with refused("classes", "--class_field", kind=ValueError):
        listed(write_list(photos, "abc"), classes="top")


def test_json_that_is_broken_is_refused_if_others_are_captions(photos):
    for name in ("0.json", "2.json"):
        (photos / name).write_text('{"caption": "a"}')
    (photos / "1.json").write_text('{"caption": ')
    with refused(photos / "1.json", "JSON", kind=ValueError):
        listed(photos)


def test_links_are_listed_by_their_names(photos):
    os.symlink(photos / "0.png", photos / "3.png")
    listing = listed(write_list(photos, "abcd", [*THREE, "3.png"]))
    assert listing.items[3].name == "3.png"
