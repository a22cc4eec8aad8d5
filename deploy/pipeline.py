"""Pipelines: a list of `rectify` commands, each with the stages that it needs.

A stage has a `name`, one verb with its options, and optionally `smoke`, options that replace the
verb's under `--smoke`, `needs`, the stages that must be finished before it, `resources`, which
`rectify launch` gives it (deploy/launch/resources.py), and `for`, loops over values:

    name: fit-{model}-{seed}
    for: {seed: [0, 1, 2], model: {flow: {}, vp: {model.denoiser.interpolant: VariancePreserving}}}
    fit: {config: [base.yaml, more.yaml], out: "{out}/{model}/{seed}", seed_everything: "{seed}"}
    smoke: {trainer.max_steps: 4}
    needs: [encode, "collect-{seed}"]

is six stages: fit-flow-0 first, then fit-vp-0. {seed} and {model} are replaced by the values, and
the values of a mapping add options. With `--smoke` every loop takes only its first value. The name
of a looped stage, as the YAML has it, means all of its stages.

Without `needs` a stage needs the one before it in the file: all of its stages, if it has loops. The
stages of one loop do not need each other.

`config` is a file or a list of files. They come first in the command, each with its `--config`, so
that the other options win over them. A list in any other option is one word.

A pipeline may have `targets`, which `rectify report` checks (deploy/targets.py), and `resources`
for all stages.
"""

import json
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

from data.files import canonical, digest, errors_named, file_digest
from data.schema import COUNT, NAME, PATH, check_schema, shorten
from deploy.cli import VERBS
from deploy.hints import nearest
from deploy.launcher import LEASED_VERBS, SHARED_VERBS
from deploy.targets import check_targets
from deploy.yaml_files import expand_home, read_yaml, texts_of

NON_VERB_KEYS = ("name", "for", "smoke", "needs", "resources")  # keys of a stage beside its verb
LOOPS_SCHEMA = {NAME: ([(NAME, COUNT)], {NAME: (None, dict)})}
HASHED_BYTES = 64 * 2**20  # of a file that a command names; of a larger one the size counts
# Names of options and variables whose values are secrets; `max_tokens` is none.
SECRET = re.compile(
    r"(?i:(.*[._])?(api[_-]?key|(secret[_-]?)?access[_-]?key|secret([_-]?key)?|password|passwd"
    r"|(auth|access|hub|hf|api|bearer)[_-]?token))|[A-Z0-9_]*(KEY|TOKEN|SECRET|PASSWORD)"
)


class Stage(NamedTuple):
    """A stage of a pipeline, with its loops' values and the pipeline's folder."""

    number: int  # from 1
    name: str
    words: list[str]  # of its command
    needs: list[str]  # names of stages
    inputs: dict[str, Any]  # what its command reads: options, with {out} in them, and files
    fingerprint: str  # of the inputs, and of the stages that it needs
    resources: dict[str, Any]

    @property
    def verb(self) -> str:
        """The verb of the command."""
        return str(self.inputs["verb"])

    @property
    def out(self) -> Path | None:
        """What the command writes; None if it has no `out`."""
        out = self.words[self.words.index("--out") + 1] if "--out" in self.words else ""
        return Path(out) if out else None


class Pipeline(NamedTuple):
    """A pipeline, as its YAML describes it."""

    out: Path  # folder of the results
    stages: list[Stage]  # in the order of the file
    targets: dict[str, Any]  # see deploy/targets.py

    def needed_by(self, name: str) -> set[str]:
        """Return the names of all stages that a stage needs, directly or not."""
        needs = {stage.name: stage.needs for stage in self.stages}
        found: set[str] = set()
        new = set(needs[name])
        while new:
            found |= new
            new = {need for one in new for need in needs[one]} - found
        return found

    def dependents(self, name: str) -> set[str]:
        """Return the names of all stages that need a stage, directly or not."""
        return {stage.name for stage in self.stages if name in self.needed_by(stage.name)}


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


def stage_options(stage: dict[str, Any], smoke: bool) -> dict[str, Any]:
    """Return the options of a stage's command as words, with {out} in them; `config` is a list."""
    options = dict(stage[stage_verb(stage)])
    if smoke:
        options |= stage.get("smoke") or {}
    configs = options.pop("config", [])
    if not isinstance(configs, list):
        configs = [configs]
    words: dict[str, Any] = {}
    if configs:
        words["config"] = [to_word(path) for path in configs]
    for key, value in options.items():
        words[key] = to_word(value)
    return words


def command(stage: dict[str, Any], out: Path, smoke: bool) -> list[str]:
    """Return the words of a stage's command: its verb and its options, with {out} replaced."""
    words = stage_verb(stage).split()
    for key, value in stage_options(stage, smoke).items():
        for word in value if isinstance(value, list) else [value]:
            words += [f"--{key}", word.replace("{out}", str(out))]
    return words


def read_inputs(
    stage: dict[str, Any], out: Path, smoke: bool, made: Collection[Path]
) -> dict[str, Any]:
    """Return what a stage's command reads: its options, and what identifies the files they name.

    What the stages of the pipeline make is not among it: they have their own fingerprints. Nor is
    the pipeline's folder, which may be moved, or named from another current folder.

    Args:
        stage: the stage, without loops.
        out: the pipeline's folder.
        smoke: whether its `smoke` options count.
        made: absolute paths that the stages write.
    """
    verb = stage_verb(stage)
    options = stage_options(stage, smoke)
    texts = [text for value in options.values() for text in find_texts(value)]
    files: dict[str, Any] = {}
    for text in texts:
        path = Path(text.replace("{out}", str(out)))
        absolute = path.resolve()
        is_made = any(folder in made for folder in (absolute, *absolute.parents))
        is_made |= any(folder.is_relative_to(absolute) for folder in made)
        identity = None if is_made or text in files else identify_file(path)
        is_photos = verb == "pack" and text == options.get("images")
        if is_photos and not is_made and identity is None and path.is_dir():
            identity = list_folder(path)
        if identity is not None:
            files[text] = identity
        if path.suffix == ".yaml":  # those that it names, too
            texts += [named for named in texts_of(identity) if named.endswith(".yaml")]
    return {"verb": verb, "options": options, "files": files}


def add_configured_out(stage: dict[str, Any]) -> dict[str, Any]:
    """Return a stage of `fit` with the `out` of its configuration as an option, if it has none."""
    options = stage.get("fit")
    if not options or "out" in options:
        return stage
    configs = options.get("config") or []
    for config in [configs] if isinstance(configs, str) else configs:
        if Path(str(config)).is_file():
            content = read_yaml(Path(config))
            if isinstance(content, dict) and "out" in content:
                stage = {**stage, "fit": {**options, "out": content["out"]}}
    return stage


def find_texts(value: Any) -> list[str]:
    """Return the texts in an option: the option itself, or those of the list or mapping it is."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        with suppress(ValueError):  # it only looks like one
            value = json.loads(value)
    return list(texts_of(value))


def identify_file(path: Path) -> Any:
    """Return what identifies a file or folder that a command names; None if it is none.

    It is the content of YAML, the sha256 of other files and of a set's manifest, and the names,
    sizes and times of a run's checkpoints or of the files of a model.
    """
    try:
        if path.suffix == ".yaml" and path.is_file():
            with errors_named(path):
                return json.loads(json.dumps(read_yaml(path), default=str))
        if path.is_file():
            size = path.stat().st_size
            return file_digest(path) if size <= HASHED_BYTES else f"{size} bytes"
        if (path / "checkpoints").is_dir():
            return list_folder(path / "checkpoints")
        if (path / "manifest.json").is_file():
            return file_digest(path / "manifest.json")
        for name in ("model_index.json", "config.json"):
            if (path / name).is_file():
                return list_folder(path)
    except OSError:  # a text that is too long for a path, for example
        return None
    return None


def list_folder(folder: Path) -> str:
    """Return a checksum of the names, sizes and times of all files in a folder."""
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            files.append([str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns])
    return digest(canonical(files))


def load(config: Path, smoke: bool = False, out: Path | None = None) -> Pipeline:
    """Read and check a pipeline, and unroll its loops.

    Args:
        config: its YAML file.
        smoke: take only the first value of every loop, and the stages' `smoke` options.
        out: folder of the results, instead of the YAML's.

    Raises:
        ValueError: a stage or a target is not as it must be.
    """
    content = expand_home(read_yaml(config))
    check_content(content, config)
    out = out or Path(content["out"])

    # unroll
    entries = content["stages"]
    unrolled = [[add_configured_out(one) for one in unroll(entry, smoke)] for entry in entries]
    names = [stage["name"] for stages in unrolled for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{config}: two stages have the name {name!r}; give each stage another `name`, "
                "with the {names} of its loops in it"
            )

    # the names that `needs` may use: of stages, and of looped entries
    known = {}
    for entry, found in zip(entries, unrolled):
        known[entry["name"]] = [stage["name"] for stage in found]
    known |= {name: [name] for name in names}
    left_out: set[str] = set()
    if smoke:
        for entry in entries:
            left_out |= {stage["name"] for stage in unroll(entry)}

    # what they write
    made = {(out / "stages").resolve()}
    for stage in chain.from_iterable(unrolled):
        written = stage_options(stage, smoke).get("out")
        if written:
            made.add(Path(written.replace("{out}", str(out))).resolve())
    made.discard(out.resolve())

    # the stages, without fingerprints
    stages: list[Stage] = []
    before: list[str] = []
    for found in unrolled:
        for stage in found:
            needs = list(before)
            if "needs" in stage:
                needs = resolve_needs(stage, known, left_out, config)
            more = stage.get("resources") or {}
            usable = usable_resources(content.get("resources") or {}, stage_verb(stage), more)
            resources = merge(usable, more)
            words = command(stage, out, smoke)
            inputs = read_inputs(stage, out, smoke, made)
            number = len(stages) + 1
            stages.append(Stage(number, stage["name"], words, needs, inputs, "", resources))
        before = [stage["name"] for stage in found]
    pipeline = Pipeline(out, stages, content.get("targets", {}))
    check_graph(pipeline, config)
    return add_fingerprints(pipeline)


def usable_resources(resources: dict[str, Any], verb: str, more: Collection[str]) -> dict[str, Any]:
    """Return the resources of a pipeline that a stage can use: `pack` has no use for nodes.

    Args:
        resources: of the pipeline.
        verb: of the stage.
        more: names of the stage's resources. Of nodes and array a stage has one.
    """
    usable = {**resources}
    if verb not in LEASED_VERBS or "nodes" in more:
        usable.pop("array", None)
    if verb not in SHARED_VERBS or "array" in {*usable, *more}:
        usable.pop("nodes", None)
    return usable


def merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping with the entries of another one, which win; mappings in it are merged."""
    merged = {**base}
    for key, value in more.items():
        before = merged.get(key)
        if isinstance(before, dict) and isinstance(value, dict):
            value = merge(before, value)
        merged[key] = value
    return merged


def check_content(content: Any, config: Path) -> None:
    """Check the content of a pipeline's file.

    Raises:
        ValueError: a stage or a target is not as it must be.
    """
    schema = {"out": PATH, "stages": [dict]}
    check_schema(content, schema, f"{config}: a pipeline needs `out` and `stages`")
    check_targets(content.get("targets", {}), f"{config}: targets")
    check_schema(content.get("resources"), (None, dict), f"{config}: resources")
    check_no_secret(content, str(config))
    for stage in content["stages"]:
        verbs = [key for key in stage if key not in NON_VERB_KEYS]
        if len(verbs) != 1 or verbs[0] not in VERBS or not isinstance(stage[verbs[0]], dict):
            raise ValueError(
                f"{config}: stage {shorten(stage)} needs a `name`, one verb with its options, and "
                f"perhaps {', '.join(f'`{key}`' for key in NON_VERB_KEYS[1:])}; "
                f"the verbs are {', '.join(VERBS)}"
            )
        check_schema(stage, {"name": NAME}, f"{config}: stage {shorten(stage)}")
        where = f"{config}: stage {stage['name']}"
        check_schema(stage.get("smoke"), (None, dict), f"{where}: smoke")
        check_schema(stage.get("for") or {}, LOOPS_SCHEMA, f"{where}: for")
        check_schema(stage.get("needs", []), ([NAME], NAME), f"{where}: needs")
        check_schema(stage.get("resources"), (None, dict), f"{where}: resources")


def check_no_secret(part: Any, where: str) -> None:
    """Check that no key that is named like a secret has a value.

    Raises:
        ValueError: one has; the message names the key, and not the value.
    """
    found = ""
    if isinstance(part, list):
        for i, item in enumerate(part):
            check_no_secret(item, f"{where}[{i}]")
    elif isinstance(part, dict):
        for key, value in part.items():
            if SECRET.fullmatch(str(key)) and isinstance(value, str | int | float) and value != "":
                found = str(key)
            check_no_secret(value, f"{where}: {key}")
    elif isinstance(part, str):  # NAME=VALUE, for example in an option of sbatch
        for name in re.findall(r"([A-Za-z_][\w.-]*)=(?=[^\s,])", part):
            if SECRET.fullmatch(name):
                found = name
    if found:
        raise ValueError(
            f"{where}: {found}: a secret by value; put it into a file that only you can read, "
            "and its name into `resources.environment` (docs/cluster.md)"
        )


def resolve_needs(
    stage: dict[str, Any], known: dict[str, list[str]], left_out: Collection[str], config: Path
) -> list[str]:
    """Return the names of the stages that a stage needs.

    Args:
        stage: the stage, without loops.
        known: the stages that each name means.
        left_out: names of stages that exist without `--smoke`.
        config: the pipeline's file.

    Raises:
        ValueError: there is no such stage.
    """
    given = stage["needs"]
    needs: list[str] = []
    for name in [given] if isinstance(given, str) else given:
        if name in known:
            needs += known[name]
        elif name not in left_out:
            hint = nearest(name, known) or f"; the stages are {', '.join(known)}"
            raise ValueError(
                f"{config}: stage {stage['name']}: needs {name!r}: no such stage{hint}"
            )
    return list(dict.fromkeys(needs))


def check_graph(pipeline: Pipeline, config: Path) -> None:
    """Check that no stage needs itself, and that stages need those whose results they read.

    Raises:
        ValueError: one does, or does not; the message names it.
    """
    for stage in pipeline.stages:
        if stage.name in pipeline.needed_by(stage.name):
            cycle = " -> ".join(find_cycle(pipeline, stage.name))
            raise ValueError(
                f"{config}: stage {stage.name}: needs itself: {cycle}; break the cycle"
            )
    makers = {}
    for stage in pipeline.stages:
        if stage.out:
            makers[stage.out.resolve()] = stage.name
    makers.pop(pipeline.out.resolve(), None)
    for stage in pipeline.stages:
        needed = pipeline.needed_by(stage.name) | {stage.name}
        for option, word in zip(stage.words, stage.words[1:]):
            if not option.startswith("--") or option == "--out":
                continue
            for text in find_texts(word):
                maker = find_maker(text, makers)
                if maker is None or maker in needed:
                    continue
                raise ValueError(
                    f"{config}: stage {stage.name}: {option} is made by stage {maker}, which it "
                    f"does not need; add {maker} to its `needs`"
                )


def find_maker(text: str, makers: dict[Path, str]) -> str | None:
    """Return the stage that makes what a text names: the file or folder, or one around it."""
    path = Path(text).resolve()
    for folder in (path, *path.parents):
        if folder in makers:
            return makers[folder]
    return None


def find_cycle(pipeline: Pipeline, name: str) -> list[str]:
    """Return the names on a shortest way from a stage through its needs back to it."""
    needs = {stage.name: stage.needs for stage in pipeline.stages}
    ways = {name: [name]}
    for way in (queue := [[name]]):
        for need in needs[way[-1]]:
            if need == name:
                return [*way, name]
            if need not in ways:
                ways[need] = [*way, need]
                queue.append(ways[need])
    raise AssertionError(f"{name} does not need itself")


def add_fingerprints(pipeline: Pipeline) -> Pipeline:
    """Return a pipeline with the fingerprints of its stages: of inputs, and of what they need."""
    found: dict[str, str] = {}
    while len(found) < len(pipeline.stages):
        for stage in pipeline.stages:
            if stage.name not in found and all(need in found for need in stage.needs):
                needed = sorted(found[need] for need in stage.needs)
                found[stage.name] = digest(canonical([stage.inputs, needed]))
    stages = [stage._replace(fingerprint=found[stage.name]) for stage in pipeline.stages]
    return pipeline._replace(stages=stages)


def select(pipeline: Pipeline, first: str | None, last: str | None) -> list[Stage]:
    """Return the stages from one on to another one, in the order in which they can run.

    Args:
        pipeline: the pipeline.
        first: this stage and those that need it; None for all.
        last: this stage and those that it needs; None for all.

    Raises:
        ValueError: there is no such stage, or nothing is between the two.
    """
    names = {stage.name for stage in pipeline.stages}
    for option, name in (("from", first), ("to", last)):
        if name is not None and name not in names:
            hint = nearest(name, names) or f"; the stages are {', '.join(sorted(names))}"
            raise ValueError(f"--{option} {name}: no such stage{hint}")
    if first is not None:
        names &= pipeline.dependents(first) | {first}
    if last is not None:
        names &= pipeline.needed_by(last) | {last}
    if not names:
        raise ValueError(f"--from {first} --to {last}: {last} does not need {first}")
    return [stage for stage in sort_stages(pipeline.stages) if stage.name in names]


def sort_stages(stages: Sequence[Stage]) -> list[Stage]:
    """Return stages with what they need before them, else in the order of the file."""
    ordered: list[Stage] = []
    done: set[str] = set()
    while len(ordered) < len(stages):
        following = next(
            stage for stage in stages if stage.name not in done and done.issuperset(stage.needs)
        )
        ordered.append(following)
        done.add(following.name)
    return ordered
