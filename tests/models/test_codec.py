"""Codecs: what belongs to their identity, and which images they take."""

import json

import pytest
import torch

from models.codec import (
    KL,
    Identity,
    describe_codec,
    find_codec_difference,
    load_codec,
    save_codec,
)
from tests.helpers.codecs import small_vae
from tests.helpers.refusals import refused
from trainer.compatibility import check_latents_codec, check_same_codec

CHANNELS = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 0.5, 4.0]}


def make_codec(path, **changes):
    save_codec(small_vae(**changes), path)
    return KL(str(path))


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


@pytest.mark.parametrize(
    ("shape", "named"),
    [((1, 1, 8, 8), (3, 1)), ((1, 3, 9, 8), (2, "8 x 9")), ((1, 3, 8, 9), (2, "9 x 8"))],
    ids=["channels", "height", "width"],
)
def test_images_that_do_not_fit_are_refused(tmp_path, shape, named):
    codec = make_codec(tmp_path / "vae")
    with refused(tmp_path / "vae", *named, kind=ValueError):
        codec.encode(torch.zeros(shape))


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
