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
from tests.helpers.codecs import small_vae
from tests.helpers.refusals import refused
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
    encode(folder / "images/train", folder / "vae", tmp_path / "latents")
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
    encode(folder / "images/train", folder / "vae", tmp_path / "latents", scale="measured")
    assert deviation(tmp_path / "latents") == pytest.approx(1, rel=0.01)


def test_an_autoencoders_scale_is_measured_and_other_images_get_it(folder, tmp_path):
    run = write_autoencoder(tmp_path / "run")
    for number, codec in enumerate((run, run / "codec")):
        encode(folder / "images/train", codec, tmp_path / str(number))
        assert deviation(tmp_path / str(number)) == pytest.approx(1, rel=0.01)
    scale = read_manifest(tmp_path / "0")["scale"]
    encode(folder / "images/heldout", tmp_path / "0/codec", tmp_path / "heldout")
    assert read_manifest(tmp_path / "heldout")["scale"] == scale
    encode(folder / "images/heldout", run, tmp_path / "kept", scale="keep")
    assert read_manifest(tmp_path / "kept")["scale"] == 0.5


def test_another_scale_is_another_set(folder, tmp_path):
    encode(folder / "images/train", folder / "vae", tmp_path / "latents", scale="measured")
    with refused(tmp_path / "latents", "scale", 0.5, kind=ValueError):
        encode(folder / "images/train", folder / "vae", tmp_path / "latents")


def test_a_codec_that_was_lost_is_written_again(folder, tmp_path):
    encode(folder / "images/train", folder / "vae", tmp_path / "latents")
    before = (tmp_path / "latents/000000.tar").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "latents/codec")
    encode(folder / "images/train", folder / "vae", tmp_path / "latents")
    assert KL(str(tmp_path / "latents/codec")).scale == 0.5
    assert (tmp_path / "latents/000000.tar").stat().st_mtime_ns == before


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
        encode(folder / "images/train", tmp_path / "broken", tmp_path / "latents", scale=scale)
    assert not (tmp_path / "latents").exists()
    encode(folder / "images/train", folder / "vae", tmp_path / "latents")
    assert json.loads((tmp_path / "latents/manifest.json").read_text())["scale"] == 0.5


def test_a_scale_that_is_mended_begins_the_set_anew(folder, tmp_path):
    images = folder / "images/train"
    latents = tmp_path / "latents"
    encode(images, folder / "vae", latents, shard=4)
    (latents / "manifest.json").unlink()  # as if the command had been refused after some shards
    other = small_vae(scaling_factor=0.25)
    save_codec(other, tmp_path / "other")
    encode(images, tmp_path / "other", latents, shard=4)
    encode(images, tmp_path / "other", tmp_path / "expected", shard=4)
    for path in (tmp_path / "expected").glob("*.tar"):
        assert (latents / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("options", "named"), [({"grey": True}, (3, 1)), ({"size": 15}, (2, 15))])
def test_images_that_do_not_fit_bind_nothing(folder, tmp_path, options, named):
    pack(tmp_path / "images", folder / "photos", **{"size": 16, "holdout": 0, **options})
    with refused(tmp_path / "images/train", folder / "vae", *named, kind=ValueError):
        encode(tmp_path / "images/train", folder / "vae", tmp_path / "latents")
    assert not (tmp_path / "latents").exists()
    encode(folder / "images/train", folder / "vae", tmp_path / "latents")


def test_the_codec_of_a_run_is_not_replaced(folder, tmp_path):
    run = write_autoencoder(tmp_path / "run")
    before = (run / "codec/checksums.json").read_bytes()
    with refused(run / "codec", kind=ValueError):
        encode(folder / "images/train", folder / "vae", run)
    assert (run / "codec/checksums.json").read_bytes() == before


def test_images_that_were_indexed_with_other_options_are_other_images(folder, tmp_path):
    picture = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    with TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "a", "png": buffer.getvalue()})
    index(tmp_path)
    encode(tmp_path, folder / "vae", tmp_path / "latents")
    index(tmp_path, background="black")
    with refused(tmp_path / "latents", "images", kind=ValueError):
        encode(tmp_path, folder / "vae", tmp_path / "latents")


def test_leased_processes_that_start_together_write_one_codec(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RENAME_EXCHANGE", 1 << 10)  # as on a file system that cannot swap
    out = tmp_path / "latents"
    loading = Lock()

    def load_in_turn(path):  # diffusers changes torch while it loads: not in two threads at once
        with loading:
            return load_codec(path)

    monkeypatch.setattr("trainer.jobs.encode.load_codec", load_in_turn)

    def encode_leased(_):
        encode(folder / "images/train", folder / "vae", out, shard=4, lease=1.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encode_leased, range(12)))
    assert KL(str(out / "codec")).weights() == KL(str(folder / "vae")).weights()
    assert (out / "manifest.json").exists()
    assert not list(out.glob("*.lock"))
