"""Real commands in real processes, in a folder of their own."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import pytest
import torch

REPOSITORY = Path(__file__).parent.parent


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would what tests start


def pytest_addoption(parser):
    """Add --long: every seed of the campaigns (kills, fuzz), not only the few that CI runs."""
    parser.addoption("--long", action="store_true", help="run all seeds of the campaigns; `make test-long` keeps their log")


@pytest.fixture(scope="session")
def chronicle(request):
    """Return a function that adds a line to the log of campaigns; docs/test-long.log keeps those of a --long run."""
    lines: list[str] = []
    yield lines.append
    if request.config.getoption("--long"):
        with (REPOSITORY / "docs" / "test-long.log").open("a") as log:
            log.writelines(f"{line}\n" for line in (f"pytest {' '.join(request.config.invocation_params.args)}", *lines))


def pytest_collection_modifyitems(items):
    """Put first what runs for long, so that no worker ends alone with it; skip GPU tests, saying why, where there is none."""
    items.sort(key=lambda item: item.path.parent.name not in ("distributed", "deploy", "fuzz"))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


class Workspace:
    """A folder with the repository's configs in it, in which commands run as a user would run them."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / "configs").exists():
            with suppress(FileExistsError):  # another process's
                (path / "configs").symlink_to(REPOSITORY / "configs")

    def environment(self) -> dict[str, str]:
        return {**os.environ, "WANDB_MODE": "offline", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def start(
        self,
        *words: str,
        processes: int = 1,
        torchrun: Sequence[str] = (),
        before: Sequence[str] = (),
        preexec: Callable[[], None] | None = None,
    ) -> subprocess.Popen:
        """Start `rectify WORDS`, under torchrun if need be, behind another command's words (`before`)."""
        if processes > 1:
            torchrun = ("--standalone", f"--nproc-per-node={processes}")
        launcher = ("torch.distributed.run", *torchrun, "-m") if torchrun else ()
        command = [*before, sys.executable, "-m", *launcher, "deploy", *(str(word) for word in words)]
        where = {"cwd": self.path, "env": self.environment(), "preexec_fn": preexec}
        return subprocess.Popen(command, **where, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True)

    def rectify(self, *words: str, processes: int = 1, code: int = 0) -> subprocess.CompletedProcess:
        process = self.start(*words, processes=processes)
        out, err = process.communicate(timeout=500)
        assert process.returncode == code, f"rectify {' '.join(map(str, words))}: exit {process.returncode}\n{out}\n{err}"
        return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    """A workspace in which the quick pipeline has run: runs/demo holds every artefact, barely trained; all of pytest shares it.

    RECTIFY_WORKSPACE names a folder in which it has run before, to spare the minute when writing tests.
    """
    if ready := os.environ.get("RECTIFY_WORKSPACE"):
        return Workspace(Path(ready))
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workspace"
    path.mkdir(exist_ok=True)
    place = Workspace(path)
    place.rectify("run", "configs/digits/pipeline.yaml", "--quick", "true")  # the second process waits, and finds all finished
    return place


@pytest.fixture
def inside(monkeypatch):
    """A pipeline's stages run in this process: what they import they need not import again for every stage."""
    import deploy.run
    from deploy.cli import main

    monkeypatch.setenv("WANDB_MODE", "offline")
    in_process = SimpleNamespace(run=lambda words, **_: SimpleNamespace(returncode=main(words[4:])))
    monkeypatch.setattr(deploy.run, "subprocess", in_process)
