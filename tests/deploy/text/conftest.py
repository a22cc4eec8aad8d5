"""Shared by the tests of text-to-image pipelines: a pipeline of each kind, prompts and pairs."""

from pathlib import Path

import pytest
import torch

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


def words_to_pair(teacher: Path, out: Path, *words: object) -> tuple[object, ...]:
    """Return the command that collects eight pairs from a teacher."""
    common = ("--teacher", teacher, "--out", out, "--pairs", "8", "--steps", "1")
    return ("collect", *common, *words)


def assert_diffusers_loads_adapters(folder: Path, out: Path) -> None:
    """Assert that a pipeline with exported adapters has the weights of the merged network."""
    from diffusers import DiffusionPipeline

    from deploy.export import component, write_adapters
    from models.diffusers.pipeline import pretrained

    # Adapters that change the network.
    net = pretrained(str(folder), lora=2).net
    for name, value in net.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(value.data, std=0.1)
    write_adapters(out, net)

    pipe = DiffusionPipeline.from_pretrained(folder)
    original = {
        key: value.clone() for key, value in getattr(pipe, component(net)).state_dict().items()
    }
    pipe.load_lora_weights(out)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    found = getattr(pipe, component(net)).state_dict()
    expected = net.merged().state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    assert max((value - original[key]).abs().max() for key, value in expected.items()) > 0.01
