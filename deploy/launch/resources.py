"""What a stage gets from an engine: the `resources` section of a pipeline or of a stage.

    resources: {nodes: 1-8, gpus: 8, cpus: 12, memory: 64G, time: "12:00:00", grace: 120}

`environment` has names only. Their values are read, when the stage begins, from a file that only
its user can read: values in YAML would end up in logs and in the folder of the results.
"""

import os
import re
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from data.files import errors_named
from data.schema import check_schema
from deploy.hints import nearest
from deploy.launcher import LEASED_VERBS, SHARED_VERBS
from deploy.pipeline import Stage

ENGINES = ("local", "slurm")
SECRETS = "~/.config/rectify/secrets.env"
COUNTS = range(1, 100_000)
NODES = re.compile(r"[1-9]\d{0,4}(-[1-9]\d{0,4})?")
MEMORY = re.compile(r"[1-9]\d*[KMGT]?")
TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")  # minutes, M:SS, H:MM:SS, D-H
VARIABLE = re.compile(r"[A-Za-z_]\w*")
VOLUME = re.compile(r"/[^:]*:/[^:]*(:ro)?")
SCHEMAS: dict[str, Any] = {
    "nodes": (COUNTS, NODES),
    "gpus": range(0, 1000),
    "cpus": COUNTS,
    "memory": (None, COUNTS, MEMORY),
    "time": (None, COUNTS, TIME),
    "grace": range(1, 86_400),
    "array": COUNTS,
    "volumes": [VOLUME],
    "environment": [VARIABLE],
    "secrets": str,
    "container": (None, str),
    "engines": dict,
}


@dataclass(frozen=True)
class Resources:
    """What a stage gets.

    Args:
        nodes: number of nodes, or the least and the most, e.g. 1-8: as many as are free.
        gpus: GPUs of each node. A stage has one process for each, and one on nodes without.
        cpus: CPU cores of each process.
        memory: of each node, e.g. 64G; by default what the engine gives.
        time: limit, in minutes or as H:MM:SS; a stage that reaches it goes on in another job.
        grace: seconds before the limit at which a stage is asked to save and stop.
        array: number of workers that share the work of encode, collect, invert or evaluate.
        volumes: folders that a container sees, HOST:CONTAINER.
        environment: names of variables whose values are in the file of secrets.
        secrets: file with lines NAME=VALUE, which only its owner can read.
        container: image in which the stage runs.
        engines: what is one engine's own, by its name.
    """

    nodes: int | str = 1
    gpus: int = 0
    cpus: int = 1
    memory: str | int | None = None
    time: str | int | None = None
    grace: int = 120
    array: int = 1
    volumes: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=list)
    secrets: str = SECRETS
    container: str | None = None
    engines: dict[str, Any] = field(default_factory=dict)

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return max(1, self.gpus)

    @property
    def least_nodes(self) -> int:
        """The least number of nodes."""
        return int(str(self.nodes).partition("-")[0])

    @property
    def most_nodes(self) -> int:
        """The most nodes."""
        return int(str(self.nodes).rpartition("-")[2])


def parse_resources(stage: Stage) -> Resources:
    """Return the resources of a stage.

    Raises:
        ValueError: an entry is unknown, or cannot be; the message names stage and entry.
    """
    where = f"stage {stage.name}: resources"
    names = [field.name for field in fields(Resources)]
    for name in stage.resources:
        if name not in names:
            hint = nearest(name, names) or f"; the entries are {', '.join(names)}"
            raise ValueError(f"{where}: no entry `{name}`{hint}")
    environment = stage.resources.get("environment")
    if isinstance(environment, dict):
        raise ValueError(
            f"{where}: environment: gives values to {', '.join(environment)}; list their names, "
            f"and put the values into {SECRETS}, which only you can read"
        )
    for name, value in stage.resources.items():
        check_schema(value, SCHEMAS[name], f"{where}: {name}")
    resources = Resources(**stage.resources)
    for name in resources.engines:
        if name not in ENGINES:
            hint = nearest(name, ENGINES) or f"; the engines are {', '.join(ENGINES)}"
            raise ValueError(f"{where}: engines: no engine `{name}`{hint}")

    # what contradicts itself, or the stage
    if resources.least_nodes > resources.most_nodes:
        raise ValueError(f"{where}: nodes is {resources.nodes}; the least must come first")
    if resources.most_nodes > 1 and stage.verb not in SHARED_VERBS:
        raise ValueError(
            f"{where}: nodes is {resources.nodes}, and {stage.verb} runs in one process; leave it "
            f"out (on several nodes: {', '.join(SHARED_VERBS)})"
        )
    if resources.array > 1 and stage.verb not in LEASED_VERBS:
        raise ValueError(
            f"{where}: array is {resources.array}, and {stage.verb} cannot be shared by workers; "
            f"leave it out (with workers: {', '.join(LEASED_VERBS)})"
        )
    if resources.array > 1 and resources.most_nodes > 1:
        raise ValueError(
            f"{where}: array is {resources.array}, and nodes is {resources.nodes}; each worker has "
            "one node: give one of the two"
        )
    seconds = limit_seconds(resources.time)
    if seconds is not None and seconds <= resources.grace:
        raise ValueError(
            f"{where}: time is {resources.time}, and grace is {resources.grace} s; the limit must "
            "be longer"
        )
    return resources


def limit_seconds(time: str | int | None) -> int | None:
    """Return a limit in seconds: it has minutes, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS."""
    if time is None:
        return None
    days, dash, rest = str(time).rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # hours first
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(days) * 86_400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 1:
        return parts[0] * 60
    minutes, seconds = parts[-2:]
    hours = parts[0] if len(parts) == 3 else 0
    return hours * 3600 + minutes * 60 + seconds


def read_secrets(resources: Resources) -> dict[str, str]:
    """Return the values of the variables that a stage gets, from the file of secrets.

    Raises:
        ValueError: others can read the file, or a variable is not in it.
        OSError: there is no such file.
    """
    if not resources.environment:
        return {}
    path = Path(os.path.expanduser(resources.secrets))
    needed = ", ".join(resources.environment)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; resources.environment names {needed}: write a line NAME=VALUE "
            "for each into it, readable by you alone (chmod 600)"
        )
    stat = path.stat()
    if stat.st_mode & 0o077 or stat.st_uid not in (0, os.getuid()):
        raise ValueError(f"{path}: others may read it; run chmod 600 {shlex.quote(str(path))}")
    values = {}
    with errors_named(path):
        text = path.read_text()
    if "\0" in text:
        raise ValueError(f"{path}: has a NUL byte; write lines NAME=VALUE")
    for line in text.splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        value = value.strip()
        if equals and not name.startswith("#"):
            is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
            values[name.strip()] = value[1:-1] if is_quoted else value
    missing = [name for name in resources.environment if name not in values]
    if missing:
        raise ValueError(f"{path}: has no line {missing[0]}=...; resources.environment names it")
    return {name: values[name] for name in resources.environment}
