"""`rectify run`: a pipeline is a list of `rectify` commands; each is run once, and the same command resumes.

A stage is a `name`, one verb with its options, and, if need be, `quick` options of `--quick true` and `for`, loops over values:

    name: fit-{form}-{seed}
    for: {seed: [0, 1, 2], form: {flow: {}, vp: {model.denoiser.interpolant: VariancePreserving}}}
    fit: {config: model.yaml, out: "{out}/{form}/{seed}", seed_everything: "{seed}"}

is six stages, fit-flow-0 first, fit-vp-0 next: {seed} and {form} stand for the values, and a mapping's values bring options of
their own. With `--quick true` every loop takes its first value alone. A loop's stages must not need each other: with `--jobs 2`
two of them run at once.
"""

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from data.files import canonical, digest, naming, read_json, write_json
from data.form import COUNT, NAME, PATH, conform, shown
from deploy.cli import VERBS

APART = ("name", "for", "quick")  # entries of a stage that are not its verb
LOOPS = {NAME: ([(NAME, COUNT)], {NAME: (None, dict)})}


def filled(part: Any, values: dict[str, Any]) -> Any:
    """Return a part of a stage with every {name} in its text replaced by the value."""
    if isinstance(part, dict):
        return {key: filled(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [filled(value, values) for value in part]
    for name, value in values.items() if isinstance(part, str) else ():
        part = part.replace(f"{{{name}}}", str(value))
    return part


def unrolled(stage: dict[str, Any], quick: bool = False) -> list[dict[str, Any]]:
    """Return a stage once for every combination of its loops' values, of the first ones if quick; the last loop turns fastest."""
    loops, stages = stage.get("for") or {}, []
    verb = next(key for key in stage if key not in APART)
    for values in product(*(list(of)[: 1 if quick else None] for of in loops.values())):
        options = dict(stage[verb])
        for of, value in zip(loops.values(), values):
            options |= (of[value] or {}) if isinstance(of, dict) else {}
        own = {**{key: part for key, part in stage.items() if key != "for"}, verb: options}
        stages.append(filled(own, dict(zip(loops, values))))
    return stages


def command(stage: dict[str, Any], out: Path, quick: bool) -> list[str]:
    """Return a stage's words: its verb, and an option for every entry, with {out} filled in."""
    verb, options = next(item for item in stage.items() if item[0] not in APART)
    words = [verb]
    for key, value in {**options, **(stage.get("quick") or {} if quick else {})}.items():
        words += [f"--{key}", str(value).replace("{out}", str(out))]
    return words


def fingerprint(words: list[str], before: str) -> str:
    """Return a checksum of a command, of the YAML that it reads, and of everything before it."""
    files = []
    for path in (Path(word) for word in words if word.endswith(".yaml") and Path(word).is_file()):
        with naming(path):
            files.append(json.loads(canonical(yaml.safe_load(path.read_text()))))
    return digest(canonical([words, files, before]))


def load(config: Path, quick: bool = False) -> dict[str, Any]:
    """Read and check a pipeline; its `loops` are the stages of each loop, its `stages` all of them."""
    with naming(config):
        pipeline = yaml.safe_load(config.read_text())
    conform(pipeline, {"out": PATH, "stages": [dict]}, f"{config}: a pipeline needs `out` and `stages`")
    for stage in pipeline["stages"]:
        verbs = [key for key in stage if key not in APART]
        if len(verbs) != 1 or verbs[0] not in VERBS or not isinstance(stage[verbs[0]], dict):
            raise ValueError(f"{config}: stage {shown(stage)} needs a `name` and one verb of {', '.join(VERBS)} with its options")
        conform(stage, {"name": NAME}, f"{config}: stage {shown(stage)}")
        conform(stage.get("quick"), (None, dict), f"{config}: stage {stage['name']}: quick")
        conform(stage.get("for") or {}, LOOPS, f"{config}: stage {stage['name']}: for")
    pipeline["loops"] = [unrolled(stage, quick) for stage in pipeline["stages"]]
    pipeline["stages"] = [stage for loop in pipeline["loops"] for stage in loop]
    names = [stage["name"] for stage in pipeline["stages"]]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{config}: every stage needs a `name` of its own (with its loops' {{names}}), {twice!r} is there twice")
    return pipeline


def run(config: Path, out: Path | None = None, quick: bool = False, jobs: int = 1) -> None:
    """Run a pipeline's stages one after another, skipping the finished ones; killed, the same command goes on.

    Args:
        config: the pipeline's YAML: `out`, and `stages`, each a name and one verb with its options.
        out: folder to use instead of the YAML's.
        quick: use each stage's `quick` options and each loop's first value: every stage, in little time, for a test.
        jobs: stages of one loop that run at once, sharing the processor's cores; each then writes to OUT/stages/STAGE.log.
    """
    if jobs < 1:
        raise ValueError(f"jobs: {jobs}, it must be at least 1")
    pipeline = load(config, quick)
    out = out or Path(pipeline["out"])
    with alone(out):
        walk(pipeline["loops"], out, quick, jobs)
    from trainer.report.summary import table

    if (out / "summary.json").exists():
        print(table(read_json(out / "summary.json")))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Wait until no other process runs a pipeline in this folder (one whose parent was killed, say)."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"rectify: another run is at work in {out}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that a killed pipeline leaves no stage at work."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def walk(loops: list[list[dict[str, Any]]], out: Path, quick: bool, jobs: int) -> None:
    """Run the stages that are not finished: loops in order, the stages of one up to `jobs` at once."""
    stamp, place, total = "", 0, sum(map(len, loops))
    width = max(2, len(str(total)))  # so that names sort as the stages do
    for loop in loops:
        due = []
        for stage in loop:
            place += 1
            words = command(stage, out, quick)
            stamp = fingerprint(words, stamp)
            record, title = out / "stages" / f"{place:0{width}d}-{stage['name']}.json", f"[{place}/{total}] {stage['name']}"
            if not record.exists():
                due.append((words, stamp, record, title, jobs))
                continue
            if read_json(record).get("fingerprint") != stamp:
                raise ValueError(
                    f"{out}: stage {stage['name']} was finished with other settings; choose another --out or delete {out}"
                )
            print(f"{title}: finished", file=sys.stderr, flush=True)
        if jobs == 1 or len(due) < 2:
            ended(perform(*one[:-1], jobs=1) for one in due)
            continue
        with ThreadPoolExecutor(jobs) as pool:
            try:
                ended(pool.map(lambda one: perform(*one), due))
            finally:
                pool.shutdown(cancel_futures=True)


def ended(codes: Iterator[int]) -> None:
    """Leave with the first stage that failed."""
    for code in codes:
        if code:
            raise SystemExit(code if code > 0 else 128 - code)


def perform(words: list[str], stamp: str, record: Path, title: str, jobs: int) -> int:
    """Run a stage and record it; return its exit code. One of several at once writes to a file, on its share of the cores."""
    print(f"{title}: rectify {' '.join(words)}", file=sys.stderr, flush=True)
    began, command = time.monotonic(), [sys.executable, "-P", "-m", "deploy", *words]
    if jobs == 1:
        code = subprocess.run(command, preexec_fn=die_with_parent).returncode
    else:
        told, threads = record.with_suffix(".log"), str(max(1, (os.cpu_count() or 1) // jobs))
        told.parent.mkdir(exist_ok=True)
        with told.open("w") as log:
            environment = {"OMP_NUM_THREADS": threads, **os.environ}
            code = subprocess.run(
                command, preexec_fn=die_with_parent, stdout=log, stderr=subprocess.STDOUT, env=environment
            ).returncode
        if code:
            last = "".join(told.read_text(errors="replace").splitlines(True)[-5:])
            print(f"{title}: failed, the end of {told}:\n{last}", end="", file=sys.stderr)
    seconds = round(time.monotonic() - began, 1)
    if code == 0:
        write_json(record, {"fingerprint": stamp, "words": words, "seconds": seconds})
        print(f"{title}: done, {seconds:.0f} s", file=sys.stderr, flush=True)
    return code
