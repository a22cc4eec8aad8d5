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
    if isinstance(form, tuple):
        if not any(_fits(value, choice) for choice in form):
            raise ValueError(f"{where}: is {shown(value)}, wanted {' or '.join(map(_wanted, form))}")
        conform(value, next(choice for choice in form if _fits(value, choice)), where)
    elif not _fits(value, form):
        raise ValueError(f"{where}: is {shown(value)}, wanted {_wanted(form)}")
    elif isinstance(form, list):
        for place, part in enumerate(value):
            conform(part, form[0], f"{where}[{place}]")
    elif isinstance(form, dict):
        pattern = next((key for key in form if isinstance(key, re.Pattern)), None)
        for key in value if pattern else form:
            if pattern:
                conform(key, pattern, f"{where}: an entry's name")
            elif key not in value:
                raise ValueError(f"{where}: has no entry `{key}`")
            conform(value[key], form[pattern or key], f"{where}: {key}")


def shown(value: Any) -> str:
    """Return a value's text, cut where it is long."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."


def _fits(value: Any, form: Any) -> bool:
    if isinstance(form, range):
        return type(value) is int and value in form
    if isinstance(form, re.Pattern):
        return isinstance(value, str) and form.fullmatch(value) is not None
    if isinstance(form, list | dict):
        return isinstance(value, type(form))
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
