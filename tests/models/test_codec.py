"""Codecs: what belongs to their identity, and which images they take."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.codec import (
    KL,
    Identity,
    Tiny,
    describe_codec,
    find_codec_difference,
    load_codec,
    save_codec,
)
from tests.helpers.codecs import SMALL_CODECS, small_tiny, small_vae
from tests.helpers.refusals import refused
from trainer.compatibility import check_latents_codec, check_same_codec

CHANNELS = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 0.5, 4.0]}
WEIGHTS = "diffusion_pytorch_model.safetensors"
# How each model of diffusers returns its latents.
ENCODE = {
    "AutoencoderKL": lambda vae, images: vae.encode(images).latent_dist.mode(),
    "AutoencoderDC": lambda vae, images: vae.encode(images).latent,
    "AutoencoderTiny": lambda vae, images: vae.encode(images).latents,
}

every_architecture = pytest.mark.parametrize("architecture", SMALL_CODECS)


def make_codec(path, **changes):
    save_codec(small_vae(**changes), path)
    return KL(str(path))


def write_codec(path, architecture, **changes):
    """Write a small codec, with entries of its config that its class need not know."""
    model = SMALL_CODECS[architecture]()
    model.register_to_config(**changes)
    save_codec(model, path)
    return path


def test_latents_are_those_of_diffusers_formula(tmp_path):
    """StableDiffusionXLPipeline decodes x std / scale + mean; a shift is added to it (SD3)."""
    codec = make_codec(tmp_path / "vae", shift_factor=0.25, **CHANNELS)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    raw = codec.vae.encode(images).latent_dist.mode()
    x = codec.encode(images)
    mean = torch.tensor(CHANNELS["latents_mean"]).view(1, 4, 1, 1)
    std = torch.tensor(CHANNELS["latents_std"]).view(1, 4, 1, 1)
    torch.testing.assert_close(x * std / 0.5 + mean + 0.25, raw)
    torch.testing.assert_close(codec.decode(x), codec.vae.decode(raw).sample)


@every_architecture
def test_latents_and_images_are_those_of_plain_diffusers(tmp_path, architecture):
    """Pipelines decode x / scaling_factor."""
    codec = load_codec(write_codec(tmp_path, architecture))
    plain = getattr(diffusers, architecture).from_pretrained(tmp_path).eval()
    scale = plain.config.scaling_factor
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    plain.requires_grad_(False)
    expected = ENCODE[architecture](plain, images) * scale
    decoded = plain.decode(expected / scale).sample
    torch.testing.assert_close(codec.encode(images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(codec.decode(expected), decoded, rtol=0, atol=1e-6)


@every_architecture
def test_statistics_per_channel_are_applied_by_every_architecture(tmp_path, architecture):
    codec = load_codec(write_codec(tmp_path / "plain", architecture))
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    raw = codec.encode_raw(images)
    mean = [0.1 * channel for channel in range(codec.channels)]
    std = [0.5 + 0.25 * channel for channel in range(codec.channels)]
    codec.set_channels(mean, std)
    codec.save(tmp_path / "channels")
    found = load_codec(tmp_path / "channels")
    expected = (raw - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    torch.testing.assert_close(found.encode(images), expected, rtol=0, atol=1e-6)
    decoded = codec.vae.decode(raw).sample
    torch.testing.assert_close(found.decode(expected), decoded, rtol=0, atol=1e-5)


@every_architecture
def test_plain_diffusers_loads_a_codec_with_statistics_per_channel(tmp_path, architecture):
    codec = load_codec(write_codec(tmp_path / "plain", architecture))
    codec.set_channels([0.0] * codec.channels, [2.0] * codec.channels)
    codec.save(tmp_path / "channels")
    plain = getattr(diffusers, architecture).from_pretrained(tmp_path / "channels")
    weights = codec.vae.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in plain.state_dict().items())


@every_architecture
def test_statistics_per_channel_are_read_without_a_warning(tmp_path, architecture, capfd, caplog):
    channels = SMALL_CODECS[architecture]().config.latent_channels
    values = {"latents_mean": [0.0] * channels, "latents_std": [2.0] * channels}
    load_codec(write_codec(tmp_path, architecture, **values))
    assert not capfd.readouterr().err
    assert not caplog.messages


@every_architecture
def test_codecs_that_differ_in_the_mean_of_one_channel_differ(tmp_path, architecture):
    codec = load_codec(write_codec(tmp_path / "plain", architecture))
    std = [1.0] * codec.channels
    codec.set_channels([0.0] * codec.channels, std)
    before = codec.identity()
    codec.set_channels([0.0] * (codec.channels - 1) + [0.01], std)
    assert "channel_mean" in find_codec_difference(before, codec.identity())


@pytest.mark.parametrize("channels", [8, 16, 32])
def test_latents_may_have_any_number_of_channels(tmp_path, channels):
    codec = make_codec(tmp_path, latent_channels=channels)
    latents = codec.encode(torch.zeros(1, 3, 8, 8))
    assert latents.shape == (1, channels, 4, 4)
    assert codec.decode(latents).shape == (1, 3, 8, 8)


def test_8_bit_storage_of_tiny_codecs_changes_no_latent(tmp_path):
    """latent_magnitude and latent_shift are those of `AutoencoderTiny.scale_latents`."""
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    latents = []
    for number, shift in enumerate((0.5, 0.25)):
        save_codec(small_tiny(latent_shift=shift, latent_magnitude=5), tmp_path / str(number))
        latents.append(Tiny(str(tmp_path / str(number))).encode(images))
    assert torch.equal(*latents)


@every_architecture
def test_a_codec_that_lacks_a_weight_is_refused(tmp_path, architecture):
    write_codec(tmp_path, architecture)
    (tmp_path / "checksums.json").unlink()
    weights = load_file(tmp_path / WEIGHTS)
    missing = next(iter(weights))
    del weights[missing]
    save_file(weights, tmp_path / WEIGHTS)
    with refused(tmp_path, missing, kind=ValueError):
        load_codec(tmp_path)


@pytest.mark.parametrize("name", ["AsymmetricAutoencoderKL", "VQModel"])
def test_another_architecture_is_refused(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with refused(tmp_path / "config.json", name, *SMALL_CODECS, kind=ValueError):
        load_codec(tmp_path)


def test_weights_and_all_statistics_are_the_identity(tmp_path):
    plain = make_codec(tmp_path / "plain")
    assert describe_codec(Identity()) == {}
    assert describe_codec(plain) == {"codec": plain.weights(), "scale": 0.5}
    full = make_codec(tmp_path / "full", shift_factor=0.25, **CHANNELS)
    assert describe_codec(full) == {
        "codec": plain.weights(),
        "scale": 0.5,
        "shift": 0.25,
        "channel_mean": CHANNELS["latents_mean"],
        "channel_std": CHANNELS["latents_std"],
    }


CHANGES = {
    "scale": {"scaling_factor": 0.51},
    "shift": {"shift_factor": 0.1},
    "channel_mean": CHANNELS,
}


@pytest.mark.parametrize(("key", "change"), CHANGES.items(), ids=CHANGES)
def test_codecs_of_the_same_weights_and_other_statistics_differ(tmp_path, key, change):
    codec = make_codec(tmp_path / "plain")
    other = make_codec(tmp_path / "other")
    other.vae.register_to_config(**change)
    assert key in find_codec_difference(codec.identity(), other.identity())
    with refused("model.codec", tmp_path / "other", "LATENTS", key, kind=ValueError):
        manifest = {"kind": "latents", **codec.identity()}
        check_latents_codec(manifest, f"model.codec: {other.path}", other, "LATENTS")
    with refused("model.codec", "model.initial", key, kind=ValueError):
        check_same_codec("model.initial", codec.identity(), other)


def test_pixels_and_a_codec_differ(tmp_path):
    codec = make_codec(tmp_path / "plain")
    with refused("model.codec", "no codec", kind=ValueError):
        check_same_codec("model.initial", codec.identity(), Identity())
    with refused("model.codec", tmp_path / "plain", kind=ValueError):
        check_same_codec("model.initial", {}, codec)


def test_latents_that_record_no_codec_fit_every_one(tmp_path):
    check_latents_codec({"kind": "latents"}, "model.codec", make_codec(tmp_path / "x"), "LATENTS")


def test_rounding_of_a_statistic_is_no_difference(tmp_path):
    identity = make_codec(tmp_path / "plain").identity()
    assert not find_codec_difference(identity, {**identity, "scale": 0.5 * (1 + 1e-7)})


@every_architecture
@pytest.mark.parametrize("side", ["height", "width"])
def test_images_with_a_side_is_no_multiple_of_the_factor_are_refused(tmp_path, architecture, side):
    codec = load_codec(write_codec(tmp_path, architecture))
    sides = {"height": 16, "width": 16}
    sides[side] += codec.factor // 2
    named = f"{sides['width']} x {sides['height']}"
    with refused(tmp_path, codec.factor, named, kind=ValueError):
        codec.encode(torch.zeros(1, 3, *sides.values()))


@every_architecture
def test_images_of_other_channels_are_refused(tmp_path, architecture):
    codec = load_codec(write_codec(tmp_path, architecture))
    with refused(tmp_path, 3, 1, kind=ValueError):
        codec.encode(torch.zeros(1, 1, 16, 16))


def test_a_codecs_folder_with_another_codec_in_it_is_itself(tmp_path):
    make_codec(tmp_path / "vae", scaling_factor=0.7)
    make_codec(tmp_path / "vae/codec")
    assert load_codec(tmp_path / "vae").scale == 0.7


def test_a_file_instead_of_the_codecs_folder_is_named(tmp_path):
    make_codec(tmp_path / "vae")
    with refused(tmp_path / "vae/config.json", "is a file", kind=NotADirectoryError):
        load_codec(tmp_path / "vae/config.json")


INVALID = {
    "scaling_factor": float("nan"),
    "shift_factor": float("inf"),
    "latents_mean": [0.0, 0.0, 0.0, 0.0],  # without latents_std
    "latents_std": [1.0, 1.0],
}


@pytest.mark.parametrize(("key", "value"), INVALID.items(), ids=INVALID)
def test_statistics_that_are_no_numbers_are_refused(tmp_path, key, value):
    save_codec(small_vae(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    (tmp_path / "checksums.json").unlink()
    with refused(tmp_path, "latents_" if "latents" in key else key, kind=ValueError):
        KL(str(tmp_path))
