"""`rectify toy picture`: any class by its name, and one line for bad input."""

import shlex

import pytest
from PIL import Image

from tests.helpers.commands import REPOSITORY, run_command
from tests.helpers.documents import documented_commands
from tests.helpers.refusals import assert_refused
from trainer.toy import line, plane, train


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch, tmp_path):
    """Lower every count of a picture, and work in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "PAIRS", 64)
    monkeypatch.setattr(line, "SAMPLES", 500)
    monkeypatch.setattr(plane, "SAMPLES", 64)


@pytest.mark.parametrize("text", documented_commands(REPOSITORY / "docs/pictures.md"))
def test_every_command_of_the_page_draws(text):
    program, *words = shlex.split(text)
    assert program == "rectify"
    assert words[:2] == ["toy", "picture"]
    assert run_command(*words, "--updates", "2") == 0
    assert Image.open(words[words.index("--out") + 1]).format == "PNG"


def test_the_page_shows_every_picture():
    text = (REPOSITORY / "docs" / "pictures.md").read_text()
    pictures = list((REPOSITORY / "docs").glob("picture-*.png"))
    assert len(pictures) == 2
    assert all(f"]({path.name})" in text for path in pictures)


OUT = ("--out", "x.png")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--out", "x.jpg"), ("out", "x.jpg", ".png")),
        ((*OUT, "--steps", "0"), ("steps", "0", "1")),
        ((*OUT, "--updates", "0"), ("updates", "0", "1")),
        ((*OUT, "--data", "three_moons"), ("three_moons",)),
        ((*OUT, "--interpolant", "Linaer"), ("interpolant", "`Linaer`", "`Linear`")),
        ((*OUT, "--sampler", "DDIMM"), ("sampler", "`DDIMM`", "`DDIM`")),
        ((*OUT, "--sampler", "DDIM", "--sampler.eta", "2"), ("DDIM", "eta", "2.0", "[0, 1]")),
        (
            (*OUT, "--interpolant", "Discrete", "--interpolant.betas", "[2, 2, 2]"),
            ("betas[0]", "2"),
        ),
        (
            (*OUT, "--data", "two_modes", "--prediction", "NoisePrediction"),
            ("prediction", "NoisePrediction", "two_modes"),
        ),
    ],
    ids=[
        *("format", "steps", "updates", "data", "interpolant"),
        *("sampler", "eta", "betas", "prediction of exact denoisers"),
    ],
)
def test_bad_input_is_refused(capfd, words, named):
    assert_refused(capfd, ("toy", "picture", *words), *named, alone=True)
