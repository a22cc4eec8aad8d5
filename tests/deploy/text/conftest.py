"""Shared by the tests of text-to-image pipelines: a pipeline of each kind, prompts and pairs."""

import pytest

from tests.helpers.commands import succeed

TEXTS = ["a red dog", "a cat", "3 birds on a wire", "", "zebra"]


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3", "pixart"])
def folder(request, tmp_path_factory):
    """Return the folder of a published pipeline."""
    from tests import published  # it needs transformers

    path = tmp_path_factory.mktemp("published")
    published.pipeline(request.param, path).save_pretrained(path / "teacher")
    return path / "teacher"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Return a file of TEXTS."""
    path = tmp_path_factory.mktemp("texts") / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(folder, prompts, tmp_path_factory):
    """Return 16 pairs of the pipeline, with guidance."""
    path = tmp_path_factory.mktemp("pairs") / "set"
    words = ("--prompts", prompts, "--pairs", "16", "--steps", "5", "--guidance", "5")
    succeed("collect", "--teacher", folder, "--out", path, *words)
    return path
