"""Options and fixtures of all tests: the log of campaigns, a workspace with a finished pipeline."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.commands import REPOSITORY, Workspace, run_command

SLOW_FOLDERS = ("distributed", "deploy", "fuzz")

# A shell that starts pytest in the background has it ignore SIGINT, which the commands that tests
# start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --long: run every seed of the campaigns (kills, fuzz), not only the few that CI runs."""
    parser.addoption(
        "--long",
        action="store_true",
        help="run all seeds of the campaigns; `make test-long` keeps their log",
    )


@pytest.fixture(scope="session")
def chronicle(request: pytest.FixtureRequest) -> Iterator[Callable[[str], None]]:
    """Return a function that adds a line to the campaigns' log.

    A --long run appends its log to docs/test-long.log.
    """
    lines = [f"pytest {' '.join(request.config.invocation_params.args)}"]
    yield lines.append
    if request.config.getoption("--long"):
        with (REPOSITORY / "docs" / "test-long.log").open("a") as log:
            log.writelines(f"{line}\n" for line in lines)


def turn(item: pytest.Item) -> int:
    """Return when a test runs: folders of real processes early, so that workers end together.

    The first module makes the workspace; meanwhile the other workers test models, which need none.
    """
    if item.path.name == "test_cli.py":
        return 0
    if item.path.parent.name == "models":
        return 1
    return 2 if item.path.parent.name in SLOW_FOLDERS else 3


def order_and_skip(items: list[pytest.Item]) -> None:
    """Order the tests; skip GPU tests without a GPU."""
    items.sort(key=turn)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


pytest_collection_modifyitems = order_and_skip  # pytest's name for this hook


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Return a workspace with the demo: runs/demo holds every artefact of a smoke run.

    Its models are barely trained, and all workers of pytest share it. RECTIFY_WORKSPACE names a
    folder in which the pipeline has run before, which saves a minute when writing tests.
    """
    ready = os.environ.get("RECTIFY_WORKSPACE")
    if ready:
        return Workspace(Path(ready))
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "workspace").mkdir(exist_ok=True)
    shared = Workspace(folder / "workspace")
    # A second worker waits for the first, then finds every stage finished.
    shared.rectify("run", "configs/digits/pipeline.yaml", "--smoke")
    return shared


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a pipeline's stages in this process, which saves their imports."""
    import deploy.run

    def run_in_process(words: list[str], *_: object, **__: object) -> int:
        return run_command(*words[4:])

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(deploy.run, "run_command", run_in_process)
