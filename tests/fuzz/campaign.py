"""The campaign: `python -m tests.fuzz.campaign FOLDER FIRST COUNT` mutates, runs and judges; one line per failure."""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from random import Random

os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "2000"}  # before torch; a forked child starts its own threads
os.environ |= {"WANDB_MODE": "disabled", "MPLBACKEND": "agg"}

from tests.distributed.runs import equal
from tests.fuzz import child
from tests.fuzz.bombs import BOMBS, HARMLESS, MARK
from tests.fuzz.mutations import mutate
from tests.fuzz.recipes import BUILT, RECIPES, Recipe, agrees, made, plant

WRONG_WORDS = (
    *("-1", "0", "nan", "inf", "-inf", "1e999", "0.5", "", " ", "x", "null", "true", "[]", "{", "{}", "[-1]", "../..", "a\nb"),
    *("9223372036854775808", "-9223372036854775809", "!!python/object/apply:os.getcwd []", "&a [*a]", "é", "/dev/null"),
)  # fmt: skip


KEPT = ("--out", "--folder", "--trainer.logger")  # options that wrong words leave alone: another logger starts its own process


class Campaign:
    """A garden of undamaged artefacts, what every recipe makes of them, and the judge of what it makes of damaged ones.

    Args:
        place: folder to work in.
    """

    def __init__(self, place: Path):
        self.place, self.garden = place, place / "garden"
        self.garden.mkdir(parents=True)
        warm_up()
        plant(self.garden)
        self.wanted, self.usual = {}, {}
        for name, recipe in BUILT.items():
            self.learn(name, recipe, self.garden)
        for name in RECIPES.keys() - BUILT.keys():
            self.learn(name, RECIPES[name], self.copy(f"undamaged {name}", RECIPES[name]))
        shutil.copytree(self.place / "undamaged run" / "piped", self.garden / "piped")

    def learn(self, name: str, recipe: Recipe, folder: Path) -> None:
        """Run a recipe on undamaged files, and remember what it makes and does."""
        outcome = child.run(list(recipe.words), folder)
        assert outcome.code == 0, f"{name}, undamaged: {outcome}"
        self.usual[name], self.wanted[name] = set(outcome.did), made(folder, recipe)

    def copy(self, name: str, recipe: Recipe) -> Path:
        """Return a copy of the garden for one case."""
        folder = self.place / name
        shutil.copytree(self.garden, folder)
        for target in [path for pattern in recipe.absent for path in folder.glob(pattern)]:
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        return folder

    def case(self, seed: int) -> tuple[str, str | None]:
        """Return what a case did, and what went wrong or None."""
        draw = Random(seed)
        if draw.random() < 0.08:
            return self.wrong_words(seed, draw)
        name = draw.choice(sorted(RECIPES))
        recipe = RECIPES[name]
        folder = self.copy(f"case {seed}", recipe)
        patterns = [draw.choice(recipe.reads)] if draw.random() < 0.7 else recipe.reads
        paths = [p for pattern in (*patterns, *recipe.reads) for p in sorted(folder.glob(pattern)) if p.is_file()]
        path = draw.choice(paths[: max(1, sum(len(sorted(folder.glob(pattern))) for pattern in patterns))])
        done = mutate(path, draw)
        what, forged = f"{name}: {path.relative_to(folder)}: {done}", done.endswith("renewed")
        outcome = child.run(list(recipe.words), folder)
        problem = self.judge(name, recipe, folder, outcome, path, forged)
        shutil.rmtree(folder) if not problem else None
        return f"{what} -> {outcome.code} ({outcome.seconds:.1f} s)", problem

    def wrong_words(self, seed: int, draw: Random) -> tuple[str, str | None]:
        """Give one option of a command a hostile value."""
        name = draw.choice(sorted(name for name in BUILT if name not in ("report", "index")))
        folder, words = self.copy(f"case {seed}", RECIPES[name]), list(RECIPES[name].words)
        place = draw.choice([i for i, word in enumerate(words) if word.startswith("--") and word not in KEPT])
        words[place + 1] = value = draw.choice(WRONG_WORDS)
        outcome = child.run(words, folder)
        clues = [*words[place].lstrip("-").split("."), " ".join(value.split()) or "empty"]
        problem = self.manners(outcome, self.usual[name], clues)
        shutil.rmtree(folder) if not problem else None
        return f"{name}: {words[place]} {value!r} -> {outcome.code} ({outcome.seconds:.1f} s)", problem

    def judge(self, name: str, recipe: Recipe, folder: Path, outcome: child.Outcome, path: Path, forged: bool) -> str | None:
        """Return what is wrong with an outcome, or None. A forgery, whose checksums fit, may be believed but do no harm."""
        clues = [path.name, path.parent.name, path.name.partition(".")[0], f"{recipe.makes[0]}: "]
        if path.suffix == ".yaml":
            clues = ["fit: ", path.name, "stage "]  # a key of the configuration, or its file
        if problem := self.manners(outcome, self.usual[name], clues):
            return problem
        if outcome.code:
            return None
        if path.suffix == ".yaml":
            trained = recipe.words[0] != "fit" or list(folder.glob(f"{recipe.makes[0]}/checkpoints/step=000000002.ckpt"))
            return None if trained else "exit 0 without a checkpoint"
        if forged and not (recipe.free and recipe.absent):
            return None
        if recipe.free:
            return agrees(folder, recipe, path)
        if recipe.set:  # restarts skip whole shards by their size; what they skip, the reader looks at
            again = child.run(["read", "--folder", recipe.set], folder)
            if again.code == 2:
                return None
        found = made(folder, recipe, but=path)
        wanted = {key: value for key, value in self.wanted[name].items() if key != str(path.relative_to(folder))}
        if not equal(found, wanted):
            differing = [key for key in wanted.keys() | found.keys() if not equal(found.get(key), wanted.get(key))]
            return f"exit 0 with another result: {differing}"
        return None

    def manners(self, outcome: child.Outcome, usual: set[str], clues: list[str]) -> str | None:
        """Return what is wrong with how a command ended, whatever it made."""
        lines = [line for line in outcome.said.splitlines() if line.startswith("rectify: error: ")]
        if outcome.code is None:
            return "hangs"
        if outcome.code not in (0, 2, 3):
            return f"exit {outcome.code}: {outcome.said[-1500:]}"
        if extra := set(outcome.did) - usual:
            return f"did what an undamaged run does not: {sorted(extra)[:5]}"
        if outcome.code == 0:
            return f"exit 0 with an error: {lines}" if lines else None
        if len(lines) != 1 or "Traceback" in outcome.said or not outcome.said.rstrip().endswith(lines[0]):
            return f"not one line: {outcome.said[-1500:]}"
        if len(lines[0]) > 1200:
            return f"a line of {len(lines[0])} characters: {lines[0][:300]}"
        return None if any(clue in lines[0] for clue in clues) else f"names none of {clues}: {lines[0]}"

    def bomb(self, name: str) -> str | None:
        """Return what is wrong with how a planted bomb was met, or None."""
        lay, words = (BOMBS | HARMLESS)[name]
        begun = (recipe for recipe in RECIPES.values() if words[: len(recipe.words)] == recipe.words)
        recipe = max(begun, key=lambda recipe: len(recipe.words), default=RECIPES["sample"])
        folder = self.copy(f"bomb {name.replace('/', ' ')}", recipe)
        lay(folder)
        outcome = child.run(list(words), folder)
        usual = set().union(*self.usual.values())
        if escaped := [*folder.rglob(MARK), *self.place.rglob("*escaped*")]:
            for path in escaped:
                path.unlink()
            return f"{name}: it went off"
        if name in BOMBS and outcome.code != 2:
            return f"{name}: exit {outcome.code}: {outcome.said[-1500:]}"
        problem = self.manners(outcome, usual, [""])
        return f"{name}: {problem}" if problem else None


def warm_up() -> None:
    """Import all that the commands import, so that a fork is ready at once; compute nothing, which would start threads."""
    import importlib

    import torch

    from deploy.cli import VERBS
    from deploy.fit import import_components

    torch.set_num_threads(1)
    for module, _ in VERBS.values():
        importlib.import_module(module.partition(":")[0])
    import_components()
    for module in ("PIL.PngImagePlugin", "PIL.JpegImagePlugin", "diffusers.models.autoencoders.autoencoder_kl"):
        importlib.import_module(module)


def main(place: str, first: str, count: str) -> None:
    """Run cases and, from seed 0 on, all bombs; print each, and a JSON summary as the last line."""
    began = time.monotonic()
    campaign = Campaign(Path(place))
    print(f"the garden grew in {time.monotonic() - began:.1f} s", flush=True)
    failures = []
    for name in (BOMBS | HARMLESS) if first == "0" else ():
        problem = campaign.bomb(name)
        print(f"bomb: {name}: {'FAILED' if problem else 'met'}", flush=True)
        failures += [problem] if problem else []
    for seed in range(int(first), int(first) + int(count)):
        what, problem = campaign.case(seed)
        print(f"{seed}: {what}{': FAILED: ' + problem if problem else ''}", flush=True)
        failures += [f"seed {seed}: {what}: {problem}"] if problem else []
    print(json.dumps({"cases": int(count), "seconds": round(time.monotonic() - began, 1), "failures": failures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
