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

from data.cache import Cache, parse_scheme
from data.files import process_space
from tests.data.remote import read_from_cache, served
from tests.helpers.refusals import refused


@pytest.fixture
def server(tmp_path):
    """A server of four files, 0 to 3; each holds 1000 bytes of its number."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for number in range(4):
        (folder / str(number)).write_bytes(bytes([number]) * 1000)
    with served(folder) as running:
        yield running


def make_cache(tmp_path, limit=10**6, **options):
    return Cache(tmp_path / "cache", limit, wait=0.01, **options)


def kept(tmp_path):
    """Return the numbers of the files in the cache."""
    return sorted(path.read_bytes()[0] for path in (tmp_path / "cache").glob("*.part"))


def test_a_file_is_downloaded_once(tmp_path, server):
    url = f"{server.url}/2"
    for _ in range(3):
        with make_cache(tmp_path).open(url) as file:
            assert file.read() == b"\2" * 1000
    assert server.requests == ["/2"]
    assert os.listdir(tmp_path / "cache") == [make_cache(tmp_path).path(url).name]


def test_local_files_are_opened_without_a_copy(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"local")
    for url in (str(tmp_path / "x.tar"), f"file://{tmp_path}/x.tar"):
        with make_cache(tmp_path).open(url) as file:
            assert file.read() == b"local"
    assert not (tmp_path / "cache").exists()


def test_the_least_recently_used_file_is_evicted_first(tmp_path, server):
    cache = make_cache(tmp_path, 2500)
    for number in (0, 1, 0, 2):
        cache.open(f"{server.url}/{number}").close()
    assert kept(tmp_path) == [0, 2]


def test_a_file_in_use_is_never_evicted(tmp_path, server):
    cache = make_cache(tmp_path, 1)
    with cache.open(f"{server.url}/0") as file:
        mapped = np.memmap(file, np.uint8, "r")  # outlives the handle

    # The cache exceeds its limit by what is in use or was just downloaded.
    cache.open(f"{server.url}/1").close()
    assert kept(tmp_path) == [0, 1]
    cache.open(f"{server.url}/2").close()
    assert kept(tmp_path) == [0, 2]
    assert (mapped == 0).all()

    # Once nobody uses the file it goes.
    del mapped
    cache.open(f"{server.url}/3").close()
    assert kept(tmp_path) == [3]


def test_many_processes_share_a_folder(tmp_path, server):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = []
    for i in range(4):
        args = (tmp_path / "cache", server.url, [0, i % 4, 3, 2], results)
        processes.append(context.Process(target=read_from_cache, args=args))
    for process in processes:
        process.start()
    read = [results.get(timeout=60) for _ in range(16)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert all(correct for _, correct in read)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_one_thread_downloads_and_the_others_wait(tmp_path, server):
    server.gate = threading.Event()

    def fetch():
        make_cache(tmp_path).open(f"{server.url}/1").close()

    threads = [threading.Thread(target=fetch) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    server.gate.set()
    for thread in threads:
        thread.join()
    assert server.requests == ["/1"]


def test_a_killed_download_leaves_no_torn_file(tmp_path, server):
    folder = tmp_path / "cache"
    url = f"{server.url}/1"

    # Kill a process while it waits for the server.
    server.gate = threading.Event()
    code = f"from data.cache import Cache; Cache({str(folder)!r}, 10**6).open({url!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    while not server.requests:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.gate.set()

    # Leave the file that it would have left after its first bytes.
    leftover = folder / f".x.part.{process_space()}-{process.pid}-7-00000000.tmp"
    leftover.write_bytes(b"torn")
    assert kept(tmp_path) == []

    with make_cache(tmp_path).open(url) as file:
        assert len(file.read()) == 1000
    assert kept(tmp_path) == [1]
    assert not list(folder.glob(".*.tmp")), "the next download removes what a killed one left"


def test_a_broken_download_is_tried_again(tmp_path, server):
    server.failures = 2
    with make_cache(tmp_path).open(f"{server.url}/3") as file:
        assert len(file.read()) == 1000
    assert len(server.requests) == 3


def test_a_missing_file_is_named_at_the_first_try(tmp_path, server):
    with refused(f"{server.url}/nothing", kind=OSError):
        make_cache(tmp_path).open(f"{server.url}/nothing")
    assert len(server.requests) == 1, "another try would not help"


def test_a_download_that_keeps_failing_is_named_with_the_number_of_tries(tmp_path, server):
    server.failures = 9
    with refused(f"{server.url}/1", " 4 ", kind=OSError):
        make_cache(tmp_path).open(f"{server.url}/1")
    assert len(server.requests) == 4
    assert kept(tmp_path) == []


def test_a_missing_library_is_named_with_the_command_that_installs_it(tmp_path):
    with refused("gs://b/x", "pip install 'rectify[remote]'", kind=OSError):
        make_cache(tmp_path).open("gs://b/x")


UNSUPPORTED = [
    "simplecache::http://x/y",
    "local::x",
    "ftp://x/y",
    "http:x",
    "PIPE:true",
    "ssh://x/y",
    "a:b.tar",
]


@pytest.mark.parametrize("url", UNSUPPORTED)
def test_other_schemes_are_refused(tmp_path, url):
    with refused(url, "https", "s3", kind=ValueError):
        make_cache(tmp_path).open(url)


@pytest.mark.parametrize("start", ["pipe:", "pipe::", "pipe://"])
def test_a_pipe_is_refused_unless_allowed(tmp_path, start):
    url = f"{start}touch {tmp_path}/ran; echo hello"
    with refused(url, "pipe:", "allow_pipe", kind=ValueError):
        make_cache(tmp_path).open(url)
    assert not (tmp_path / "ran").exists()


def test_an_allowed_pipe_runs(tmp_path):
    url = f"pipe:touch {tmp_path}/ran; echo hello"
    with make_cache(tmp_path, allow_pipe=True).open(url) as file:
        assert file.read() == b"hello\n"
    assert (tmp_path / "ran").exists()


def test_a_pipe_that_fails_is_named_with_the_number_of_tries(tmp_path):
    with refused("pipe:exit 3", " 4 ", kind=OSError):
        make_cache(tmp_path, allow_pipe=True).open("pipe:exit 3")


def test_the_scheme_of_an_ipv6_address_is_http():
    assert parse_scheme("http://[::1]:80/x") == "http"


@pytest.mark.parametrize("path", ["./a:b.tar", "/a::b"])
def test_a_path_with_colons_has_no_scheme(path):
    assert parse_scheme(path) == ""
