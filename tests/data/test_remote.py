"""Sets of ours at a URL are read like local ones."""

import numpy as np
import pytest
import torch

from data.batch import Steps
from data.files import read_json, write_json
from data.images import Images
from data.latents import Latents
from data.noise import noise
from data.pairs import Pairs, PairWriter
from data.shards import ShardWriter, encode_array
from tests.data.remote import latent, png, served


def write(folder, kind="latents", count=25, shift=0):
    field = {"latents": ("npy", lambda i: encode_array(latent(0, i + shift))), "images": ("png", lambda i: png(i * 9 + shift))}
    writer = ShardWriter(folder, kind, {"classes": ["0", "1"], "listing": "0" * 64}, count, 6)
    for number in writer.missing():
        name, data = field[kind]
        writer.write(number, [{"__key__": f"{i:09d}", name: data(i), "cls": str(i % 2).encode()} for i in writer.indices(number)])
    assert writer.finish()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("RECTIFY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "there").mkdir()
    with served(tmp_path / "there") as found:
        yield found


def test_sets_are_read_alike(tmp_path, server):
    for kind, source in (("latents", Latents), ("images", Images)):
        write(tmp_path / "there" / kind, kind)
        here, there = source(str(tmp_path / "there" / kind)), source(f"{server.url}/{kind}")
        for step in (0, 3, 7):  # elastic resume: any rank of any number, from any step
            for world in (1, 2):
                a, b = (next(iter(Steps(each, 8, 5, step, world - 1, world))) for each in (here, there))
                assert torch.equal(a.x, b.x) and torch.equal(a.condition, b.condition)
        assert torch.equal(here.read(np.arange(25)).x, there.read(np.arange(25)).x)
    assert len(server.asked) == len(set(server.asked)) == 2 + 2 * 2 * 5, "a manifest each, and every file once"


def test_pairs_too(tmp_path, server):
    provenance = {"guidance": 1.0, "interpolant": "", "prediction": "", "teacher": ""}
    writer = PairWriter(tmp_path / "there/pairs", provenance, 10, 3, (1, 2, 2), shard=4)
    for number in writer.shards.numbers():
        writer.write(number, writer.noise(number), None)
    writer.shards.finish()
    batch = Pairs(f"{server.url}/pairs").read(np.arange(10))
    assert torch.equal(batch.noise[7], noise(3, 7, (1, 2, 2)))


def test_a_set_made_again_is_fetched_again(tmp_path, server):
    write(tmp_path / "there/a")
    assert Latents(f"{server.url}/a").read(np.array([3])).x.max() == 3
    for path in (tmp_path / "there/a").iterdir():
        path.unlink()
    write(tmp_path / "there/a", shift=50)
    assert Latents(f"{server.url}/a").read(np.array([3])).x.max() == 53


def test_damage_is_named(tmp_path, server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    write(tmp_path / "there/a")
    tar = tmp_path / "there/a/000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"NUMPY", b"NUMPI", 1))
    source = Latents(f"{server.url}/a")
    with pytest.raises(OSError, match=r"/a/000001.tar: not downloaded in 4 tries .*its checksum is not the manifest's"):
        source.read(np.array([7]))
    tar.write_bytes(content)
    assert source.read(np.array([7])).x.max() == 7
    for kept in (tmp_path / "cache").glob("*.part"):  # the disk forgets a bit
        kept.write_bytes(kept.read_bytes().replace(b"NUMPY", b"NUMPI", 1) if kept.stat().st_size > 20_000 else kept.read_bytes())
    with pytest.raises(ValueError, match="/a/000001.tar: its checksum is not the manifest's"):
        Latents(f"{server.url}/a").read(np.array([7]))
    assert Latents(f"{server.url}/a").read(np.array([7])).x.max() == 7
    manifest = read_json(tmp_path / "there/a/manifest.json")
    write_json(tmp_path / "there/a/manifest.json", {**manifest, "samples": 3})
    with pytest.raises(ValueError, match="/a/manifest.json: its entries do not add up"):
        Latents(f"{server.url}/a")
    (tmp_path / "there/a/manifest.json").write_text("<html>")
    with pytest.raises(ValueError, match="/a/manifest.json: not valid JSON"):
        Latents(f"{server.url}/a")
    with pytest.raises(OSError, match="/b/manifest.json: no such file"):
        Latents(f"{server.url}/b")
    with pytest.raises(ValueError, match="pipe: runs a shell command"):
        Latents(f"pipe:touch {tmp_path}/ran")


def test_a_bucket(tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'rectify[remote]')")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    endpoint = server.ThreadedMotoServer(port=0, verbose=False)
    endpoint.start()
    try:
        host, port = endpoint.get_host_and_port()
        for name, value in {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("RECTIFY_CACHE", str(tmp_path / "cache"))
        write(tmp_path / "a")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for path in (tmp_path / "a").iterdir():
            client.upload_file(str(path), "bucket", f"sets/a/{path.name}")
        everything = np.arange(25)
        assert torch.equal(Latents("s3://bucket/sets/a").read(everything).x, Latents(str(tmp_path / "a")).read(everything).x)
        with pytest.raises(OSError, match="s3://bucket/none/manifest.json: no such file"):
            Latents("s3://bucket/none")
    finally:
        endpoint.stop()
