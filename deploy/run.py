"""`rectify run`: a pipeline is a list of `rectify` commands. Each is run once; a restart continues.

A stage has a `name`, one verb with its options, and optionally `smoke`, options that replace the
verb's under `--smoke`, and `for`, loops over values:

    name: fit-{model}-{seed}
    for: {seed: [0, 1, 2], model: {flow: {}, vp: {model.denoiser.interpolant: VariancePreserving}}}
    fit: {config: [base.yaml, more.yaml], out: "{out}/{model}/{seed}", seed_everything: "{seed}"}
    smoke: {trainer.max_steps: 4}

is six stages: fit-flow-0 first, then fit-vp-0. {seed} and {model} are replaced by the values, and
the values of a mapping add options. With `--smoke` every loop takes only its first value. The
stages of one loop must not depend on each other, because `--jobs 2` runs two of them at once.

`config` is a file or a list of files. They come first in the command, each with its `--config`, so
that the other options win over them. A list in any other option is one word.

A pipeline may have `targets`, which `rectify report` checks (deploy/targets.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

from filelock import AcquireReturnProxy, FileLock, Timeout

from data.files import atomic_file, canonical, digest, errors_named, read_json, write_json
from data.schema import COUNT, NAME, PATH, check_schema, shorten
from data.signals import (
    STOP_SIGNALS,
    STOPPED_EXIT_CODE,
    block_signals,
    end_with_parent,
    find_children,
    forward_signals,
    raise_if_stopped,
    send_signal,
    stop_requested,
)
from deploy.cli import VERBS
from deploy.targets import PIPELINE_RECORD, check_targets
from deploy.yaml_files import expand_home, read_yaml

NON_VERB_KEYS = ("name", "for", "smoke")  # keys of a stage beside its verb
LOOPS_SCHEMA = {NAME: ([(NAME, COUNT)], {NAME: (None, dict)})}
FAILED_LOG_LINES = 5  # of a failed stage's log that are printed


class Pipeline(NamedTuple):
    """A pipeline, as its YAML describes it."""

    out: Path  # folder of the results
    loops: list[list[dict[str, Any]]]  # the stages of each entry of the YAML, one without a loop
    targets: dict[str, Any]  # see deploy/targets.py

    @property
    def stages(self) -> list[dict[str, Any]]:
        """All stages in order."""
        return list(chain.from_iterable(self.loops))


class StageJob(NamedTuple):
    """A stage that is ready to run."""

    words: list[str]  # of its command
    fingerprint: str  # of its command and of everything before it
    record: Path  # JSON file that is written when it is finished
    title: str  # for messages, e.g. "[3/9] teacher"


def substitute(part: Any, values: dict[str, Any]) -> Any:
    """Return a part of a stage with every {name} in its texts replaced by the value."""
    if isinstance(part, dict):
        return {key: substitute(value, values) for key, value in part.items()}
    if isinstance(part, list):
        return [substitute(value, values) for value in part]
    if isinstance(part, str):
        for name, value in values.items():
            part = part.replace(f"{{{name}}}", to_word(value))
    return part


def to_word(value: Any) -> str:
    """Return a value of the YAML as a word of a command, which reads it as the same value."""
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def stage_verb(stage: dict[str, Any]) -> str:
    """Return a stage's verb."""
    return next(key for key in stage if key not in NON_VERB_KEYS)


def unroll(stage: dict[str, Any], smoke: bool = False) -> list[dict[str, Any]]:
    """Return a stage once for every combination of its loops' values; the last loop varies fastest.

    Args:
        stage: a stage of a pipeline.
        smoke: take only the first value of every loop.
    """
    loops = stage.get("for") or {}
    verb = stage_verb(stage)
    fixed = {**stage}
    fixed.pop("for", None)
    choices = []
    for values in loops.values():
        choices.append(list(values)[:1] if smoke else list(values))

    stages = []
    for combination in product(*choices):
        options = dict(stage[verb])
        for values, value in zip(loops.values(), combination):
            if isinstance(values, dict):
                options |= values[value] or {}
        names = dict(zip(loops, combination))
        stages.append(substitute({**fixed, verb: options}, names))
    return stages


def command(stage: dict[str, Any], out: Path, smoke: bool) -> list[str]:
    """Return the words of a stage's command: its verb and its options, with {out} replaced."""
    # the options
    verb = stage_verb(stage)
    options = dict(stage[verb])
    if smoke:
        options |= stage.get("smoke") or {}
    configs = options.pop("config", [])
    if not isinstance(configs, list):
        configs = [configs]

    # the words
    words = verb.split()
    for key, value in [("config", path) for path in configs] + list(options.items()):
        words += [f"--{key}", to_word(value).replace("{out}", str(out))]
    return words


def fingerprint(words: list[str], before: str) -> str:
    """Return a checksum of a command, of the YAML files that it reads, and of what came before."""
    files = []
    for word in words:
        path = Path(word)
        if word.endswith(".yaml") and path.is_file():
            with errors_named(path):
                files.append(json.loads(canonical(read_yaml(path))))
    return digest(canonical([words, files, before]))


def load(config: Path, smoke: bool = False) -> Pipeline:
    """Read and check a pipeline, and unroll its loops.

    Args:
        config: its YAML file.
        smoke: take only the first value of every loop.

    Raises:
        ValueError: a stage or a target is not as it must be.
    """
    content = expand_home(read_yaml(config))

    # check
    schema = {"out": PATH, "stages": [dict]}
    check_schema(content, schema, f"{config}: a pipeline needs `out` and `stages`")
    targets = content.get("targets", {})
    check_targets(targets, f"{config}: targets")
    for stage in content["stages"]:
        verbs = [key for key in stage if key not in NON_VERB_KEYS]
        if len(verbs) != 1 or verbs[0] not in VERBS or not isinstance(stage[verbs[0]], dict):
            raise ValueError(
                f"{config}: stage {shorten(stage)} needs a `name`, one verb with its options, and "
                f"perhaps `for` and `smoke`; the verbs are {', '.join(VERBS)}"
            )
        check_schema(stage, {"name": NAME}, f"{config}: stage {shorten(stage)}")
        where = f"{config}: stage {stage['name']}"
        check_schema(stage.get("smoke"), (None, dict), f"{where}: smoke")
        check_schema(stage.get("for") or {}, LOOPS_SCHEMA, f"{where}: for")

    # unroll
    loops = [unroll(stage, smoke) for stage in content["stages"]]
    pipeline = Pipeline(Path(content["out"]), loops, targets)
    names = [stage["name"] for stage in pipeline.stages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{config}: two stages have the name {name!r}; give each stage another `name`, "
                "with the {names} of its loops in it"
            )
    return pipeline


def run(config: Path, out: Path | None = None, smoke: bool = False, jobs: int = 1) -> None:
    """Run the stages of a pipeline one after another; skip those that are finished.

    If it is interrupted or killed, the same command continues where it stopped.

    Args:
        config: YAML file with `out`, the folder of the results, `stages`, each with a name and
            one verb with its options, and perhaps `targets`, which the summary must reach.
        out: folder of the results, instead of the YAML's.
        smoke: run every stage in little time, to test the pipeline: with its `smoke` options, and
            only the first value of every loop.
        jobs: how many stages of one loop run at once. They share the processor's cores, and each
            writes its output to OUT/stages/STAGE.log.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be at least 1")
    pipeline = load(config, smoke)
    source = config.read_bytes()
    out = out or pipeline.out
    with lock_folder(out):
        forward_signals()
        run_stages(pipeline.loops, out, smoke, jobs, source)
    from deploy.report.summary import format_summary  # imports lightning, which is slow

    if (out / "summary.json").exists():
        print(format_summary(read_json(out / "summary.json")))


def lock_folder(out: Path) -> AcquireReturnProxy:
    """Lock a folder; if another process runs a pipeline in it, wait until that process ends.

    Returns:
        a context manager that unlocks it. The system unlocks it, too, when this process is killed.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        message = f"rectify: waiting for another `rectify run` in {out} to end"
        print(message, file=sys.stderr, flush=True)
        return lock.acquire()


def run_stages(
    loops: list[list[dict[str, Any]]], out: Path, smoke: bool, jobs: int, source: bytes
) -> None:
    """Run the unfinished stages: loop after loop, up to `jobs` stages of one loop at once.

    A signal is forwarded to them; they save what they can and end, and no other stage begins.

    Args:
        loops: the stages of each loop.
        out: folder of the results.
        smoke: whether the stages run with their `smoke` options.
        jobs: how many stages of one loop run at once.
        source: content of the pipeline's file. It is written into the folder, where `rectify
            report` finds the targets.

    Raises:
        ValueError: a stage was finished with other settings.
        SystemExit: a stage failed; the exit code is the stage's.
        Stopped: a signal asked to stop.
    """
    total = sum(map(len, loops))
    digits = max(2, len(str(total)))  # so that the records' names sort in the order of the stages
    number = 0
    stamp = ""
    for loop in loops:
        # find the stages that are not finished
        unfinished = []
        for stage in loop:
            number += 1
            words = command(stage, out, smoke)
            stamp = fingerprint(words, stamp)
            record = out / "stages" / f"{number:0{digits}d}-{stage['name']}.json"
            title = f"[{number}/{total}] {stage['name']}"
            if not record.exists():
                unfinished.append(StageJob(words, stamp, record, title))
            elif read_json(record).get("fingerprint") == stamp:
                print(f"{title}: finished", file=sys.stderr, flush=True)
            else:
                raise ValueError(
                    f"{out}: stage {stage['name']} was finished with other settings; "
                    f"choose another --out, or delete {out}"
                )

        # record the pipeline, now that the finished stages have turned out to be its own
        if unfinished or loop is loops[-1]:
            with atomic_file(out / PIPELINE_RECORD) as file:
                file.write(source)

        # run them
        if jobs == 1 or len(unfinished) < 2:
            exit_on_failure(map(run_stage, unfinished))
            continue
        with ThreadPoolExecutor(jobs) as pool:
            try:
                exit_on_failure(pool.map(lambda job: run_stage(job, jobs), unfinished))
            except KeyboardInterrupt:
                send_signal(find_children(), signal.SIGTERM)
                raise
            finally:
                pool.shutdown(cancel_futures=True)


def exit_on_failure(codes: Iterable[int]) -> None:
    """Exit with the first exit code that is not 0; a stage killed by signal N counts as 128 + N."""
    for code in codes:
        if code == STOPPED_EXIT_CODE or -code in STOP_SIGNALS:
            raise_if_stopped()  # a stage that ended before it could handle the signal lost nothing
        if code:
            raise SystemExit(code if code > 0 else 128 - code)


def run_command(words: list[str], **options: Any) -> int:
    """Run a command, and return its exit code; it is killed when this process is.

    Args:
        words: the command.
        options: of `subprocess.Popen`.
    """
    with block_signals():  # until the command handles them
        process = subprocess.Popen(words, preexec_fn=end_with_parent, **options)
    if stop_requested():  # while it was being started: it was not yet among the children
        process.terminate()
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def run_stage(job: StageJob, jobs: int = 1) -> int:
    """Run a stage, write its record if it succeeds, and return its exit code.

    Args:
        job: the stage.
        jobs: how many stages run at once. With more than one, the stage writes to a log file and
            uses its share of the cores.
    """
    raise_if_stopped()
    print(f"{job.title}: rectify {' '.join(job.words)}", file=sys.stderr, flush=True)
    began = time.monotonic()
    words = [sys.executable, "-P", "-m", "deploy", *job.words]

    # run the command
    if jobs == 1:
        code = run_command(words)
    else:
        log_path = job.record.with_suffix(".log")
        log_path.parent.mkdir(exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // jobs)
        with log_path.open("w") as log:
            code = run_command(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
            )
        if code:
            lines = log_path.read_text(errors="replace").splitlines(True)
            end = "".join(lines[-FAILED_LOG_LINES:])
            print(f"{job.title}: failed; the end of {log_path}:\n{end}", end="", file=sys.stderr)

    # record it
    seconds = round(time.monotonic() - began, 1)
    if code == 0:
        record = {"fingerprint": job.fingerprint, "words": job.words, "seconds": seconds}
        write_json(job.record, record)
        print(f"{job.title}: done, {seconds:.0f} s", file=sys.stderr, flush=True)
    return code
