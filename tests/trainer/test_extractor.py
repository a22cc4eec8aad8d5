"""Distances in the features of a network of one's own: what it is shown, what is told of it, what is refused."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.files import file_digest
from trainer.evaluate.extractor import Extractor
from trainer.report.summary import measured

CONFIG = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PREPARED = {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


class Means(nn.Module):
    """The mean of each channel, and the size that was shown."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), torch.full((len(x), 1), float(x.shape[3]))], 1)


class Torn(nn.Module):
    """A network of one size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 3, 4, 4)


def scripted(net, path) -> Path:
    torch.jit.save(torch.jit.script(net), str(path))
    return path


def test_a_file_is_shown_rgb_in_0_to_1_of_the_size_asked(tmp_path):
    path = scripted(Means(), tmp_path / "means.pt")
    images = torch.rand(70, 1, 8, 8) * 2 - 1  # more than one batch
    found = Extractor(path)(images)
    wanted = (images.mean((1, 2, 3)) + 1) / 2
    torch.testing.assert_close(found, torch.cat([wanted[:, None].expand(-1, 3), torch.full((70, 1), 8.0)], 1))
    resized = Extractor(path, 5, "bilinear")
    colours = torch.rand(2, 3, 8, 8) * 2 - 1
    small = F.interpolate(colours / 2 + 0.5, (5, 5), mode="bilinear", antialias=True)
    torch.testing.assert_close(resized(colours)[:, :3], small.mean((2, 3)))
    assert resized(colours)[:, 3].tolist() == [5.0, 5.0]


def test_figures_are_told_with_what_they_were_measured_in(tmp_path):
    path = scripted(Means(), tmp_path / "means.pt")
    assert Extractor(path).about() == {"extractor": "means.pt", "sha256": file_digest(path), "size": None, "resize": "none"}
    assert {"size": 7, "resize": "bilinear"}.items() <= Extractor(path, 7, "bilinear").about().items()


def test_what_cannot_be_an_extractor_is_refused(tmp_path):
    for name in ("nothing.pt", "https://host/inception.pt"):
        with pytest.raises(FileNotFoundError, match="not here; give a local TorchScript file or transformers folder"):
            Extractor(Path(name))
    (tmp_path / "text.pt").write_text("no network")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt"):
        with pytest.raises(ValueError, match=f"{name}: not a TorchScript file"):
            Extractor(tmp_path / name)
    with pytest.raises(ValueError, match="no config.json and safetensors there"):
        Extractor(tmp_path)
    path = scripted(Torn(), tmp_path / "torn.pt")
    with pytest.raises(ValueError, match=r"torn.pt: does not take images \(2, 3, 5, 5\) .*; see --extractor_size"):
        Extractor(path)(torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"torn.pt: gives \(8, 48\) for 2 images"):
        Extractor(path)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match="extractor_size: 0, it must be at least 1"):
        Extractor(path, 0)


def folder(path, model, **prepared):
    """Write a transformers folder."""
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({**PREPARED, **prepared}))
    return path


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")


def test_a_transformers_folder_gives_its_first_token(transformers, tmp_path):
    torch.manual_seed(0)
    model = transformers.ViTModel(transformers.ViTConfig(**CONFIG, intermediate_size=16), add_pooling_layer=False).eval()
    extractor = Extractor(folder(tmp_path / "vit", model))
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    x = F.interpolate((images / 2 + 0.5).expand(-1, 3, -1, -1), (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(PREPARED[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    wanted = model(pixel_values=(x - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(images), wanted.detach())
    about = extractor.about()
    assert {"extractor": "vit", "size": 16, "resize": "bicubic"}.items() <= about.items()
    assert Extractor(folder(tmp_path / "vit", model, image_mean=[0.0, 0.0, 0.0])).about()["sha256"] != about["sha256"]


def test_clip_gives_the_features_of_its_images(transformers, tmp_path):
    text = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**CONFIG, "intermediate_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    prepared = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True}
    extractor = Extractor(folder(tmp_path / "clip", model, **prepared))
    assert extractor(torch.zeros(2, 3, 16, 16)).shape == (2, 6) and extractor.size == 16


def test_damaged_transformers_folders_are_refused(transformers, tmp_path):
    model = transformers.ViTModel(transformers.ViTConfig(**CONFIG, intermediate_size=16), add_pooling_layer=False)
    path = folder(tmp_path / "vit", model)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="has no weights for .*; they would be random"):
        Extractor(path)
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="preprocessor_config.json: no entry 'image_mean'"):
        Extractor(path)
    (path / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="it says the mean and deviation"):
        Extractor(path)
    (path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="vit: not a readable transformers folder"):
        Extractor(path)


def test_the_table_tells_what_figures_were_measured_in(tmp_path):
    evaluation = {
        "features": Extractor(scripted(Means(), tmp_path / "means.pt"), 7).about(),
        "reference": "ab" * 32,
        "settings": {"samples": 100, "seed": 2},
    }
    told = measured(evaluation, "student")
    assert told.startswith("means.pt ") and told.endswith("resize bicubic to 7, reference abababababab, 100 samples of seed 2")
    with pytest.raises(ValueError, match="evaluation of student: settings: has no entry `seed`"):
        measured({**evaluation, "settings": {"samples": 100}}, "student")
