"""README and docs: every command and program runs, and everything that they name exists."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from data.plane import two_moons
from deploy.cli import VERBS, split_verb
from tests.helpers.commands import REPOSITORY, Workspace, run_command
from tests.helpers.documents import (
    PAGES,
    code_blocks,
    documented_commands,
    heading_anchors,
    inline_code,
    programs,
    write_captioned,
)
from trainer.metrics import classifier
from trainer.metrics.sample_distances import energy_distance
from trainer.toy import plane, train

README = REPOSITORY / "README.md"
CONTRIBUTING = REPOSITORY / "CONTRIBUTING.md"
ROOMS = ("models", "data", "trainer", "deploy")
WITH_COMMANDS = [page for page in PAGES if page.name != "pictures.md" and documented_commands(page)]

# Options that cut a documented command short.
SHORT = {
    "run": ["--smoke"],
    "launch": ["--smoke"],
    "fit": ["--trainer.max_steps", "2", "--trainer.logger", "false"],
    "collect": ["--pairs", "300", "--steps", "2"],
    "invert": ["--steps", "2"],
    "evaluate": ["--samples", "100", "--steps", "[1,2]"],
    "likelihood": ["--samples", "4", "--tolerance", "0.01", "--bound", "1"],
    "toy picture": ["--updates", "2"],
}

# Commands that take minutes even in short, and those that need other packages: where they run.
RUN_ELSEWHERE = {
    "rectify run configs/claims/pipeline.yaml --jobs 2": "tests/deploy/test_claims.py",
    "rectify run configs/interpolants/pipeline.yaml --jobs 2": "tests/deploy/test_interpolants.py",
    "rectify report seeds --runs runs/interpolants/evaluation --out docs/interpolants.md": (
        "tests/deploy/test_interpolants.py"
    ),
    "rectify run configs/flows/pipeline.yaml": "tests/deploy/test_likelihood.py",
}
NEEDS_TRANSFORMERS = (
    "runs/text/",
    "configs/text/",
    "runs/words/text",
)  # run by tests/deploy/text/test_page.py


def is_run_by_this_module(command: str) -> bool:
    """Return whether this module runs a documented command."""
    return command not in RUN_ELSEWHERE and not any(name in command for name in NEEDS_TRANSFORMERS)


class FeatureMeans(nn.Module):
    """Features: the means of the blocks of an image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def write_user_files(folder: Path) -> None:
    """Write what the pages assume that a user has: photos, an extractor, tars."""
    for name in ("photos/cat", "photos/dog", "unlabelled"):
        (folder / name).mkdir(parents=True)
        for i in range(60):
            image = Image.effect_noise((80, 70), 40 + i).convert("RGB")
            image.save(folder / name / f"{i}.png")
    write_captioned(folder)
    torch.jit.script(FeatureMeans()).save(folder / "extractor.pt")
    (folder / "tars").mkdir()
    for tar in (folder / "runs/demo/latents").glob("*.tar"):
        (folder / "tars" / tar.name).write_bytes(tar.read_bytes())


@pytest.fixture(scope="module")
def user_folder(workspace, tmp_path_factory):
    """Return a user's folder: it has the results of the demo, and what the pages assume."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    (folder / "data").mkdir()
    (folder / "data/emoji").symlink_to(REPOSITORY / "data/emoji")
    (folder / "runs/demo").mkdir(parents=True)
    for result in (workspace.path / "runs/demo").glob("[!.]*"):  # without locks
        (folder / "runs/demo" / result.name).symlink_to(result)
    write_user_files(folder)
    return folder


@pytest.fixture(scope="module")
def finished() -> set[str]:
    """Return the commands that have run, since pages share some; a test adds to it."""
    return set()


def run_documented(command: str, folder: Path) -> None:
    """Run a documented command in short; it must succeed.

    Commands of several processes are real processes, others run in this one: imports are done.
    """
    _, *words = shlex.split(command)
    is_spread = words[0] == "spread" and "--" in words
    verb, _ = split_verb(words[words.index("--") + 1 :] if is_spread else words)
    if "--help" not in words:
        words += SHORT.get(verb, [])
    if is_spread or "--trainer.devices" in words:
        environment = Workspace(folder).environment()
        process = [sys.executable, "-m", "deploy", *words]
        done = subprocess.run(process, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return
    try:
        assert run_command(*words) == 0, command
    except SystemExit as ended:  # help was printed, or the run is finished
        assert not ended.code, command


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_every_command_runs_in_order(page, user_folder, finished, monkeypatch):
    """A page continues README. Its programs read what its commands have written, and run last."""
    monkeypatch.chdir(user_folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(classifier, "TRAINING_STEPS", 2)
    monkeypatch.setattr(train, "PAIRS", 64)  # of a picture
    monkeypatch.setattr(plane, "SAMPLES", 64)
    commands = [*documented_commands(README), *documented_commands(page)]
    for command in filter(is_run_by_this_module, commands):
        if command not in finished:
            run_documented(command, user_folder)
            finished.add(command)
    if page != README:  # its program has a test of its own
        for program in programs(page):
            exec(program, {})


def test_commands_that_run_elsewhere_are_documented():
    documented = {command for page in PAGES for command in documented_commands(page)}
    assert RUN_ELSEWHERE.keys() <= documented
    assert all((REPOSITORY / test).is_file() for test in RUN_ELSEWHERE.values())


def test_the_program_on_the_first_screen_samples_two_moons_in_one_step():
    (program,) = programs(README)
    names: dict[str, torch.Tensor] = {}
    with torch.random.fork_rng():
        exec(program, names)
    data = two_moons(2000, torch.Generator().manual_seed(1))
    assert energy_distance(names["samples"].flatten(1), data) < 0.02


def option_names(verb: str) -> set[str]:
    """Return the names of a verb's options; a dataclass among them is a group of options."""
    module, _, name = VERBS[verb][0].partition(":")
    signature = inspect.signature(getattr(import_module(module), name), eval_str=True)
    names = set()
    for parameter in signature.parameters.values():
        if is_dataclass(parameter.annotation):
            names |= {field.name for field in fields(parameter.annotation)}
        else:
            names.add(parameter.name)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_within_the_text_have_verbs_and_options_that_exist(page):
    for span in inline_code(page):
        words = span.split()
        if words[:1] == ["rectify"] and len(words) > 1 and words[1] != "VERB":
            verb, rest = split_verb(words[1:])
            options = [word.removeprefix("--") for word in rest if word.startswith("--")]
            if verb != "fit":
                assert set(options) <= option_names(verb) | {"help"}, span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            assert anchor in heading_anchors(linked), target


def named_paths(page: Path) -> set[str]:
    """Return the paths of the repository's files and folders that a page's text names."""
    found = set()
    folders = "|".join((*ROOMS, "configs", "tests", "docs"))
    for name in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./{{}},<>-]*", page.read_text()):
        found.add(name.rstrip(".,"))
    return found


def expand_braces(name: str) -> list[str]:
    """Return the names that a/{b,c}.py stands for."""
    before, brace, remainder = name.partition("{")
    if not brace:
        return [name]
    choices, _, after = remainder.partition("}")
    return [f"{before}{choice}{after}" for choice in choices.split(",")]


# The log has the paths of its time.
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.stem
)
def test_every_path_exists(page):
    for name in named_paths(page):
        if "<" not in name:
            assert all((REPOSITORY / path).exists() for path in expand_braces(name)), name


def tree_paths() -> list[str]:
    """Return the paths of the file tree in CONTRIBUTING."""
    tree = next(block.text for block in code_blocks(CONTRIBUTING) if "models/  " in block.text)
    paths = []
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip()) - 4) // 2
        names = re.split(r"  +", line.strip())[0].split(", ")
        folders = folders[:depth]
        paths += ["".join([*folders, name]) for name in names]
        if names[0].endswith("/"):
            folders.append(names[0])
    return paths


def test_the_file_tree_is_that_of_the_repository():
    paths = tree_paths()
    assert len(paths) == len(set(paths))
    for path in paths:
        assert (REPOSITORY / path).exists(), path
    modules = {
        str(module.relative_to(REPOSITORY))
        for room in ROOMS
        for module in (REPOSITORY / room).rglob("*.py")
        if module.name not in ("__init__.py", "__main__.py")
    }
    missing = sorted(modules - set(paths))
    assert not missing, missing


def defined_names(path: Path) -> set[str]:
    """Return the functions, classes and methods of a file: `run`, `Sampler`, `Sampler.step`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def test_every_hop_is_a_function_that_exists():
    hops = re.findall(r"`([\w/]+\.py)`:`([\w.]+)`", CONTRIBUTING.read_text())
    assert len(hops) >= 20
    for path, name in hops:
        assert name in defined_names(REPOSITORY / path), f"{path}:{name}"


def test_the_first_page_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 140
