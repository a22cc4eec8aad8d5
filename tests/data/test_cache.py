"""Files of other machines, kept in a folder that many processes share."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.cache import Cache, scheme
from tests.data.remote import served


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    for number in range(4):
        (folder / str(number)).write_bytes(bytes([number]) * 1000)
    with served(folder) as found:
        yield found


def cache(tmp_path, limit=10**6, **options):
    return Cache(tmp_path / "cache", limit, wait=0.01, **options)


def kept(tmp_path):
    return sorted(path.read_bytes()[0] for path in (tmp_path / "cache").glob("*.part"))


def test_a_file_is_downloaded_once(tmp_path, server):
    for _ in range(3):
        with cache(tmp_path).open(f"{server.url}/2") as file:
            assert file.read() == b"\2" * 1000
    assert server.asked == ["/2"] and os.listdir(tmp_path / "cache") == [cache(tmp_path).path(f"{server.url}/2").name]


def test_local_paths_are_opened_where_they_are(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"here")
    for url in (str(tmp_path / "x.tar"), f"file://{tmp_path}/x.tar"):
        with cache(tmp_path).open(url) as file:
            assert file.read() == b"here"
    assert not (tmp_path / "cache").exists()


def test_the_least_recently_used_goes_first(tmp_path, server):
    found = cache(tmp_path, 2500)
    for number in (0, 1, 0, 2):
        found.open(f"{server.url}/{number}").close()
    assert kept(tmp_path) == [0, 2]


def test_a_file_in_use_is_never_evicted(tmp_path, server):
    found = cache(tmp_path, 1)
    with found.open(f"{server.url}/0") as file:
        mapped = np.memmap(file, np.uint8, "r")  # outlives the handle
    found.open(f"{server.url}/1").close()
    assert kept(tmp_path) == [0, 1], "over the limit by what is in use or was just fetched"
    found.open(f"{server.url}/2").close()
    assert kept(tmp_path) == [0, 2] and (mapped == 0).all()
    del mapped
    found.open(f"{server.url}/3").close()
    assert kept(tmp_path) == [3]


def fetch(folder, url, numbers, results):
    found = Cache(folder, 2000, wait=0.01)
    for number in numbers:
        with found.open(f"{url}/{number}") as file:
            results.put((number, file.read() == bytes([number]) * 1000))


def test_many_processes_share_a_folder(tmp_path, server):
    context, results = multiprocessing.get_context("spawn"), multiprocessing.Queue()
    results = context.Queue()
    crowd = [context.Process(target=fetch, args=(tmp_path / "cache", server.url, [0, i % 4, 3, 2], results)) for i in range(4)]
    for process in crowd:
        process.start()
    found = [results.get(timeout=60) for _ in range(16)]
    for process in crowd:
        process.join()
        assert process.exitcode == 0
    assert all(good for _, good in found) and not list((tmp_path / "cache").glob("*.tmp"))


def test_one_downloads_and_the_others_wait(tmp_path, server):
    server.gate = threading.Event()
    crowd = [threading.Thread(target=lambda: cache(tmp_path).open(f"{server.url}/1").close()) for _ in range(5)]
    for thread in crowd:
        thread.start()
    time.sleep(0.3)
    server.gate.set()
    for thread in crowd:
        thread.join()
    assert server.asked == ["/1"]


def test_killed_in_the_middle_leaves_no_torn_file(tmp_path, server):
    server.gate = threading.Event()
    code = f"from data.cache import Cache; Cache({str(tmp_path / 'cache')!r}, 10**6).open({server.url + '/1'!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    while not server.asked:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.gate.set()
    (tmp_path / "cache" / f".x.part.{os.uname().nodename}-{process.pid}-00000000.tmp").write_bytes(b"torn")  # had it begun
    assert kept(tmp_path) == []
    with cache(tmp_path).open(f"{server.url}/1") as file:
        assert len(file.read()) == 1000
    assert kept(tmp_path) == [1] and not list((tmp_path / "cache").glob(".*.tmp")), "what it left is swept"


def test_a_broken_connection_is_tried_again(tmp_path, server):
    server.failures = 2
    with cache(tmp_path).open(f"{server.url}/3") as file:
        assert len(file.read()) == 1000
    assert len(server.asked) == 3


def test_errors_name_the_url(tmp_path, server):
    with pytest.raises(OSError, match=f"{server.url}/nothing: no such file"):
        cache(tmp_path).open(f"{server.url}/nothing")
    assert len(server.asked) == 1, "trying again does not mend that"
    server.failures = 9
    with pytest.raises(OSError, match=f"{server.url}/1: not downloaded in 4 tries"):
        cache(tmp_path).open(f"{server.url}/1")
    assert kept(tmp_path) == []
    with pytest.raises(OSError, match=r"gs://b/x: .*pip install 'rectify\[remote\]'"):
        cache(tmp_path).open("gs://b/x")


REFUSED = ["simplecache::http://x/y", "local::x", "ftp://x/y", "http:x", "PIPE:true", "pipe::x", "ssh://x/y", "a:b.tar"]


@pytest.mark.parametrize("url", REFUSED)
def test_other_schemes_are_refused(tmp_path, url):
    with pytest.raises(ValueError, match="neither a path|runs a shell command"):
        cache(tmp_path).open(url)


def test_a_pipe_runs_only_where_allowed(tmp_path):
    url = f"pipe:touch {tmp_path}/ran; echo hello"
    for url_of_it in (url, f"pipe://{url[5:]}"):
        with pytest.raises(ValueError, match="pipe: runs a shell command, which is refused"):
            cache(tmp_path).open(url_of_it)
    assert not (tmp_path / "ran").exists()
    with cache(tmp_path, allow_pipe=True).open(url) as file:
        assert file.read() == b"hello\n" and (tmp_path / "ran").exists()
    with pytest.raises(OSError, match="pipe:exit 3: not downloaded in 4 tries"):
        cache(tmp_path, allow_pipe=True).open("pipe:exit 3")


def test_a_web_address_of_six_numbers_is_one():
    assert scheme("http://[::1]:80/x") == "http" and scheme("./a:b.tar") == scheme("/a::b") == ""
