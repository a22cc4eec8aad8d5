"""The form of what is read back from files: which entries, of which kinds. Anything else is an error that names the entry."""

import re
from typing import Any

COUNT = range(2**48)
NUMBER, PATH = re.compile("[0-9]{1,15}"), re.compile(r"[^\0]+")
SHA256, XXH3 = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")
NAME = re.compile(r"[^./\\\0\n][^/\\\0\n]*")  # of a file in the folder at hand: it leads nowhere else, and is not hidden


def conform(value: Any, form: Any, where: str) -> None:
    """Refuse a value that has not the form.

    Args:
        value: what was read.
        form: a type (a float may be written as a whole number); a range of whole numbers; a pattern of the whole text; None;
            [form] of a list; {key: form} of an object that may hold more; {pattern: form} of one with any such keys; a tuple
            of choices.
        where: the file, and the entry in it.

    Raises:
        ValueError: names the entry, its value and what was wanted.
    """
    if _fits(value, form):  # at once, without a text for each of a million entries
        return
    if isinstance(form, tuple):
        form = next((choice for choice in form if type(choice) is type(value) and isinstance(choice, list | dict)), form)
    if isinstance(form, list) and isinstance(value, list):
        for place, part in enumerate(value):
            conform(part, form[0], f"{where}[{place}]")
    elif isinstance(form, dict) and isinstance(value, dict):
        pattern = _pattern(form)
        for key in value if pattern else form:
            if pattern:
                conform(key, pattern, f"{where}: an entry's name")
            elif key not in value:
                raise ValueError(f"{where}: has no entry `{key}`")
            conform(value[key], form[pattern or key], f"{where}: {key}")
    else:
        wanted = " or ".join(map(_wanted, form)) if isinstance(form, tuple) else _wanted(form)
        raise ValueError(f"{where}: is {shown(value)}, wanted {wanted}")


def shown(value: Any) -> str:
    """Return a value's text, cut where it is long."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."


def _pattern(form: dict[Any, Any]) -> re.Pattern[str] | None:
    """Return the pattern of all keys, of a form that has one."""
    return next((key for key in form if isinstance(key, re.Pattern)), None)


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, range):
        return type(value) is int and value in form
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value) is not None
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        if pattern := _pattern(form):
            return all(_fits(key, pattern) and _fits(part, form[pattern]) for key, part in value.items())
        return all(key in value and _fits(value[key], part) for key, part in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(_fits(part, form[0]) for part in value)
    if isinstance(form, tuple):
        return any(_fits(value, choice) for choice in form)
    if form is float:
        return type(value) in (int, float)
    return value is None if form is None else type(value) is form


def _wanted(form: Any) -> str:
    if isinstance(form, range):
        return f"a whole number from {form.start} to {form.stop - 1}"
    if isinstance(form, re.Pattern):
        return f"text like {form.pattern}"
    names: dict[Any, str] = {float: "a number", str: "text", bool: "true or false", dict: "an object", list: "a list"}
    return names.get(form if form is None or isinstance(form, type) else type(form), "null")
