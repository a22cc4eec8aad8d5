"""Training from a web server: a killed run resumes to the same weights."""

import os
import signal

import pytest
from webdataset import TarWriter

from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.data.remote import png, served
from tests.distributed.processes import wait_until
from tests.distributed.runs import equal, final_state, tiny_fit_words
from tests.helpers.commands import Workspace
from tests.helpers.refusals import assert_refused

PIXELS = ("--model.codec", "null", "--model.denoiser.net.channels", "3")  # images of 8 x 8


@pytest.fixture
def empty_workspace(tmp_path):
    """Return a workspace in which nothing has run."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    return Workspace(folder)


@pytest.fixture
def server(tmp_path):
    """Serve five tars of 40 to 44 images."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(5):
        with TarWriter(str(folder / f"{number}.tar"), encoder=False) as writer:
            for i in range(40 + number):
                image = png((number * 50 + i) % 256)
                label = str(i % 10).encode()
                writer.write({"__key__": f"{number}_{i}", "png": image, "cls": label})
    with served(folder) as running:
        yield running


def streamed_words(server, cache, *more):
    """Return the options of training on the server's tars."""
    urls = f"{server.url}/{{0..4}}.tar"
    source = (
        *("--data.source", "SequentialTars", "--data.source.urls", urls),
        *("--data.source.cache", cache),
        *("--data.source.classes", "10", "--data.batch", "16", "--data.workers", "2"),
    )
    return (*source, *PIXELS, *more)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_weights(empty_workspace, server, tmp_path):
    accumulated = ("--checkpoints.every", "7", "--trainer.accumulate_grad_batches", "2")
    words = streamed_words(server, tmp_path / "cache", *accumulated)
    uninterrupted = tmp_path / "uninterrupted"
    empty_workspace.rectify(*tiny_fit_words(uninterrupted, 40, *words))

    # kill a second run after its first checkpoint
    out = tmp_path / "run"
    process = empty_workspace.start(*tiny_fit_words(out, 40, *words))
    wait_until(process, lambda: list((out / "checkpoints").glob("step=*")))
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before the kill"
    assert read_checkpoint(newest_checkpoint(out))["global_step"] < 40

    # the same command resumes it
    empty_workspace.rectify(*tiny_fit_words(out, 40, *words))
    assert equal(final_state(out), final_state(uninterrupted))
    requests = server.requests
    assert len(requests) == len(set(requests)) == 5, "all runs share one download of each shard"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_more_processes_continue_with_the_unfinished_shards(
    request, empty_workspace, server, tmp_path, strategy
):
    if not request.config.getoption("--long"):
        pytest.skip("only with --long")
    run = tmp_path / "run"
    words = streamed_words(server, tmp_path / "cache", "--checkpoints.keep", "9")
    empty_workspace.rectify(*tiny_fit_words(run, 7, *words))
    more = ("--trainer.devices", "2", "--trainer.strategy", strategy)
    empty_workspace.rectify(*tiny_fit_words(run, 14, *words, *more), processes=2)

    # one process has two readers, two processes have four
    checkpoints = run / "checkpoints"
    one = read_checkpoint(checkpoints / "step=000000007.ckpt")["DataModule"]["readers"]
    two = read_checkpoint(checkpoints / "step=000000014.ckpt")["DataModule"]["readers"]
    assert len(one["progress"]) == 2
    assert len(two["progress"]) == 4

    # the first two readers had passed 64 and 48 samples: one shard each
    finished = sum(blocks for blocks, *_ in one["progress"])
    assert finished == 2 == two["low"] + len(two["ahead"])
    assert all(blocks or passed for blocks, passed, *_ in two["progress"])


@pytest.fixture
def bad_words(empty_workspace, server, tmp_path, monkeypatch):
    """Return the words of a training command; the fourth of its tars is an HTML page."""
    monkeypatch.chdir(empty_workspace.path)
    (tmp_path / "served/3.tar").write_bytes(b"<html>not found</html>")
    words = streamed_words(server, tmp_path / "cache", "--trainer.logger", "false")
    return tiny_fit_words(tmp_path / "run", 40, *words)


def test_a_file_that_is_no_tar_is_named(bad_words, server, capfd):
    assert_refused(capfd, bad_words, f"{server.url}/3.tar")


def test_a_pipe_is_refused_and_not_run(bad_words, tmp_path, capfd):
    words = (*bad_words, "--data.source.urls", f"pipe:touch {tmp_path}/ran")
    assert_refused(capfd, words, "pipe:", "allow_pipe")
    assert not (tmp_path / "ran").exists()


def test_another_number_of_classes_than_the_model_has_is_refused(bad_words, capfd):
    words = (*bad_words, "--data.source.classes", "11")
    assert_refused(capfd, words, "model.condition.classes", 11, 10)
