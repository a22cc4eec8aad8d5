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

from data.shards import encode_array


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, counts, and fails on demand."""

    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
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
    """Serve a folder on a port of this machine; yields the server, its `url`, and what was `asked` of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    server.asked, server.failures, server.gate = [], 0, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def latent(number, i):
    """Return a latent that says whose it is."""
    return np.full((1, 2, 2), number * 100 + i, np.float32)


def tars(folder, counts, extra=None):
    """Write tars of latents, shard-000.tar and so on; `extra` are members added to each sample."""
    folder.mkdir(exist_ok=True)
    for number, count in enumerate(counts):
        with TarWriter(str(folder / f"shard-{number:03d}.tar"), encoder=False) as writer:
            for i in range(count):
                sample = {"__key__": f"{number}_{i:03d}", "cls": str(i % 3).encode(), "npy": encode_array(latent(number, i))}
                writer.write({**sample, **(extra or {})})
    return [str(folder / f"shard-{number:03d}.tar") for number in range(len(counts))]


def png(value, size=8, kind="PNG"):
    """Return an image file of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def spied(tmp_path, monkeypatch):
    """Put a Ghostscript into the path that leaves TMP_PATH/ran behind where it is run."""
    spy = tmp_path / "bin/gs"
    spy.parent.mkdir()
    spy.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{spy.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
