"""What tests of pipelines that are told texts share: a pipeline of each kind, prompts, and pairs."""

import pytest

from deploy.cli import main

TEXTS = ["a red dog", "a cat", "3 birds on a wire", "", "zebra"]


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3", "pixart"])
def folder(request, tmp_path_factory):
    from tests import published  # it needs transformers

    path = tmp_path_factory.mktemp("published")
    published.pipeline(request.param, path).save_pretrained(path / "teacher")
    return path / "teacher"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(folder, prompts, tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "set"
    words = ["--prompts", str(prompts), "--pairs", "16", "--steps", "5", "--guidance", "5"]
    assert main(["collect", "--teacher", str(folder), "--out", str(path), *words]) == 0
    return path
