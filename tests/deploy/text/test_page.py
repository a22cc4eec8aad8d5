"""The commands of docs/teachers.md for text-to-image teachers, in a folder with a teacher."""

import shlex

import pytest

from tests.helpers.commands import REPOSITORY, succeed
from tests.helpers.documents import documented_commands

pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")

PAGE = REPOSITORY / "docs/teachers.md"
COMMANDS = [command for command in documented_commands(PAGE) if "text/" in command]
SHORT = {
    "collect": ["--pairs", "16", "--steps", "2"],
    "fit": ["--trainer.max_steps", "2", "--trainer.logger", "false", "--data.batch", "8"],
    "sample": ["--count", "10"],
}


@pytest.mark.parametrize("folder", ["sd"], indirect=True)
def test_every_command_runs_in_order(folder, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "runs/text").mkdir(parents=True)
    (tmp_path / "runs/text/teacher").symlink_to(folder)
    (tmp_path / "runs/text/prompts.txt").symlink_to(prompts)
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        _, verb, *words = shlex.split(command)
        if "adapted" in command:
            pytest.importorskip("peft", reason="needs peft: pip install 'rectify[lora]'")
        succeed(verb, *words, *SHORT.get(verb, []))
