"""The project's words: identifiers are plain English, and a search finds each idea first."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import REPOSITORY

ROOMS = ("models", "data", "trainer", "deploy", "tests")
PRIVATE_WORDS = """
    told tell tells asked ask asks said say says seen heard hear hears lent lend lends rests
    agree agrees form forms place places law laws lane lanes walk walks walked walking own here
    there judged answers answering taught suffices looking eyes drawn whose
"""
# A word to search for, and the file in which `git grep` finds its definition first.
DEFINITIONS = {
    "checkpoint": "models/checkpoint.py",
    "DDIM": "models/sampler/ddim.py",
    "VPrediction": "models/prediction.py",
    "EDM": "models/interpolant.py",
    "DataModule": "data/datamodule.py",
    "(LPIPS|lpips)": "trainer/objectives/parts/lpips.py",
    "Pairs": "data/pairs.py",
    "pack": "data/pack.py",
    "encode": "models/codec.py",
    "collect": "trainer/jobs/collect.py",
    "evaluate": "trainer/jobs/evaluate.py",
    "export": "deploy/export.py",
    "EMA": "trainer/callbacks/ema.py",
    "posthoc": "trainer/posthoc_ema.py",
    "guidance": "data/noise.py",
    "LogitNormal": "trainer/objectives/parts/time_distributions.py",
    "MinSNR": "trainer/objectives/parts/weightings.py",
    "Huber": "trainer/objectives/parts/distances.py",
    "(consistency|Consistency)": "trainer/objectives/consistency.py",
    "MeanFlow": "trainer/objectives/meanflow.py",
    "Preemption": "trainer/callbacks/preemption.py",
    "frechet": "trainer/metrics/sample_distances.py",
    "(likelihood|log_prob)": "models/likelihood.py",
    "atomic": "data/files.py",
}


def python_files() -> list[Path]:
    """Return the project's Python files."""
    files = []
    for room in ROOMS:
        files += sorted((REPOSITORY / room).rglob("*.py"))
    return files


def bound_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that a file defines: modules' own, not those of libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def words(name: str) -> set[str]:
    """Return the snake_case and CamelCase parts of a name, in lower case."""
    return {part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def test_no_identifier_has_a_private_word():
    found = set()
    for path in python_files():
        for name in bound_names(ast.parse(path.read_text())):
            private = words(name) & set(PRIVATE_WORDS.split())
            if private:
                found.add(f"{path.relative_to(REPOSITORY)}: {name} ({', '.join(private)})")
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize("word", DEFINITIONS)
def test_a_definition_is_the_first_hit_of_a_search(word):
    pattern = rf"(class|def) \w*{word}"
    command = ["git", "grep", "--untracked", "-nE", pattern, "--", "*.py"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    first = done.stdout.splitlines()[0]
    assert first.partition(":")[0] == DEFINITIONS[word], first
