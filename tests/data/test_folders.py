"""Folders of images: which files are read, which classes they have, and what is passed over."""

import os
from pathlib import PurePath

import numpy as np
import pytest
from PIL import Image

from data.folders import describe_classes, describe_passed_over, find_images
from data.images import Images
from data.pack import pack
from tests.helpers.commands import run_command
from tests.helpers.refusals import assert_refused, refused


def write(folder, *names):
    """Write a small image under each name; return the folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, "PNG")
    return folder


def found_names(folder, **options):
    """Return the names of the images that are found."""
    return [str(name) for name in find_images(folder, **options).names]


def test_links_are_followed_once(tmp_path):
    elsewhere = write(tmp_path / "elsewhere", "1.png", "2.png")
    photos = write(tmp_path / "photos", "cat/0.png")
    (photos / "dog").symlink_to(elsewhere)
    (photos / "dog/loop").symlink_to(photos)
    (photos / "cat/link.png").symlink_to(elsewhere / "1.png")
    found = find_images(photos)
    assert [str(name) for name in found.names] == [
        "cat/0.png",
        "cat/link.png",
        "dog/1.png",
        "dog/2.png",
    ]
    assert found.labels == [0, 0, 1, 1]
    assert dict(found.passed_over) == {"links to a folder that is read already": 1}


def test_folders_that_link_each_other_are_read_once(tmp_path):
    for i in range(12):
        write(tmp_path, f"{i:02d}/0.png")
    for i in range(12):
        for k in range(12):
            (tmp_path / f"{i:02d}/to{k:02d}").symlink_to(tmp_path / f"{k:02d}")
    found = find_images(tmp_path)
    assert [str(name) for name in found.names] == [f"{i:02d}/0.png" for i in range(12)]
    assert found.labels == list(range(12))
    assert dict(found.passed_over) == {"links to a folder that is read already": 144}


def test_a_link_to_nothing_is_an_error(tmp_path):
    photos = write(tmp_path, "cat/0.png", "dog/0.png")
    (photos / "fox").symlink_to(tmp_path / "nowhere")
    with refused(photos / "fox", kind=OSError):
        find_images(photos)


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    photos = write(tmp_path, "cat/0.png", "dog/0.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with refused(photos / "dog", kind=PermissionError):
        find_images(photos)


def test_suffixes_are_those_that_pillow_reads(tmp_path):
    kinds = ("jfif", "jpe", "avif", "jp2", "ppm", "tga", "apng", "bmp", "TIF", "JPG")
    names = [f"{i}.{kind}" for i, kind in enumerate(kinds)]
    write(tmp_path, *names, "photo")
    assert sorted(found_names(tmp_path)) == sorted([*names, "photo"])


def test_what_is_no_image_is_counted_by_kind(tmp_path, capsys):
    photos = write(tmp_path / "photos", "cat/0.png", "dog/0.png")
    for name in ("cat/0.txt", "dog/0.txt", "cat/1.heic", "README", "x.eps", "cat/.DS_Store"):
        (photos / name).write_text("PS: no image")
    write(photos, "@eaDir/0.png", "__MACOSX/cat/0.png", ".ipynb_checkpoints/0.png", "cat/._0.png")
    pack(tmp_path / "set", photos, size=4, holdout=0, captions="none")
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pack: 2 images; passed over: ")
    for part in (
        "2 .txt",
        "1 .heic",
        "1 .eps",
        "1 without a suffix",
        "2 folders of the system",
        "3 hidden",
    ):
        assert part in line


def test_the_classes_are_printed_with_their_counts(tmp_path, capsys):
    photos = write(tmp_path / "photos", "cat/0.png", "cat/1.png", "dog/0.png")
    pack(tmp_path / "set", photos, size=4, holdout=0)
    assert "pack: 2 classes: cat (2), dog (1)" in capsys.readouterr().err


def test_images_of_one_name_are_mentioned(tmp_path, capsys):
    photos = write(tmp_path / "photos", "cat/0.jpg", "cat/0.png", "dog/0.png", "dog/1.webp")
    pack(tmp_path / "set", photos, size=4, holdout=0)
    assert "pack: 1 images have the name of another one, such as cat/0.jpg and cat/0.png" in (
        capsys.readouterr().err
    )
    assert len(Images(str(tmp_path / "set/train"))) == 4


def test_the_classes_are_one_line(tmp_path):
    found = find_images(write(tmp_path, "日本/0.png", "x\ny/0.png"))
    line = describe_classes(found.classes, found.labels)
    assert line == "2 classes: 'x\\ny' (1), 日本 (1)"


def test_alphabetical_order_is_mentioned_if_numbers_are_out_of_order(tmp_path):
    photos = write(tmp_path, "1/a.png", "2/a.png", "10/a.png")
    found = find_images(photos)
    assert found.classes == ["1", "10", "2"]
    assert "--natural" in describe_classes(found.classes, found.labels)
    found = find_images(photos, natural=True)
    assert found.classes == ["1", "2", "10"]
    assert found.labels == [0, 2, 1]
    assert "--natural" not in describe_classes(found.classes, found.labels)


@pytest.mark.parametrize(
    "names",
    [
        ("train/cat", "test/cat"),
        ("Train/cat", "Val/cat"),
        ("train/cat", "train/dog"),
        ("train", "val"),
    ],
)
def test_names_of_splits_are_refused_as_classes(tmp_path, names):
    photos = write(tmp_path, *[f"{name}/{i}.png" for i, name in enumerate(names)])
    with refused(photos, names[0].split("/")[0], "--classes", kind=ValueError):
        find_images(photos)
    assert find_images(photos, "top").classes == sorted({name.split("/")[0] for name in names})


def test_train_may_be_a_class_among_others(tmp_path):
    photos = write(tmp_path, "bus/0.png", "train/0.png")
    assert find_images(photos).classes == ["bus", "train"]


def test_a_folder_around_the_classes_is_refused(tmp_path):
    photos = write(tmp_path, "set/cat/0.png", "set/dog/0.png")
    with refused(photos / "set", "--images", "--classes", kind=ValueError):
        find_images(photos)
    assert find_images(photos / "set").classes == ["cat", "dog"]
    assert find_images(photos, "leaf").classes == ["cat", "dog"]
    assert find_images(photos, "top").classes == ["set"]


def test_an_empty_class_is_refused_and_kept_if_it_is_listed(tmp_path):
    photos = write(tmp_path / "photos", "ant/0.png", "cat/0.png")
    (photos / "bee").mkdir()
    with refused(photos / "bee", "--classes", kind=ValueError):
        find_images(photos)
    listed = tmp_path / "classes.txt"
    listed.write_text("ant\nbee\ncat\n")
    found = find_images(photos, str(listed))
    assert found.classes == ["ant", "bee", "cat"]
    assert found.labels == [0, 2]
    assert describe_classes(found.classes, found.labels).endswith("ant (1), bee (0), cat (1)")


def test_no_classes_leave_the_labels_out(tmp_path):
    photos = write(tmp_path, "0.png", "cat/0.png", "train/0.png", "train/dog/0.png")
    found = find_images(photos, "none")
    assert (len(found.names), found.labels, found.classes) == (4, None, None)


def test_a_file_lists_the_classes_in_their_order(tmp_path):
    photos = write(tmp_path / "photos", "a/cat/0.png", "a/dog/x/0.png", "b/0.png", "c/0.png")
    listed = tmp_path / "classes.txt"
    listed.write_text("b\na/dog/\n\na\n")
    found = find_images(photos, str(listed))
    assert found.names == [PurePath(name) for name in ("a/cat/0.png", "a/dog/x/0.png", "b/0.png")]
    assert found.labels == [2, 1, 0]
    assert "1 images" in describe_passed_over(found.passed_over)

    listed.write_text("b\nfox\n")
    with refused(listed, "fox", kind=ValueError):
        find_images(photos, str(listed))
    for twice in ("b\nb/\n", "./b\nb\n"):
        listed.write_text(twice)
        with refused(listed, "twice", kind=ValueError):
            find_images(photos, str(listed))
    for outside in (photos / "b", "../photos/b"):
        listed.write_text(f"{outside}\n")
        with refused(listed, outside, kind=ValueError):
            find_images(photos, str(listed))
    listed.write_text("b\r\nc\r\n", "utf-8-sig")
    assert find_images(photos, str(listed)).classes == ["b", "c"]
    with refused("tpo", "leaf", kind=ValueError):
        find_images(photos, "tpo")


def test_the_classes_of_a_packed_set_are_those_of_the_option(tmp_path):
    photos = write(tmp_path / "photos", "a/cat/0.png", "b/cat/0.png", "b/dog/0.png")
    pack(tmp_path / "set", photos, size=4, holdout=0, classes="leaf")
    source = Images(str(tmp_path / "set/train"))
    assert source.manifest["classes"] == ["cat", "dog"]
    assert source.read(np.arange(3)).condition.tolist() == [0, 0, 1]


def test_a_set_inside_the_folder_is_no_class(tmp_path):
    photos = write(tmp_path, "cat/0.png", "dog/0.png")
    for _ in range(2):
        pack(photos / "runs/set", photos, size=4, holdout=0)
    assert Images(str(photos / "runs/set/train")).manifest["classes"] == ["cat", "dog"]


def test_a_file_instead_of_a_folder_is_named(tmp_path):
    archive = tmp_path / "photos.zip"
    archive.write_bytes(b"PK")
    with refused(archive, "is a file", kind=NotADirectoryError):
        find_images(archive)


@pytest.mark.parametrize(
    "words", [("--images", ""), ("--images=",), ("--out", "", "--images", "x")]
)
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, capfd, words):
    write(tmp_path, "0.png")
    monkeypatch.chdir(tmp_path)
    out = () if "--out" in words else ("--out", "set")
    assert_refused(capfd, ("pack", *out, *words), words[0].strip("="), "empty")
    (tmp_path / "train").mkdir()
    write(tmp_path, "train/0.png")
    words = ("--out", "set", "--size", 4, "--holdout", 0, "--classes", "none")
    assert run_command("pack", "--images", ".", *words) == 0
    assert len(Images("set/train")) == 2
