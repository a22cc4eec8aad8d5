"""Encoding: the scale of latents, and what is refused before anything is written."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from data import files
from data.images import Images
from data.index import index
from data.latents import Latents
from data.pack import pack
from data.shards import read_manifest
from models.checkpoint import FORMAT
from models.codec import KL, load_codec, save_codec
from tests.data.test_images import write_photos
from tests.helpers.bucketed import write_set
from tests.helpers.codecs import SMALL_CODECS, small_dc, small_tiny, small_vae
from tests.helpers.commands import succeed
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.training import fit_words, small_config, spec, train
from trainer.jobs.encode import encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos packed to 16 pixels (train and heldout), and the VAE of a pipeline."""
    folder = tmp_path_factory.mktemp("encode")
    pack(folder / "images", write_photos(folder / "photos", 40), size=16, holdout=0.5)
    save_codec(small_vae(shift_factor=0.1), folder / "vae")
    return folder


def write_autoencoder(run):
    """Write what an autoencoder's run has: its codec, and a checkpoint that names it."""
    save_codec(small_vae(), run / "codec")
    (run / "checkpoints").mkdir()
    checkpoint = {"rectify": {"format": FORMAT, "autoencoder": {}}, "global_step": 1}
    torch.save(checkpoint, run / "checkpoints/step=000000001.ckpt")
    return run


def deviation(latents):
    source = Latents(str(latents))
    return source.read(np.arange(len(source.reader))).x.std().item()


def test_a_pipelines_vae_keeps_its_scale(folder, tmp_path):
    encode(folder / "images/train", tmp_path / "latents", folder / "vae")
    codec = KL(str(folder / "vae"))
    images = Images(str(folder / "images/train")).read(np.arange(5)).x
    expected = codec.encode(images)
    found = Latents(str(tmp_path / "latents")).read(np.arange(5)).x
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    manifest = read_manifest(tmp_path / "latents")
    assert manifest["scale"] == 0.5
    assert manifest["shift"] == 0.1
    assert KL(str(tmp_path / "latents/codec")).identity() == codec.identity()


def test_a_scale_is_measured_on_request(folder, tmp_path):
    encode(folder / "images/train", tmp_path / "latents", folder / "vae", scale="measured")
    assert deviation(tmp_path / "latents") == pytest.approx(1, rel=0.01)


def test_an_autoencoders_scale_is_measured_and_other_images_get_it(folder, tmp_path):
    run = write_autoencoder(tmp_path / "run")
    for number, codec in enumerate((run, run / "codec")):
        encode(folder / "images/train", tmp_path / str(number), codec)
        assert deviation(tmp_path / str(number)) == pytest.approx(1, rel=0.01)
    scale = read_manifest(tmp_path / "0")["scale"]
    encode(folder / "images/heldout", tmp_path / "heldout", tmp_path / "0/codec")
    assert read_manifest(tmp_path / "heldout")["scale"] == scale
    encode(folder / "images/heldout", tmp_path / "kept", run, scale="keep")
    assert read_manifest(tmp_path / "kept")["scale"] == 0.5


def test_another_scale_is_another_set(folder, tmp_path):
    encode(folder / "images/train", tmp_path / "latents", folder / "vae", scale="measured")
    with refused(tmp_path / "latents", "scale", 0.5, kind=ValueError):
        encode(folder / "images/train", tmp_path / "latents", folder / "vae")


def test_a_codec_that_was_lost_is_written_again(folder, tmp_path):
    encode(folder / "images/train", tmp_path / "latents", folder / "vae")
    before = (tmp_path / "latents/000000.tar").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "latents/codec")
    encode(folder / "images/train", tmp_path / "latents", folder / "vae")
    assert KL(str(tmp_path / "latents/codec")).scale == 0.5
    assert (tmp_path / "latents/000000.tar").stat().st_mtime_ns == before


@pytest.mark.parametrize("architecture", SMALL_CODECS)
def test_each_channel_gets_mean_0_and_variance_1(folder, tmp_path, architecture):
    save_codec(SMALL_CODECS[architecture](), tmp_path / "codec")
    encode(folder / "images/train", tmp_path / "latents", tmp_path / "codec", scale="channels")
    source = Latents(str(tmp_path / "latents"))
    x = source.read(np.arange(len(source.reader))).x
    channels = x.shape[1]
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(channels), rtol=0, atol=1e-3)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(channels), rtol=0, atol=2e-3)
    identity = load_codec(tmp_path / "latents/codec").identity()
    assert identity["scale"] == 1
    assert len(identity["channel_mean"]) == len(identity["channel_std"]) == channels
    recorded = {key: source.manifest[key] for key in identity}
    assert recorded == identity


@pytest.mark.parametrize("shift", [0.1, None])
def test_other_images_get_the_same_statistics_of_channels(folder, tmp_path, shift):
    save_codec(small_vae(shift_factor=shift), tmp_path / "vae")
    encode(folder / "images/train", tmp_path / "latents", tmp_path / "vae", scale="channels")
    encode(folder / "images/heldout", tmp_path / "heldout", tmp_path / "latents/codec")
    identity = load_codec(tmp_path / "latents/codec").identity()
    assert "shift" not in identity
    assert load_codec(tmp_path / "heldout/codec").identity() == identity
    manifest = read_manifest(tmp_path / "heldout")
    assert {key: manifest[key] for key in identity} == identity


@pytest.mark.parametrize("make", [small_dc, small_tiny])
def test_other_architectures_keep_their_scale(folder, tmp_path, make):
    save_codec(make(scaling_factor=0.7), tmp_path / "codec")
    encode(folder / "images/train", tmp_path / "latents", tmp_path / "codec")
    codec = load_codec(tmp_path / "latents/codec")
    images = Images(str(folder / "images/train")).read(np.arange(5)).x
    found = Latents(str(tmp_path / "latents")).read(np.arange(5)).x
    raw = codec.encode_raw(images)
    torch.testing.assert_close(found, raw * 0.7, rtol=1e-3, atol=1e-3)
    assert read_manifest(tmp_path / "latents")["scale"] == codec.scale == 0.7


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_a_constant_channel_is_refused_and_binds_nothing(folder, tmp_path, bias):
    model = small_tiny()
    model.encoder.layers[-1].weight.data[2] = 0.0
    model.encoder.layers[-1].bias.data[2] = bias
    save_codec(model, tmp_path / "codec")
    with refused("codec", tmp_path / "codec", "channel 2", kind=ValueError):
        encode(folder / "images/train", tmp_path / "latents", tmp_path / "codec", scale="channels")
    assert not (tmp_path / "latents").exists()


def test_a_finished_set_with_another_choice_of_statistics_is_kept(folder, tmp_path):
    encode(folder / "images/train", tmp_path / "latents", folder / "vae", scale="measured")
    with refused(tmp_path / "latents", "statistics", "channels", kind=ValueError):
        encode(folder / "images/train", tmp_path / "latents", folder / "vae", scale="channels")


def wide_vae():
    return small_vae(latent_channels=16)


@pytest.mark.parametrize("make", [wide_vae, small_dc, small_tiny])
def test_a_run_is_trained_and_sampled_in_the_latents_of_any_codec(folder, tmp_path, capfd, make):
    save_codec(make(), tmp_path / "codec")
    latents = tmp_path / "latents"
    encode(folder / "images/train", latents, tmp_path / "codec", scale="channels")
    channels, size, _ = read_manifest(latents)["shape"]
    net = spec("DiT", size=size, channels=channels, patch=2, width=16, depth=1, heads=2)
    source = spec("Latents", path=str(latents))
    config = small_config(source, net=net, codec=str(latents / "codec"))
    run = train(config, tmp_path / "run", steps=2)
    assert load_codec(run).identity() == load_codec(latents / "codec").identity()
    succeed("sample", "--run", run, "--out", tmp_path / "grid.png", "--steps", 1, "--count", 10)
    assert Image.open(tmp_path / "grid.png").width >= 16

    command = ("export", "--run", run, "--out", tmp_path / "out")
    key = "latents_mean" if make is wide_vae else "_class_name"
    assert_refused(capfd, command, run / "codec/config.json", key)
    assert not (tmp_path / "out").exists()


def test_a_run_refuses_latents_with_other_statistics_of_channels(folder, tmp_path, capfd):
    for name, images in (("a", "train"), ("b", "heldout")):
        encode(folder / "images" / images, tmp_path / name, folder / "vae", scale="channels")
    net = spec("DiT", size=8, channels=4, patch=2, width=16, depth=1, heads=2)
    source = spec("Latents", path=str(tmp_path / "a"))
    config = small_config(source, net=net, codec=str(tmp_path / "b/codec"))
    command = fit_words(config, tmp_path / "run", steps=2)
    assert_refused(capfd, command, "model.codec", tmp_path / "b/codec", "channel_mean")


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory):
    """Captioned images of three sizes, and a codec of grey images."""
    folder = tmp_path_factory.mktemp("bucketed")
    write_set(folder / "images")
    save_codec(small_vae(in_channels=1, out_channels=1), folder / "vae")
    return folder


def test_latents_keep_captions_and_buckets(bucketed, tmp_path):
    encode(bucketed / "images", tmp_path / "latents", bucketed / "vae", shard=6)
    images = Images(str(bucketed / "images"))
    latents = Latents(str(tmp_path / "latents"))
    for key in ("captions", "buckets"):
        assert latents.manifest[key] == images.manifest[key]
    for i in range(len(images)):
        assert latents.reader[i]["json"].tobytes() == images.reader[i]["json"].tobytes()


def test_latents_of_each_bucket_are_those_of_its_images(bucketed, tmp_path):
    encode(bucketed / "images", tmp_path / "latents", bucketed / "vae", shard=6, scale="measured")
    codec = load_codec(tmp_path / "latents/codec")
    images = Images(str(bucketed / "images"))
    latents = Latents(str(tmp_path / "latents"))
    assert [bucket.name for bucket in latents.buckets] == ["8x8", "12x8", "8x12"]
    for bucket in latents.buckets:
        indices = np.arange(bucket.start, bucket.start + bucket.total)
        found = latents.read(indices).x
        assert found.shape[2:] == (bucket.height // 2, bucket.width // 2)
        expected = codec.encode(images.read(indices).x)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_scale_of_buckets_is_that_of_all_their_latents(bucketed, tmp_path):
    encode(bucketed / "images", tmp_path / "latents", bucketed / "vae", scale="measured")
    latents = Latents(str(tmp_path / "latents"))
    numbers = []
    for bucket in latents.buckets:
        indices = np.arange(bucket.start, bucket.start + bucket.total)
        numbers.append(latents.read(indices).x.flatten())
    assert torch.cat(numbers).std().item() == pytest.approx(1, rel=1e-3)


def test_a_bucket_that_the_codec_does_not_divide_is_named(tmp_path):
    write_set(tmp_path / "images", sizes=((16, 16, 3), (16, 18, 4)))
    save_codec(small_tiny(in_channels=1, out_channels=1), tmp_path / "codec")
    with refused(tmp_path / "images", "16x18", 4, kind=ValueError):
        encode(tmp_path / "images", tmp_path / "latents", tmp_path / "codec")
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize("both", [True, False])
def test_either_a_codec_or_a_text_encoder_is_given(folder, tmp_path, capfd, both):
    words = ("--codec", folder / "vae", "--text", folder) if both else ()
    command = ("encode", "--images", folder / "images/train", "--out", tmp_path / "out", *words)
    assert_refused(capfd, command, "--codec", "--text")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [{"output": "pooled"}, {"pooling": "mean"}, {"max_tokens": 5}])
def test_options_of_captions_are_refused_for_images(folder, tmp_path, option):
    with refused(*option, *option.values(), "--text", kind=ValueError):
        encode(folder / "images/train", tmp_path / "latents", folder / "vae", **option)


def test_a_scale_of_embeddings_is_refused(folder, tmp_path):
    with refused("scale", "measured", kind=ValueError):
        encode(folder / "images/train", tmp_path / "out", text=folder / "vae", scale="measured")


BROKEN = {"a number": float("nan"), "all": 0.0}


@pytest.mark.parametrize("scale", ["keep", "measured"])
@pytest.mark.parametrize("factor", BROKEN.values(), ids=["not finite", "constant"])
def test_a_broken_codec_is_refused_and_binds_nothing(folder, tmp_path, factor, scale):
    vae = small_vae()
    for value in vae.encoder.conv_out.parameters():
        value.data *= factor
    for value in vae.quant_conv.parameters():
        value.data *= factor
    save_codec(vae, tmp_path / "broken")
    with refused(tmp_path / "broken", folder / "images/train", kind=ValueError):
        encode(folder / "images/train", tmp_path / "latents", tmp_path / "broken", scale=scale)
    assert not (tmp_path / "latents").exists()
    encode(folder / "images/train", tmp_path / "latents", folder / "vae")
    assert json.loads((tmp_path / "latents/manifest.json").read_text())["scale"] == 0.5


def test_a_scale_that_is_mended_begins_the_set_anew(folder, tmp_path):
    images = folder / "images/train"
    latents = tmp_path / "latents"
    encode(images, latents, folder / "vae", shard=4)
    (latents / "manifest.json").unlink()  # as if the command had been refused after some shards
    other = small_vae(scaling_factor=0.25)
    save_codec(other, tmp_path / "other")
    encode(images, latents, tmp_path / "other", shard=4)
    encode(images, tmp_path / "expected", tmp_path / "other", shard=4)
    for path in (tmp_path / "expected").glob("*.tar"):
        assert (latents / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("options", "named"), [({"grey": True}, (3, 1)), ({"size": 15}, (2, 15))])
def test_images_that_do_not_fit_bind_nothing(folder, tmp_path, options, named):
    pack(tmp_path / "images", folder / "photos", **{"size": 16, "holdout": 0, **options})
    with refused(tmp_path / "images/train", folder / "vae", *named, kind=ValueError):
        encode(tmp_path / "images/train", tmp_path / "latents", folder / "vae")
    assert not (tmp_path / "latents").exists()
    encode(folder / "images/train", tmp_path / "latents", folder / "vae")


def test_the_codec_of_a_run_is_not_replaced(folder, tmp_path):
    run = write_autoencoder(tmp_path / "run")
    before = (run / "codec/checksums.json").read_bytes()
    with refused(run / "codec", kind=ValueError):
        encode(folder / "images/train", run, folder / "vae")
    assert (run / "codec/checksums.json").read_bytes() == before


def test_images_that_were_indexed_with_other_options_are_other_images(folder, tmp_path):
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "a", "png": buffer.getvalue()})
    index(tmp_path)
    encode(tmp_path, tmp_path / "latents", folder / "vae")
    index(tmp_path, background="black")
    with refused(tmp_path / "latents", "images", kind=ValueError):
        encode(tmp_path, tmp_path / "latents", folder / "vae")


def test_leased_processes_that_start_together_write_one_codec(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RENAME_EXCHANGE", 1 << 10)  # as on a file system that cannot swap
    out = tmp_path / "latents"
    loading = Lock()

    def load_in_turn(path):  # diffusers changes torch while it loads: not in two threads at once
        with loading:
            return load_codec(path)

    monkeypatch.setattr("trainer.jobs.encode.load_codec", load_in_turn)

    def encode_leased(_):
        encode(folder / "images/train", out, folder / "vae", shard=4, lease=1.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encode_leased, range(12)))
    assert KL(str(out / "codec")).weights() == KL(str(folder / "vae")).weights()
    assert (out / "manifest.json").exists()
    assert not list(out.glob("*.lock"))
