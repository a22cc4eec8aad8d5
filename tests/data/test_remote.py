"""Our sets are read from a URL as from a folder."""

import numpy as np
import pytest
import torch

from data.batch import RankBatches
from data.files import read_json, write_json
from data.images import Images
from data.latents import Latents
from data.noise import noise
from data.pairs import Pairs, PairWriter
from data.shards import ShardWriter, array_to_npy
from tests.data.remote import latent, png, served
from tests.helpers.refusals import refused


def write_set(folder, kind="latents", count=25, shift=0):
    """Write a set of latents or images in shards of 6; sample i depends on i and `shift`."""
    provenance = {"classes": ["0", "1"], "grey": False, "listing": "0" * 64}
    writer = ShardWriter(folder, kind, provenance, count, 6)
    for number in writer.missing():
        samples = []
        for i in writer.indices(number):
            sample = {"__key__": f"{i:09d}", "cls": str(i % 2).encode()}
            if kind == "latents":
                sample["npy"] = array_to_npy(latent(0, i + shift))
            else:
                sample["png"] = png(i * 9 + shift)
            samples.append(sample)
        writer.write(number, samples)
    assert writer.finish()


@pytest.fixture
def folder(tmp_path):
    """The folder that the server serves."""
    path = tmp_path / "remote"
    path.mkdir()
    return path


@pytest.fixture
def server(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("RECTIFY_CACHE", str(tmp_path / "cache"))
    with served(folder) as running:
        yield running


def test_a_set_is_read_from_a_url_as_from_a_folder(folder, server):
    for kind, source in (("latents", Latents), ("images", Images)):
        write_set(folder / kind, kind)
        local = source(str(folder / kind))
        remote = source(f"{server.url}/{kind}")
        for step in (0, 3, 7):  # elastic resume: any rank of any number, from any step
            for world in (1, 2):
                expected = next(iter(RankBatches(local, 8, 5, step, world - 1, world)))
                batch = next(iter(RankBatches(remote, 8, 5, step, world - 1, world)))
                assert torch.equal(batch.x, expected.x)
                assert torch.equal(batch.condition, expected.condition)
        assert torch.equal(local.read(np.arange(25)).x, remote.read(np.arange(25)).x)

    # Of each set: one manifest, and five shards of two files. Each is downloaded once.
    assert len(server.requests) == 2 + 2 * 2 * 5
    assert len(set(server.requests)) == len(server.requests)


def test_pairs_are_read_from_a_url(folder, server):
    provenance = {"guidance": 1.0, "interpolant": "", "prediction": "", "teacher": ""}
    writer = PairWriter(folder / "pairs", provenance, 10, 3, (1, 2, 2), shard=4)
    for number in writer.shards.numbers():
        writer.write(number, writer.noise(number), None)
    writer.shards.finish()
    batch = Pairs(f"{server.url}/pairs").read(np.arange(10))
    assert torch.equal(batch.noise[7], noise(3, 7, (1, 2, 2)))


def test_a_set_that_was_made_again_is_downloaded_again(folder, server):
    write_set(folder / "a")
    assert Latents(f"{server.url}/a").read(np.array([3])).x.max() == 3
    for path in (folder / "a").iterdir():
        path.unlink()
    write_set(folder / "a", shift=50)
    assert Latents(f"{server.url}/a").read(np.array([3])).x.max() == 53


def test_a_shard_damaged_on_the_server_is_named_until_it_is_restored(folder, server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    write_set(folder / "a")
    tar = folder / "a/000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"NUMPY", b"NUMPI", 1))
    source = Latents(f"{server.url}/a")
    with refused(f"{server.url}/a/000001.tar", " 4 ", "checksum", "manifest", kind=OSError):
        source.read(np.array([7]))
    tar.write_bytes(content)
    assert source.read(np.array([7])).x.max() == 7


def test_a_shard_damaged_in_the_cache_is_named_and_downloaded_again(tmp_path, folder, server):
    write_set(folder / "a")
    assert Latents(f"{server.url}/a").read(np.array([7])).x.max() == 7
    for path in (tmp_path / "cache").glob("*.part"):
        if path.stat().st_size > 20_000:  # a tar, not its offsets
            path.write_bytes(path.read_bytes().replace(b"NUMPY", b"NUMPI", 1))
    with refused(f"{server.url}/a/000001.tar", "checksum", "manifest", kind=ValueError):
        Latents(f"{server.url}/a").read(np.array([7]))
    assert Latents(f"{server.url}/a").read(np.array([7])).x.max() == 7


def test_a_manifest_with_a_wrong_sum_is_named(folder, server):
    write_set(folder / "a")
    path = folder / "a/manifest.json"
    write_json(path, {**read_json(path), "samples": 3})
    with refused(f"{server.url}/a/manifest.json", "samples", kind=ValueError):
        Latents(f"{server.url}/a")


def test_a_manifest_that_is_not_json_is_named(folder, server):
    write_set(folder / "a")
    (folder / "a/manifest.json").write_text("<html>")
    with refused(f"{server.url}/a/manifest.json", "JSON", kind=ValueError):
        Latents(f"{server.url}/a")


def test_a_missing_manifest_is_named(server):
    with refused(f"{server.url}/b/manifest.json", kind=OSError):
        Latents(f"{server.url}/b")


def test_a_pipe_is_refused(tmp_path):
    with refused(f"pipe:touch {tmp_path}/ran", "allow_pipe", kind=ValueError):
        Latents(f"pipe:touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()


def test_a_set_is_read_from_a_bucket(tmp_path, monkeypatch):
    missing = "s3fs is not installed (pip install 'rectify[remote]')"
    pytest.importorskip("s3fs", reason=missing)
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    endpoint = server.ThreadedMotoServer(port=0, verbose=False)
    endpoint.start()
    try:
        host, port = endpoint.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("RECTIFY_CACHE", str(tmp_path / "cache"))

        # Upload a set.
        write_set(tmp_path / "a")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in (tmp_path / "a").iterdir():
            client.upload_file(str(path), "bucket", f"sets/a/{path.name}")

        everything = np.arange(25)
        local = Latents(str(tmp_path / "a")).read(everything)
        remote = Latents("s3://bucket/sets/a").read(everything)
        assert torch.equal(remote.x, local.x)
        with refused("s3://bucket/none/manifest.json", kind=OSError):
            Latents("s3://bucket/none")
    finally:
        endpoint.stop()
