"""YAML files of users: a key that occurs twice is refused, and `~` is the home folder."""

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from data.files import errors_named
from data.schema import shorten

MERGE_TAG = "tag:yaml.org,2002:merge"  # of the key `<<`, whose entries others may replace
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
# What YAML 1.1 reads as other numbers than most people: 010 is 8, and 1:30 is 90.
OLD_NUMBER = re.compile(r"[-+]?0[0-9_]+|.*:.*")
CONFIG_OPTIONS = ("--config", "-c")
# Keys whose values follow those of others: the parser drops what a file says.
FOLLOWING = {
    ("data", "seed"): "seed_everything",
    ("trainer", "default_root_dir"): "out",
}


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ValueError: it is no YAML, or a key occurs twice in one mapping, of which YAML's own rule
            would drop the first, or a number is octal or sexagesimal; the message names file and
            line.
    """
    with errors_named(path):
        text = path.read_text()
        check_nodes(yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
        json.dumps(content, default=str, skipkeys=True)  # refuses an alias inside its own anchor
        return content


def check_number(node: yaml.ScalarNode) -> None:
    """Check that a number is read as most people mean it."""
    is_plain = node.style is None and node.tag in NUMBER_TAGS
    if is_plain and OLD_NUMBER.fullmatch(node.value):
        raise ValueError(
            f"line {node.start_mark.line + 1}: YAML reads {node.value} as "
            f"{yaml.safe_load(node.value)}; write that, or '{node.value}' in quotes"
        )


def check_nodes(root: yaml.Node | None) -> None:
    """Check that no mapping in a YAML document has a key twice, and check its numbers."""
    nodes = [] if root is None else [root]
    checked = set()
    while nodes:
        node = nodes.pop()
        if id(node) in checked:  # an alias
            continue
        checked.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.ScalarNode):
            check_number(node)
        if not isinstance(node, yaml.MappingNode):
            continue

        # the keys of a mapping
        lines: dict[str, int] = {}
        for key, value in node.value:
            nodes.append(value)
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE_TAG:
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"line {line}: the key `{key.value}` occurs twice in one mapping, first in "
                    f"line {lines[key.value]}; put both together, or delete one"
                )
            lines[key.value] = line


def expand_home(value: Any) -> Any:
    """Return a value with `~` at the start of every path in it replaced by the home folder.

    Args:
        value: text, a path, or lists, mappings and namespaces of them; namespaces are changed.
    """
    if isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    if isinstance(value, dict):
        return {key: expand_home(item) for key, item in value.items()}
    if isinstance(value, Namespace):
        for name, item in vars(value).items():
            vars(value)[name] = expand_home(item)
    return value


def config_files(args: Sequence[str]) -> list[Path]:
    """Return the files that a command has as its configuration."""
    files = []
    for word, following in zip(args, [*args[1:], ""]):
        name, equals, value = word.partition("=")
        path = Path(os.path.expanduser(value if equals else following))
        if name in CONFIG_OPTIONS and path.is_file():
            files.append(path)
    return files


def yaml_files(args: Sequence[str]) -> Iterator[Path]:
    """Yield the YAML files among a command's words, and those that these files name."""
    configs = config_files(args)
    waiting = [*map(str, configs), *args]
    found = set()
    while waiting:
        path = Path(os.path.expanduser(waiting.pop(0)))
        is_yaml = path in configs or path.suffix in (".yaml", ".yml")
        if path in found or not is_yaml or not path.is_file():
            continue
        found.add(path)
        yield path
        waiting += texts_of(read_yaml(path))


def texts_of(value: Any) -> Iterator[str]:
    """Yield every text in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from texts_of(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def check_following(path: Path, content: Any) -> None:
    """Check that a YAML file has no key whose value follows that of another."""
    for (group, name), other in FOLLOWING.items():
        part = content.get(group) if isinstance(content, dict) else None
        if isinstance(part, dict) and name in part:
            raise ValueError(f"{path}: {group}.{name} follows {other}; set {other} instead")


def check_yaml(args: Sequence[str]) -> None:
    """Check the YAML files among a command's words, before they are merged.

    Raises:
        ValueError: one cannot be parsed (jsonargparse would overflow its stack on endless
            nesting), has a key twice or one that follows another, or changes the model of a base
            that is not given before it.
    """
    has_model = any(word.startswith("--model") for word in args)
    configs = config_files(args)
    for path in yaml_files(args):
        content = read_yaml(path)
        if path in configs and not isinstance(content, dict):
            raise ValueError(
                f"{path}: contains {shorten(content)}; a configuration is a mapping of keys, for "
                "example `out: runs/first`"
            )
        check_following(path, content)
        model = content.get("model") if isinstance(content, dict) else None
        if isinstance(model, str) or (isinstance(model, dict) and "class_path" in model):
            has_model = True
        elif isinstance(model, dict) and "init_args" in model and not has_model:
            raise ValueError(
                f"{path}: its model has no class_path, so that it changes a base: give the base "
                f"before it, --config base.yaml --config {path}"
            )
