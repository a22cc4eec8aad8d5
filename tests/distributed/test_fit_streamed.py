"""Training from a web server: killed and resumed it gives the same weights."""

import os
import signal
import time

import pytest
from webdataset import TarWriter

from deploy.cli import main
from models import teacher
from tests.conftest import Workspace
from tests.data.remote import png, served
from tests.distributed.runs import equal, final, fit

PIXELS = ("--model.codec", "null", "--model.denoiser.net.channels", "3")  # of 8 x 8


@pytest.fixture
def place(tmp_path):
    (tmp_path / "place").mkdir()
    return Workspace(tmp_path / "place")


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(5):
        with TarWriter(str(folder / f"{number}.tar"), encoder=False) as writer:
            for i in range(40 + number):
                writer.write({"__key__": f"{number}_{i}", "png": png((number * 50 + i) % 256), "cls": str(i % 10).encode()})
    with served(folder) as found:
        yield found


def streamed(server, cache, *more):
    urls = ("--data.source", "Streamed", "--data.source.urls", server.url + "/{0..4}.tar", "--data.source.cache", cache)
    return (*urls, "--data.source.classes", "10", "--data.batch", "16", "--data.workers", "2", *PIXELS, *more)


def test_killed_and_resumed_gives_the_same_weights(place, server, tmp_path):
    words = streamed(server, tmp_path / "cache", "--checkpoints.every", "7", "--trainer.accumulate_grad_batches", "2")
    place.rectify(*fit(tmp_path / "whole", 40, *words))
    out = tmp_path / "run"
    process = place.start(*fit(out, 40, *words))
    while not list((out / "checkpoints").glob("step=*")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before the kill"
    assert teacher.read(teacher.newest(out))["global_step"] < 40
    place.rectify(*fit(out, 40, *words))
    assert equal(final(out), final(tmp_path / "whole"))
    assert len(server.asked) == len(set(server.asked)) == 5, "each shard was downloaded once for all runs"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_more_processes_go_on_with_what_is_unfinished(request, place, server, tmp_path, strategy):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    run, words = tmp_path / "run", streamed(server, tmp_path / "cache", "--checkpoints.keep", "9")
    place.rectify(*fit(run, 7, *words))
    place.rectify(*fit(run, 14, *words, "--trainer.devices", "2", "--trainer.strategy", strategy), processes=2)
    one, two = (teacher.read(run / f"checkpoints/step={step:09d}.ckpt")["Stream"]["streamed"] for step in (7, 14))
    assert len(one["rows"]) == 2 and len(two["rows"]) == 4
    finished = sum(row[0] for row in one["rows"])  # 64 and 48 samples went through the two lanes
    assert finished == 2 == two["low"] + len(two["ahead"]) and all(row[0] or row[1] for row in two["rows"])


def test_errors_are_one_line(place, server, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(place.path)

    def refused(*words):
        assert main([str(word) for word in fit(tmp_path / "run", 40, *words)]) == 2
        said = capfd.readouterr().err
        assert "Traceback" not in said
        return said.strip().splitlines()[-1]

    (tmp_path / "served/3.tar").write_bytes(b"<html>not found</html>")
    words = streamed(server, tmp_path / "cache", "--trainer.logger", "false")
    assert refused(*words).startswith(f"rectify: error: {server.url}/3.tar: no whole sample of")
    said = refused(*words, "--data.source.urls", f"pipe:touch {tmp_path}/ran")
    assert "pipe: runs a shell command, which is refused" in said and not (tmp_path / "ran").exists()
    assert "has 11 classes, model.condition.classes is 10" in refused(*words, "--data.source.classes", "11")
