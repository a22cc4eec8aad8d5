"""`rectify picture`: any form by its class name, and one line for what is wrong."""

import shlex

import pytest
from PIL import Image

from deploy.cli import main
from tests.conftest import REPOSITORY
from tests.deploy.test_pipeline import commands
from trainer.picture import line, plane, train


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    """Make everything that a picture counts small, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "PAIRS", 64)
    monkeypatch.setattr(line, "SAMPLES", 500)
    monkeypatch.setattr(plane, "SAMPLES", 64)


@pytest.mark.parametrize("words", commands("docs/pictures.md"))
def test_every_command_of_the_page_draws(words):
    _, verb, *words = shlex.split(words)
    assert verb == "picture" and main([verb, *words, "--updates", "2"]) == 0
    assert Image.open(words[words.index("--out") + 1]).format == "PNG"


def test_pictures_of_the_page_are_there():
    text = (REPOSITORY / "docs" / "pictures.md").read_text()
    assert all(f"]({path.name})" in text for path in (REPOSITORY / "docs").glob("picture-*.png"))
    assert len(list((REPOSITORY / "docs").glob("picture-*.png"))) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "x.jpg"), "out: x.jpg does not end in .png"),
        (("--out", "x.png", "--steps", "0"), "steps is 0, it must be at least 1"),
        (("--out", "x.png", "--updates", "0"), "updates (0) must be at least 1"),
        (("--out", "x.png", "--data", "three_moons"), "three_moons"),
        (("--out", "x.png", "--interpolant", "Linaer"), "interpolant: no class `Linaer`; did you mean `Linear`?"),
        (("--out", "x.png", "--sampler", "DDIMM"), "sampler: no class `DDIMM`; did you mean `DDIM`?"),
        (("--out", "x.png", "--sampler", "DDIM", "--sampler.eta", "2"), "DDIM: eta is 2.0, it must lie in [0, 1]"),
        (("--out", "x.png", "--interpolant", "Discrete", "--interpolant.betas", "[2, 2, 2]"), "betas[0] is 2"),
        (("--out", "x.png", "--data", "two_modes", "--prediction", "Noise"), "two_modes is drawn with exact denoisers"),
    ],
)
def test_bad_input_is_one_line(capfd, words, said):
    assert main(["picture", *words]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line]
    assert line.startswith("rectify: error: ") and said in line
