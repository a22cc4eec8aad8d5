"""Records of a pipeline's stages: what each was run with, and what it left.

    OUT/graph.json                 the stages as they were last run or launched
    OUT/stages/04-teacher.json     a finished stage: its inputs, seconds, and the files it wrote
    OUT/stages/teacher/begun.json  the inputs that its folder was begun with
    OUT/stages/teacher/            attempts, logs, heartbeat.json, intent.json (data/attempts.py)
    OUT/stages/teacher/earlier/1/  what it made from other inputs

A finished stage is checked by the size and time of its files; only those whose time differs are
read.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.attempts import read_attempts
from data.files import (
    errors_named,
    file_checksum,
    read_json,
    remove_leftovers,
    set_aside,
    write_json,
)
from data.schema import COUNT, XXH3, check_schema, find_difference, shorten
from deploy.pipeline import Pipeline, Stage

GRAPH = "graph.json"
STAGES = "stages"
LAUNCHED = "launched.json"  # in a stage's folder
BEGUN = "begun.json"
HASHED_BYTES = 2**26  # of a file whose checksum is kept; larger ones are known by size and time
REPORT_FILES = ("report.html", "summary.json")  # in the pipeline's folder
# What a command's folder has beside its results.
PROCESS_FILES = ("attempts", "logs", "heartbeat.json", "intent.json", "lease.json", "wandb")
RECORD_SCHEMA = {
    "fingerprint": str,
    "words": [str],
    "seconds": float,
    "inputs": dict,
    "files": {re.compile(".*", re.DOTALL): [(None, range(2**63), XXH3)]},
}
BEGUN_SCHEMA = {"fingerprint": str, "inputs": dict, "first_attempt": COUNT}
STAGE_SCHEMA = {
    "number": COUNT,
    "name": str,
    "words": [str],
    "needs": [str],
    "inputs": {"verb": str, "options": dict, "files": dict},
    "fingerprint": str,
    "resources": dict,
}
GRAPH_SCHEMA = {"stages": [STAGE_SCHEMA]}


def write_launched(out: Path, stage: Stage) -> None:
    """Write a stage as it is launched, which its job reads: the YAML may change meanwhile."""
    write_json(stage_folder(out, stage.name) / LAUNCHED, stage._asdict())


def read_launched(out: Path, name: str) -> Stage:
    """Return a stage as it was launched.

    Raises:
        FileNotFoundError: it was not.
        ValueError: the file is damaged.
    """
    path = stage_folder(out, name) / LAUNCHED
    if not path.exists():
        raise FileNotFoundError(f"{path}: stage {name} was not launched; run `rectify launch`")
    content = read_json(path)
    check_schema(content, STAGE_SCHEMA, str(path))
    with errors_named(path):
        return Stage(**content)


class FileChange(NamedTuple):
    """A file of a finished stage that is not as the stage left it."""

    file: str
    what: str
    is_damaged: bool = False  # of the same size, but another content

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


class OutputFile(NamedTuple):
    """A file that a stage wrote."""

    size: int
    modified: int  # nanoseconds since 1970
    xxh3: str | None  # None where it is not known


def stage_folder(out: Path, name: str) -> Path:
    """Return the folder of a stage's attempts."""
    return out / STAGES / name


def record_path(out: Path, stage: Stage, total: int) -> Path:
    """Return the record of a stage that is finished.

    Args:
        out: the pipeline's folder.
        stage: the stage.
        total: number of stages; the records' names sort in their order.
    """
    digits = max(2, len(str(total)))
    return out / STAGES / f"{stage.number:0{digits}d}-{stage.name}.json"


def find_records(out: Path) -> dict[str, Path]:
    """Return the records of finished stages by name; their numbers may have changed."""
    found = {}
    for path in sorted((out / STAGES).glob("[0-9]*-*.json")):
        found[path.stem.partition("-")[2]] = path
    return found


def remove_leftover_records(out: Path) -> None:
    """Remove what killed commands have left of records that they were writing."""
    stages = out / STAGES
    for folder in (out, stages, *stages.glob("*/"), *stages.glob("*/attempts")):
        remove_leftovers(folder)


def write_graph(out: Path, pipeline: Pipeline) -> None:
    """Write the stages of a pipeline, for those that read its folder without its YAML."""
    write_json(out / GRAPH, {"stages": [stage._asdict() for stage in pipeline.stages]})


def read_graph(out: Path) -> Pipeline:
    """Read the stages of the pipeline that was last run or launched in a folder.

    Raises:
        FileNotFoundError: there was none.
        ValueError: the file is damaged.
    """
    path = out / GRAPH
    if not path.exists():
        raise FileNotFoundError(f"{out}: no {GRAPH} in it, so this is no folder of a pipeline")
    content = read_json(path)
    check_schema(content, GRAPH_SCHEMA, str(path))
    stages = [Stage(**stage) for stage in content["stages"]]
    for stage in stages:
        if stage.out:  # as seen from this current folder, which may be another one
            written = stage.inputs["options"]["out"].replace("{out}", str(out))
            stage.words[stage.words.index("--out") + 1] = written
    return Pipeline(out, stages, {})


class StageStatus(NamedTuple):
    """Whether a stage is to be run."""

    stage: Stage
    finished: bool
    reason: str  # why it is not finished; "" if it has not begun
    difference: str  # of its inputs from those that its folder was begun with; "" if there is none
    seconds: float | None  # that it took the last time
    damaged: Sequence[Path] = ()  # files of the size that they had, with another content


def check_stage(pipeline: Pipeline, stage: Stage, records: dict[str, Path]) -> StageStatus:
    """Return whether a stage is finished, with the inputs that it has now.

    Args:
        pipeline: the pipeline.
        stage: the stage.
        records: of finished stages.

    Raises:
        ValueError: its record is damaged.
    """
    record: dict[str, Any] = {}
    if stage.name in records:
        record = read_json(records[stage.name])
        if "inputs" not in record:  # of a version that knew no graph: run its command again
            difference = describe_command(stage, record.get("words"))
            if difference:
                return StageStatus(stage, False, "it was finished", difference, None)
            record = {}
        else:
            check_schema(record, RECORD_SCHEMA, str(records[stage.name]))
    if not record:
        before = read_begun(pipeline.out, stage)
        binds = before and has_results(pipeline, stage)  # a refused command binds nothing
        difference = describe_difference(stage, before) if binds else ""
        return StageStatus(stage, False, difference and "it was begun", difference, None)
    seconds = float(record["seconds"])
    difference = describe_difference(stage, record)
    if difference:
        return StageStatus(stage, False, "it was finished", difference, seconds)
    changes = list(find_changes(pipeline.out, record, records[stage.name]))
    reason = str(changes[0]) if changes else ""
    damaged = [Path(change.file) for change in changes if change.is_damaged]
    return StageStatus(stage, not changes, reason, "", seconds, damaged)


def describe_difference(stage: Stage, before: dict[str, Any]) -> str:
    """Return how the inputs of a stage differ from those of a record; "" if they are the same."""
    if before["fingerprint"] == stage.fingerprint:
        return ""
    if before["inputs"] == stage.inputs:
        return "what it needs differs"
    found = find_difference("", before["inputs"], stage.inputs)
    key = re.sub(r"^\.(options|files)\.", "", found.key).lstrip(".")
    return f"{key} is {shorten(found.now)}, and was {shorten(found.before)}"


def describe_command(stage: Stage, before: Sequence[str] | None) -> str:
    """Return how the command of a stage differs from an earlier one; "" if it is the same."""
    words = list(before or stage.words)
    if words == stage.words:
        return ""
    found = find_difference("its command", words, stage.words)
    return f"{found.key} is {shorten(found.now)}, and was {shorten(found.before)}"


def list_files(out: Path, others: Collection[Path]) -> Iterator[Path]:
    """Yield the files that a stage's command has written: its results, not its logs.

    Args:
        out: the file or folder that it writes.
        others: what other stages write, perhaps inside `out`.
    """
    if out.is_file():
        yield out
        return
    folders = [out]
    while folders:
        folder = folders.pop()
        for entry in os.scandir(folder):
            path = folder / entry.name
            if entry.name.startswith(".") or (folder == out and entry.name in PROCESS_FILES):
                continue
            if not entry.is_dir():
                yield path
            elif path not in others:
                folders.append(path)


def record_files(pipeline: Pipeline, stage: Stage) -> dict[str, OutputFile]:
    """Return the files of a finished stage, by their path in the pipeline's folder."""
    others = {other.out for other in pipeline.stages if other.out and other.name != stage.name}
    paths: Sequence[Path] = []
    if stage.verb == "report":
        paths = [pipeline.out / name for name in REPORT_FILES]
    elif stage.out and stage.out.exists() and not stage.out.samefile(pipeline.out):
        paths = sorted(list_files(stage.out, others))
    known: dict[Path, str] = {}
    for folder in {path.parent for path in paths}:
        known |= read_shard_checksums(folder)
    files = {}
    for path in paths:
        stat = path.stat()
        xxh3 = known.get(path)
        if xxh3 is None and stat.st_size <= HASHED_BYTES:
            xxh3 = file_checksum(path)
        name = os.path.relpath(path, pipeline.out)
        files[name] = OutputFile(stat.st_size, stat.st_mtime_ns, xxh3)
    return files


def read_shard_checksums(folder: Path) -> dict[Path, str]:
    """Return the checksums of a set's tars, from its manifest; none of another folder."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    return {folder / shard["name"]: shard["xxh3"] for shard in read_json(path).get("shards", [])}


def write_record(pipeline: Pipeline, stage: Stage, seconds: float) -> None:
    """Record that a stage is finished.

    Args:
        pipeline: the pipeline.
        stage: the stage.
        seconds: that it took.
    """
    out = pipeline.out
    content = {
        "fingerprint": stage.fingerprint,
        "words": stage.words,
        "seconds": round(seconds, 1),
        "inputs": stage.inputs,
        "files": record_files(pipeline, stage),
    }
    path = record_path(out, stage, len(pipeline.stages))
    write_json(path, content)
    earlier = find_records(out).get(stage.name)
    if earlier and earlier != path:
        earlier.unlink()


def find_changes(out: Path, record: dict[str, Any], path: Path) -> Iterator[FileChange]:
    """Yield the files of a finished stage that are missing or changed.

    A file whose time alone has changed is read. If its checksum is the same, its time is recorded.

    Args:
        out: the pipeline's folder.
        record: of the stage.
        path: of the record.
    """
    files = record["files"]
    touched = False
    for name, entry in files.items():
        if len(entry) != len(OutputFile._fields):
            raise ValueError(f"{path}: files: {name}: {entry} is not size, time and checksum")
        size, modified, xxh3 = entry
        file = os.path.join(out, name)
        try:
            stat = os.stat(file)
        except (FileNotFoundError, NotADirectoryError):
            yield FileChange(file, "is missing")
            continue
        if stat.st_size != size:
            yield FileChange(file, f"has {stat.st_size} bytes, and had {size}")
        elif stat.st_mtime_ns == modified:
            continue
        elif xxh3 is None:
            yield FileChange(file, "was written since")
        elif file_checksum(Path(file)) != xxh3:
            yield FileChange(file, "is damaged", is_damaged=True)
        else:
            files[name] = OutputFile(size, stat.st_mtime_ns, xxh3)
            touched = True
    if touched:
        write_json(path, record)


def move_earlier(pipeline: Pipeline, stage: Stage) -> None:
    """Rename what a stage has made from other inputs to OUT/stages/NAME/earlier/N/...

    No report looks there for results. What is outside the pipeline's folder is renamed beside it.
    """
    assert stage.out
    if not stage.out.resolve().is_relative_to(pipeline.out.resolve()):
        set_aside(stage.out)
        return
    folder = stage_folder(pipeline.out, stage.name) / "earlier"
    # an empty one is of a killed command
    used = [int(path.parent.name) for path in folder.glob("[0-9]*/*")]
    number = 1 + max(used, default=0)
    (folder / str(number)).mkdir(parents=True, exist_ok=True)
    stage.out.rename(folder / str(number) / stage.out.name)


def begin_stage(pipeline: Pipeline, status: StageStatus) -> int:
    """Prepare the folder of a stage that is about to run, and return its first attempt's number.

    What the stage has made from other inputs is renamed, and so are damaged files, so that the
    stage's command makes them again.

    Args:
        pipeline: the pipeline.
        status: of the stage.
    """
    stage = status.stage
    folder = stage_folder(pipeline.out, stage.name)
    before = read_begun(pipeline.out, stage)
    if before.get("fingerprint") != stage.fingerprint:
        record = find_records(pipeline.out).get(stage.name)
        is_changed = bool(status.difference)
        if is_changed and stage.out and stage.out.exists() and is_separate(pipeline, stage):
            move_earlier(pipeline, stage)
        if record:
            record.unlink()
        attempts = read_attempts(folder)
        before = {
            "fingerprint": stage.fingerprint,
            "inputs": stage.inputs,
            "first_attempt": attempts[-1].number + 1 if attempts else 1,
        }
        write_json(folder / BEGUN, before)
    for file in status.damaged:
        set_aside(file)
    return int(before["first_attempt"])


def has_results(pipeline: Pipeline, stage: Stage) -> bool:
    """Whether a stage has left files: another one of its name would lose them."""
    others = {other.out for other in pipeline.stages if other.out and other.name != stage.name}
    return bool(stage.out and stage.out.exists() and any(list_files(stage.out, others)))


def first_attempt(out: Path, stage: Stage) -> int | None:
    """Return the number of a stage's first attempt with its inputs; None if there was none."""
    begun = read_begun(out, stage)
    is_same = begun.get("fingerprint") == stage.fingerprint
    return int(begun["first_attempt"]) if is_same else None


def read_begun(out: Path, stage: Stage) -> dict[str, Any]:
    """Return what a stage's folder was begun with; nothing if it was not begun.

    Raises:
        ValueError: the file is damaged.
    """
    path = stage_folder(out, stage.name) / BEGUN
    if not path.exists():
        return {}
    begun = read_json(path)
    check_schema(begun, BEGUN_SCHEMA, str(path))
    return begun


def is_separate(pipeline: Pipeline, stage: Stage) -> bool:
    """Whether what a stage writes is not around, or the same as, what another one writes."""
    assert stage.out
    for other in (pipeline.out, *(one.out for one in pipeline.stages if one.name != stage.name)):
        if other and other.resolve().is_relative_to(stage.out.resolve()):
            return False
    return True
