"""Feature extractors of the user's: what the network receives, how it is described, refusals."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import file_digest
from deploy.report.summary import describe_measurement
from tests.helpers.refusals import refused
from trainer.metrics.extractor import Extractor

CONFIG = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
PREPROCESSOR = {
    "size": {"height": 16, "width": 16},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}


class Means(nn.Module):
    """The mean of each channel, and the width of the images received."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), torch.full((len(x), 1), float(x.shape[3]))], 1)


class FixedSize(nn.Module):
    """A network that takes images of one size only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 3, 4, 4)


def scripted(net, path) -> Path:
    torch.jit.save(torch.jit.script(net), str(path))
    return path


@pytest.fixture
def means(tmp_path):
    return scripted(Means(), tmp_path / "means.pt")


def test_a_torchscript_file_receives_rgb_in_0_to_1(means):
    images = torch.rand(70, 1, 8, 8) * 2 - 1  # more than one batch
    found = Extractor(means)(images)
    grey = ((images.mean((1, 2, 3)) + 1) / 2)[:, None]
    wanted = torch.cat([grey.expand(-1, 3), torch.full((70, 1), 8.0)], 1)
    torch.testing.assert_close(found, wanted)


def test_a_torchscript_file_receives_images_of_the_requested_size(means):
    resized = Extractor(means, 5, "bilinear")
    colours = torch.rand(2, 3, 8, 8) * 2 - 1
    small = F.interpolate(colours / 2 + 0.5, (5, 5), mode="bilinear", antialias=True)
    torch.testing.assert_close(resized(colours)[:, :3], small.mean((2, 3)))
    assert resized(colours)[:, 3].tolist() == [5.0, 5.0]


def test_the_description_has_file_hash_size_and_filter(means):
    assert Extractor(means).describe() == {
        "extractor": "means.pt",
        "sha256": file_digest(means),
        "size": None,
        "resize": "none",
    }
    resized = Extractor(means, 7, "bilinear").describe()
    assert resized["size"] == 7
    assert resized["resize"] == "bilinear"


@pytest.mark.parametrize("name", ["nothing.pt", "https://host/inception.pt"])
def test_a_path_that_is_not_local_is_refused(name):
    with refused(Path(name), "TorchScript", "transformers", kind=FileNotFoundError):
        Extractor(Path(name))


def test_a_file_that_is_not_torchscript_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt"):
        with refused(name, "TorchScript"):
            Extractor(tmp_path / name)


def test_a_folder_without_a_transformers_model_is_refused(tmp_path):
    with refused(tmp_path, "config.json", "safetensors"):
        Extractor(tmp_path)


def test_images_of_a_size_that_the_network_does_not_take_are_refused(tmp_path):
    path = scripted(FixedSize(), tmp_path / "fixed.pt")
    with refused("fixed.pt", "(2, 3, 5, 5)", "--extractor_size"):
        Extractor(path)(torch.zeros(2, 3, 5, 5))


def test_features_of_the_wrong_shape_are_refused(tmp_path):
    path = scripted(FixedSize(), tmp_path / "fixed.pt")
    with refused("fixed.pt", "(8, 48)", 2):
        Extractor(path)(torch.zeros(2, 3, 8, 8))


def test_a_size_below_one_is_refused(means):
    with refused("extractor_size", 0, 1):
        Extractor(means, 0)


def save_model(path, model, **preprocessor):
    """Write a transformers folder and return its path."""
    model.save_pretrained(path)
    config = json.dumps({**PREPROCESSOR, **preprocessor})
    (path / "preprocessor_config.json").write_text(config)
    return path


@pytest.fixture
def transformers():
    reason = "needs transformers: pip install 'rectify[text]'"
    return pytest.importorskip("transformers", reason=reason)


@pytest.fixture
def vit(transformers):
    """A tiny vision transformer with random weights."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**CONFIG, intermediate_size=16)
    return transformers.ViTModel(config, add_pooling_layer=False).eval()


def test_the_features_of_a_transformers_folder_are_its_first_token(vit, tmp_path):
    extractor = Extractor(save_model(tmp_path / "vit", vit))
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    x = (images / 2 + 0.5).expand(-1, 3, -1, -1)
    x = F.interpolate(x, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    mean = torch.tensor(PREPROCESSOR["image_mean"]).view(3, 1, 1)
    std = torch.tensor(PREPROCESSOR["image_std"]).view(3, 1, 1)
    wanted = vit(pixel_values=(x - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(images), wanted.detach())


def test_the_description_of_a_transformers_folder_depends_on_its_preprocessing(vit, tmp_path):
    about = Extractor(save_model(tmp_path / "vit", vit)).describe()
    assert about["extractor"] == "vit"
    assert about["size"] == 16
    assert about["resize"] == "bicubic"
    other = Extractor(save_model(tmp_path / "vit", vit, image_mean=[0.0, 0.0, 0.0])).describe()
    assert other["sha256"] != about["sha256"]


def test_clip_gives_the_features_of_its_images(transformers, tmp_path):
    text = {
        "vocab_size": 9,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {**CONFIG, "intermediate_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    preprocessor = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 16, "width": 16},
        "do_center_crop": True,
    }
    folder = save_model(tmp_path / "clip", transformers.CLIPModel(config), **preprocessor)
    extractor = Extractor(folder)
    assert extractor(torch.zeros(2, 3, 16, 16)).shape == (2, 6)
    assert extractor.size == 16


@pytest.fixture
def vit_folder(vit, tmp_path):
    return save_model(tmp_path / "vit", vit)


def test_a_transformers_folder_without_all_weights_is_refused(vit_folder):
    config = json.loads((vit_folder / "config.json").read_text())
    (vit_folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with refused(vit_folder, "weights"):
        Extractor(vit_folder)


def test_a_preprocessor_config_without_a_mean_is_refused(vit_folder):
    (vit_folder / "preprocessor_config.json").write_text("{}")
    with refused("preprocessor_config.json", "image_mean"):
        Extractor(vit_folder)


def test_a_transformers_folder_without_preprocessor_config_is_refused(vit_folder):
    (vit_folder / "preprocessor_config.json").unlink()
    with refused("preprocessor_config.json", kind=FileNotFoundError):
        Extractor(vit_folder)


def test_a_transformers_folder_with_unreadable_weights_is_refused(vit_folder):
    (vit_folder / "model.safetensors").write_bytes(b"no tensors")
    with refused(vit_folder):
        Extractor(vit_folder)


@pytest.fixture
def evaluation(means):
    return {
        "features": Extractor(means, 7).describe(),
        "reference": "ab" * 32,
        "settings": {"samples": 100, "seed": 2},
    }


def test_the_report_names_the_extractor_the_reference_and_the_samples(evaluation):
    text = describe_measurement(evaluation, "student")
    measured, _, reference = text.partition("abababababab")
    assert measured.startswith("means.pt ")
    assert "bicubic to 7, " in measured
    assert re.findall(r"\d+", reference) == ["100", "2"]


def test_an_evaluation_without_a_seed_is_refused(evaluation):
    evaluation["settings"] = {"samples": 100}
    with refused("student", "settings", "seed"):
        describe_measurement(evaluation, "student")
