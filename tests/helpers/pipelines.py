"""Pipelines: their files, as tests write and read them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import deploy.run
from deploy.pipeline import unroll
from deploy.yaml_files import read_yaml


def write_pipeline(path: Path, stages: list[dict[str, Any]], **more: Any) -> Path:
    """Write a pipeline with these stages, whose results go to `out` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"out": str(path.parent / "out"), "stages": stages, **more}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def read_stages(config: Path) -> list[dict[str, Any]]:
    """Return the stages of a pipeline's file as it has them, with all values of their loops."""
    return [stage for entry in read_yaml(config)["stages"] for stage in unroll(entry)]


class FakeCommands:
    """Replaces the commands of `rectify run`: each writes its options into its folder.

    Args:
        monkeypatch: of the test.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun: list[str] = []  # names of the stages' folders, in the order of their begin
        self.codes: dict[str, int] = {}  # exit codes; 0 if there is none
        self.act: dict[str, Callable[[], Any]] = {}  # what a command does
        monkeypatch.setattr(deploy.run, "run_command", self.run)

    def run(self, words: Sequence[str], *_: object, **__: object) -> int:
        """Run a stage's command, and return its exit code."""
        out = Path(words[words.index("--out") + 1])
        self.begun.append(out.name)
        self.act.get(out.name, lambda: None)()
        code = self.codes.get(out.name, 0)
        if code == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "result.txt").write_text(" ".join(words[5:]))
        return code
