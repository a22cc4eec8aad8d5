"""The fuzz campaign: mutate a file, run a command that reads it, check how the command ends.

    python -m tests.fuzz.campaign FOLDER FIRST COUNT

runs COUNT cases from seed FIRST on, and prints a line for each.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from random import Random

# before torch is imported; a forked child starts its threads itself
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["GOMP_SPINCOUNT"] = "2000"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "agg"

from tests.distributed.runs import equal
from tests.fuzz import child
from tests.fuzz.bombs import BOMBS, HARMLESS, MARK
from tests.fuzz.mutations import mutate
from tests.fuzz.recipes import (
    BUILT,
    RECIPES,
    Recipe,
    check_free_result,
    read_results,
    write_user_files,
)
from tests.helpers.refusals import PREFIX

WRONG_VALUES = (
    *("-1", "0", "nan", "inf", "-inf", "1e999", "0.5", "", " ", "x", "null", "true"),
    *("[]", "{", "{}", "[-1]", "../..", "a\nb"),
    *("9223372036854775808", "-9223372036854775809"),
    *("!!python/object/apply:os.getcwd []", "&a [*a]", "é", "/dev/null"),
)
# Options that keep their values: another logger would start a process.
KEPT_OPTIONS = ("--out", "--folder", "--trainer.logger")
WORDS_SHARE = 0.08  # share of the cases that change a command's words instead of a file
LAST_CHECKPOINT = "checkpoints/step=000000002.ckpt"


class Campaign:
    """Undamaged artefacts, what every recipe makes of them, and the cases.

    Args:
        folder: folder to work in.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.originals = folder / "originals"
        self.originals.mkdir(parents=True)
        self.expected: dict[str, dict] = {}
        self.usual_actions: dict[str, set[str]] = {}
        import_commands()

        # build the artefacts, then run the recipes that only read them
        write_user_files(self.originals)
        for name, recipe in BUILT.items():
            self.record_expected(name, recipe, self.originals)
        for name in RECIPES.keys() - BUILT.keys():
            copy = self.copy_originals(f"undamaged {name}", RECIPES[name])
            self.record_expected(name, RECIPES[name], copy)
        shutil.copytree(self.folder / "undamaged run" / "piped", self.originals / "piped")

    def record_expected(self, name: str, recipe: Recipe, folder: Path) -> None:
        """Run a recipe on undamaged files, and record its results and actions."""
        outcome = child.run(list(recipe.words), folder)
        assert outcome.code == 0, f"{name}, undamaged: {outcome}"
        self.usual_actions[name] = set(outcome.actions)
        self.expected[name] = read_results(folder, recipe)

    def copy_originals(self, name: str, recipe: Recipe) -> Path:
        """Return a copy of the undamaged artefacts for one case."""
        folder = self.folder / name
        shutil.copytree(self.originals, folder)
        for pattern in recipe.absent:
            for path in list(folder.glob(pattern)):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        return folder

    def run_case(self, seed: int) -> tuple[str, str | None]:
        """Run one case.

        Returns:
            a description of the case, and what went wrong or None.
        """
        rng = Random(seed)
        if rng.random() < WORDS_SHARE:
            return self.run_wrong_words(seed, rng)

        # damage a file
        name = rng.choice(sorted(RECIPES))
        recipe = RECIPES[name]
        folder = self.copy_originals(f"case {seed}", recipe)
        path = choose_file(folder, recipe, rng)
        change = mutate(path, rng)
        is_forged = change.endswith("renewed")

        # run the command
        outcome = child.run(list(recipe.words), folder)
        problem = self.check_outcome(name, folder, outcome, path, is_forged)
        if not problem:
            shutil.rmtree(folder)
        case = f"{name}: {path.relative_to(folder)}: {change}"
        return f"{case} -> {outcome.code} ({outcome.seconds:.1f} s)", problem

    def run_wrong_words(self, seed: int, rng: Random) -> tuple[str, str | None]:
        """Give one option of a command a hostile value; see `run_case`."""
        # change the words
        names = [name for name in BUILT if name not in ("report", "index")]
        name = rng.choice(sorted(names))
        folder = self.copy_originals(f"case {seed}", RECIPES[name])
        words = list(RECIPES[name].words)
        position = rng.choice(find_options(words))
        option = words[position]
        value = rng.choice(WRONG_VALUES)
        words[position + 1] = value

        # run the command
        outcome = child.run(words, folder)
        clues = [*option.lstrip("-").split("."), " ".join(value.split()) or "empty"]
        problem = check_ending(outcome, self.usual_actions[name], clues)
        if not problem:
            shutil.rmtree(folder)
        case = f"{name}: {option} {value!r}"
        return f"{case} -> {outcome.code} ({outcome.seconds:.1f} s)", problem

    def check_outcome(
        self, name: str, folder: Path, outcome: child.Outcome, path: Path, is_forged: bool
    ) -> str | None:
        """Return what is wrong with a command's outcome, or None.

        Args:
            name: the recipe's name.
            folder: where it ran.
            outcome: how it ended.
            path: the damaged file.
            is_forged: whether its checksums fit: a forgery may be accepted, but must do no harm.
        """
        # the way in which it ended
        recipe = RECIPES[name]
        clues = list_clues(recipe, path)
        problem = check_ending(outcome, self.usual_actions[name], clues)
        if problem:
            return problem
        if outcome.code != 0:
            return None

        # another configuration may have another result
        if path.suffix == ".yaml":
            is_fit = recipe.words[0] == "fit"
            checkpoints = list(folder.glob(f"{recipe.makes[0]}/{LAST_CHECKPOINT}"))
            return "exit 0 without a checkpoint" if is_fit and not checkpoints else None
        if is_forged and not (recipe.free_input and recipe.absent):
            return None
        if recipe.free_input:
            return check_free_result(folder, recipe, path)

        # a repeated command skips whole shards by their size; their reader checks the content
        if recipe.repaired_set:
            reading = child.run(["read", "--folder", recipe.repaired_set], folder)
            if reading.code == 2:
                return None
        return self.check_results(name, folder, path)

    def check_results(self, name: str, folder: Path, damaged: Path) -> str | None:
        """Return which results differ from those of undamaged files, or None."""
        results = read_results(folder, RECIPES[name], damaged)
        expected = dict(self.expected[name])
        expected.pop(str(damaged.relative_to(folder)), None)
        if equal(results, expected):
            return None
        keys = expected.keys() | results.keys()
        differing = [key for key in keys if not equal(results.get(key), expected.get(key))]
        return f"exit 0 with another result: {differing}"

    def run_bomb(self, name: str) -> str | None:
        """Plant a bomb and run its command; return what went wrong, or None."""
        case = (BOMBS | HARMLESS)[name]
        folder = self.copy_originals(f"bomb {name.replace('/', ' ')}", find_recipe(case.words))
        case.plant(folder)
        outcome = child.run(list(case.words), folder)

        # the planted code leaves a mark
        marks = [*folder.rglob(MARK), *self.folder.rglob("*escaped*")]
        if marks:
            for path in marks:
                path.unlink()
            return f"{name}: the planted code ran"

        # the command's ending
        if name in BOMBS and outcome.code != 2:
            return f"{name}: exit {outcome.code}: {outcome.output[-1500:]}"
        usual_actions = set().union(*self.usual_actions.values())
        problem = check_ending(outcome, usual_actions, clues=[""])
        return f"{name}: {problem}" if problem else None


def choose_file(folder: Path, recipe: Recipe, rng: Random) -> Path:
    """Choose a file that a recipe reads: mostly all its globs are equally likely.

    Otherwise all its files are equally likely.
    """
    patterns = recipe.reads
    if rng.random() < 0.7:
        patterns = (rng.choice(recipe.reads),)
    paths = []
    for pattern in (*patterns, *recipe.reads):
        paths += [path for path in sorted(folder.glob(pattern)) if path.is_file()]
    count = sum(len(list(folder.glob(pattern))) for pattern in patterns)
    return rng.choice(paths[: max(1, count)])


def find_options(words: list[str]) -> list[int]:
    """Return the positions of the options that may have a wrong value."""
    positions = []
    for position, word in enumerate(words):
        if word.startswith("--") and word not in KEPT_OPTIONS:
            positions.append(position)
    return positions


def find_recipe(words: tuple[str, ...]) -> Recipe:
    """Return the recipe with the longest command that `words` begin with; else "sample"."""
    matching = [recipe for recipe in RECIPES.values() if words[: len(recipe.words)] == recipe.words]
    return max(matching, key=lambda recipe: len(recipe.words), default=RECIPES["sample"])


def list_clues(recipe: Recipe, damaged: Path) -> list[str]:
    """Return texts of which an error line must contain one: the file, or what it belongs to."""
    if damaged.suffix == ".yaml":
        return ["fit: ", damaged.name, "stage "]  # a key of the configuration, or its file
    stem = damaged.name.partition(".")[0]
    return [damaged.name, damaged.parent.name, stem, f"{recipe.makes[0]}: "]


def check_ending(outcome: child.Outcome, usual_actions: set[str], clues: list[str]) -> str | None:
    """Return what is wrong with how a command ended, or None; its results do not matter.

    It must not hang, crash or do what an undamaged run does not, and it must fail with one error
    line that contains one of `clues`.
    """
    # exit code and actions
    output = outcome.output
    lines = [line for line in output.splitlines() if line.startswith(PREFIX)]
    if outcome.code is None:
        return "hangs"
    if outcome.code not in (0, 2, 3):
        return f"exit {outcome.code}: {output[-1500:]}"
    extra = set(outcome.actions) - usual_actions
    if extra:
        return f"did what an undamaged run does not: {sorted(extra)[:5]}"
    if outcome.code == 0:
        return f"exit 0 with an error: {lines}" if lines else None

    # the error line
    if len(lines) != 1 or "Traceback" in output or not output.rstrip().endswith(lines[0]):
        return f"not one line: {output[-1500:]}"
    line = lines[0]
    if len(line) > 1200:
        return f"a line of {len(line)} characters: {line[:300]}"
    if not any(clue in line for clue in clues):
        return f"names none of {clues}: {line}"
    return None


def import_commands() -> None:
    """Import everything that the commands import, so that a forked child starts at once.

    Nothing is computed, because that would start threads.
    """
    import importlib

    import torch

    from deploy.cli import VERBS
    from deploy.fit import import_components

    torch.set_num_threads(1)
    for module, _ in VERBS.values():
        importlib.import_module(module.partition(":")[0])
    import_components()
    importlib.import_module("PIL.PngImagePlugin")
    importlib.import_module("PIL.JpegImagePlugin")
    importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")


def main(folder: str, first: str, count: str) -> None:
    """Run cases, and from seed 0 on all bombs; print each, and a JSON summary as the last line."""
    began = time.monotonic()
    campaign = Campaign(Path(folder))
    print(f"the artefacts were built in {time.monotonic() - began:.1f} s", flush=True)
    failures = []

    # bombs
    bombs = BOMBS | HARMLESS if first == "0" else {}
    for name in bombs:
        problem = campaign.run_bomb(name)
        print(f"bomb: {name}: {'FAILED' if problem else 'met'}", flush=True)
        if problem:
            failures.append(problem)

    # cases
    for seed in range(int(first), int(first) + int(count)):
        case, problem = campaign.run_case(seed)
        verdict = f": FAILED: {problem}" if problem else ""
        print(f"{seed}: {case}{verdict}", flush=True)
        if problem:
            failures.append(f"seed {seed}: {case}: {problem}")

    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"cases": int(count), "seconds": seconds, "failures": failures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
