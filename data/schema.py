"""Schemas of values that are read from files. A value that does not match is named in the error."""

import re
from typing import Any, NamedTuple

COUNT = range(2**48)
NUMBER = re.compile("[0-9]{1,15}")
PATH = re.compile(r"[^\0]+")
SHA256 = re.compile("[0-9a-f]{64}")
XXH3 = re.compile("[0-9a-f]{32}")
NAME = re.compile(r"[^./\\\0\n][^/\\\0\n]*")  # of a file in the same folder that is not hidden
SHOWN_LENGTH = 80  # characters of a value in an error

TYPE_NAMES: dict[Any, str] = {
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def check_schema(value: Any, schema: Any, where: str) -> None:
    """Check that a value matches a schema.

    A schema is one of:

    - a type; for float, whole numbers match too
    - a range of whole numbers
    - a pattern, which must match the whole text
    - None
    - [schema]: a list of any length
    - {key: schema}: an object, which may have more entries
    - {pattern: schema}: an object with any number of entries, whose keys match the pattern
    - a tuple of alternatives

    Args:
        value: what was read.
        schema: what it must match.
        where: the file, and the entry in it, for errors.

    Raises:
        ValueError: it does not match. The message names the entry, its value and what it must be.
    """
    if _matches(value, schema):  # at once: a text for each of a million entries would be slow
        return
    if isinstance(schema, tuple):
        schema = _find_alternative(value, schema)
    if isinstance(schema, list) and isinstance(value, list):
        for i, item in enumerate(value):
            check_schema(item, schema[0], f"{where}[{i}]")
    elif isinstance(schema, dict) and isinstance(value, dict):
        _check_entries(value, schema, where)
    else:
        raise ValueError(f"{where}: is {shorten(value)}, it must be {_describe(schema)}")


def _check_entries(value: dict[str, Any], schema: dict[Any, Any], where: str) -> None:
    """Check the entries of an object."""
    pattern = _key_pattern(schema)
    if pattern:
        for key, part in value.items():
            check_schema(key, pattern, f"{where}: an entry's name")
            check_schema(part, schema[pattern], f"{where}: {key}")
        return
    for key, part_schema in schema.items():
        if key not in value:
            raise ValueError(f"{where}: has no entry `{key}`")
        check_schema(value[key], part_schema, f"{where}: {key}")


class Difference(NamedTuple):
    """Where two values differ."""

    key: str  # with dots and indices, for example `interpolant.init_args.betas[3]`
    before: Any
    now: Any


def find_difference(key: str, before: Any, now: Any) -> Difference:
    """Return the first place at which two different JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                return find_difference(f"{key}.{name}", before.get(name), now.get(name))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (left, right) in enumerate(zip(before, now)):
            if left != right:
                return find_difference(f"{key}[{i}]", left, right)
    return Difference(key, before, now)


def shorten(value: Any) -> str:
    """Return the repr of a value, cut if it is long."""
    text = repr(value)
    if len(text) < SHOWN_LENGTH:
        return text
    return f"{text[:SHOWN_LENGTH]}..."


def _key_pattern(schema: dict[Any, Any]) -> re.Pattern[str] | None:
    """Return the pattern of all keys, if the schema of an object has one."""
    for key in schema:
        if isinstance(key, re.Pattern):
            return key
    return None


def _find_alternative(value: Any, alternatives: tuple[Any, ...]) -> Any:
    """Return the list or object among alternatives that a list or object is meant to match.

    Its error names the entry that is wrong. Without one, return all alternatives.
    """
    for schema in alternatives:
        if isinstance(schema, list | dict) and type(schema) is type(value):
            return schema
    return alternatives


def _matches(value: Any, schema: Any) -> bool:
    if schema is None:
        return value is None
    if schema is float:
        return type(value) in (int, float)
    if isinstance(schema, range):
        return type(value) is int and value in schema
    if isinstance(schema, re.Pattern):
        return isinstance(value, str) and schema.fullmatch(value) is not None
    if isinstance(schema, dict):
        return isinstance(value, dict) and _entries_match(value, schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(_matches(item, schema[0]) for item in value)
    if isinstance(schema, tuple):
        return any(_matches(value, alternative) for alternative in schema)
    return type(value) is schema


def _entries_match(value: dict[str, Any], schema: dict[Any, Any]) -> bool:
    pattern = _key_pattern(schema)
    if pattern:
        for key, part in value.items():
            if not _matches(key, pattern) or not _matches(part, schema[pattern]):
                return False
        return True
    for key, part_schema in schema.items():
        if key not in value or not _matches(value[key], part_schema):
            return False
    return True


def _describe(schema: Any) -> str:
    """Return what a value must be, for an error."""
    if isinstance(schema, tuple):
        return " or ".join(map(_describe, schema))
    if isinstance(schema, range):
        return f"a whole number from {schema.start} to {schema.stop - 1}"
    if isinstance(schema, re.Pattern):
        return f"text like {schema.pattern}"
    if isinstance(schema, list | dict):
        schema = type(schema)
    if schema is int:
        return "a whole number"
    return TYPE_NAMES.get(schema, "null")
