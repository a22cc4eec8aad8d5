"""A web server of files, tars to serve, and a program that must not be run."""

import io
import os
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import EpsImagePlugin, Image
from webdataset import TarWriter

from data.cache import Cache
from data.shards import array_to_npy


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, records the requests, and fails on demand."""

    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        if server.failures:
            server.failures -= 1
            self.send_response(200)  # a connection that breaks in the middle of a file
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"torn")
            self.close_connection = True
            return
        if server.gate:
            server.gate.wait(20)
        super().do_GET()

    def log_message(self, *_):
        pass


@contextmanager
def served(folder):
    """Serve a folder on a port of this machine; yield the server.

    The server has these attributes:
        url: its address.
        requests: paths of all requests so far.
        failures: number of requests to come that break off in the middle.
        gate: an event that every request waits for, or None.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    server.requests = []
    server.failures = 0
    server.gate = None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def read_from_cache(folder, url, numbers, results):
    """Read URL/NUMBER for each number; put (number, whether its bytes are right) into a queue.

    It is called in new processes, which then import only this module.
    """
    cache = Cache(folder, 2000, wait=0.01)
    for number in numbers:
        with cache.open(f"{url}/{number}") as file:
            results.put((number, file.read() == bytes([number]) * 1000))


def latent(number, i):
    """Return the latent of sample `i` of tar `number`; all its values are 100 number + i."""
    return np.full((1, 2, 2), number * 100 + i, np.float32)


def write_tars(folder, counts, extra=None):
    """Write tars of latents and return their paths.

    Args:
        folder: where shard-000.tar and so on are written.
        counts: number of samples in each tar.
        extra: members added to each sample.
    """
    folder.mkdir(exist_ok=True)
    paths = []
    for number, count in enumerate(counts):
        path = str(folder / f"shard-{number:03d}.tar")
        with TarWriter(path, encoder=False) as writer:
            for i in range(count):
                sample = {
                    "__key__": f"{number}_{i:03d}",
                    "cls": str(i % 3).encode(),
                    "npy": array_to_npy(latent(number, i)),
                }
                writer.write({**sample, **(extra or {})})
        paths.append(path)
    return paths


def png(value, size=8, kind="PNG"):
    """Return an image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def replace_ghostscript(tmp_path, monkeypatch):
    """Put a Ghostscript first in PATH that creates the file TMP_PATH/ran when it is run."""
    program = tmp_path / "bin/gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
