"""Plain descriptions of objects of `models`: class path and arguments.

Checkpoints store them, and identities are compared by them.
"""

import importlib
import inspect
import json
from collections.abc import Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin


def describe(thing: Any, defaults: bool = True) -> Any:
    """Return the plain description (class_path, init_args) of an object: the inverse of `build`.

    It relies on one convention of `models`: a constructor keeps every argument under its own name.

    Args:
        thing: an object of `models`, a plain value, or a list of such.
        defaults: False leaves out arguments that have their default value, so that an argument
            added by a later version changes nothing.

    Raises:
        ValueError: the object's class is not one of `models`.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, list | tuple):
        return [describe(part, defaults) for part in thing]
    cls = type(thing)
    if not cls.__module__.startswith("models."):
        raise ValueError(
            f"{cls.__qualname__}: only classes of `models` can be saved; "
            "put a network into models/nets/"
        )
    parameters = inspect.signature(cls.__init__).parameters
    arguments = {}
    for name in sorted(parameters.keys() - {"self", "args", "kwargs"}):
        value = getattr(thing, name)
        if defaults or value != parameters[name].default:
            arguments[name] = describe(value, defaults)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}


def build(description: Any) -> Any:
    """Build what `describe` described.

    Only classes of `models` are built: a checkpoint cannot name other code.

    Raises:
        ValueError: the description names something else.
        TypeError: an argument has a type that the constructor does not take.
    """
    if isinstance(description, list):
        return [build(part) for part in description]
    if not isinstance(description, dict):
        return description
    class_path = description["class_path"]
    module, _, name = class_path.rpartition(".")
    if not module.startswith("models."):
        raise ValueError(f"class_path {class_path}: a checkpoint may only name classes of `models`")
    cls = getattr(importlib.import_module(module), name)
    if not isinstance(cls, type) or cls.__module__ != module:
        raise ValueError(f"class_path {class_path}: no class of {module}")
    arguments = {key: build(value) for key, value in description["init_args"].items()}
    for key, parameter in inspect.signature(cls, eval_str=True).parameters.items():
        if key in arguments and not _has_type(arguments[key], parameter.annotation):
            raise TypeError(
                f"{name}: {key} is {arguments[key]!r}; it must be of type {parameter.annotation}"
            )
    return cls(**arguments)


def identity(thing: Any) -> str:
    """Return a text that identifies an object of `models`: equal objects have equal texts.

    The weights of networks are not part of it.
    """
    return json.dumps(describe(thing, defaults=False), sort_keys=True)


def _has_type(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type, as far as classes, unions and sequences express it."""
    kind = get_origin(hint) or hint
    parts = get_args(hint)
    if kind in (Union, UnionType):
        return any(_has_type(value, part) for part in parts)
    if kind in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return False
        return all(_has_type(part, parts[0]) for part in value if parts)
    if kind in (bool, int, str):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    return isinstance(value, kind) if isinstance(kind, type) else True
