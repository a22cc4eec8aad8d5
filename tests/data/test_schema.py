"""The schema check of what is read from files."""

import copy
import re

import pytest

from data.schema import COUNT, NAME, check_schema, find_difference
from tests.helpers.refusals import refused

SCHEMA = {
    "name": NAME,
    "count": COUNT,
    "parts": [{"size": float}],
    "classes": (None, [str]),
    "sums": {re.compile("[0-9]+"): bool},
}
VALID = {
    "name": "a.tar",
    "count": 3,
    "parts": [{"size": 1}, {"size": 2.5}],
    "classes": ["x"],
    "sums": {"1": True},
    "more": 0,
}


@pytest.mark.parametrize("change", [{}, {"classes": None}, {"parts": []}, {"count": 0}])
def test_a_valid_value_is_accepted_and_not_changed(change):
    value = {**VALID, **change}
    before = copy.deepcopy(value)
    check_schema(value, SCHEMA, "file")
    assert value == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": -1}, ("count", "-1", COUNT[-1])),
        ({"count": True}, ("count", "True", COUNT[-1])),
        ({"count": 1.0}, ("count", "1.0", COUNT[-1])),
        ({"name": "../a.tar"}, ("name", "'../a.tar'", NAME.pattern)),
        ({"name": "a\0.tar"}, ("name", r"a\x00.tar", NAME.pattern)),
        ({"parts": [{"size": 1}, {}]}, ("parts[1]", "size")),
        ({"parts": {"size": 1}}, ("parts", "{'size': 1}", "list")),
        ({"classes": [3]}, ("classes[0]", "3", "text")),
        ({"classes": 3}, ("classes", "3", "null", "list")),
        ({"sums": {"x": True}}, ("sums", "'x'", "[0-9]+")),
        ({"sums": {"1": None}}, ("sums", "1", "None", "true", "false")),
    ],
    ids=[
        "negative count",
        "boolean count",
        "float count",
        "name with a folder",
        "name with a zero byte",
        "missing entry",
        "object instead of a list",
        "number instead of a text",
        "neither null nor a list",
        "key that does not match the pattern",
        "null instead of a boolean",
    ],
)
def test_an_invalid_entry_is_named_with_its_value_and_what_was_expected(change, named):
    with refused("file", *named, kind=ValueError):
        check_schema({**VALID, **change}, SCHEMA, "file")


def test_a_list_instead_of_an_object_is_named():
    with refused("file", "[]", "object", kind=ValueError):
        check_schema([], SCHEMA, "file")


def test_the_first_difference_of_nested_values_is_found():
    before = {"class_path": "Discrete", "init_args": {"betas": [0.1, 0.2], "n": 2}}
    now = {"class_path": "Discrete", "init_args": {"betas": [0.1, 0.3], "n": 2}}
    found = find_difference("interpolant", before, now)
    assert found == ("interpolant.init_args.betas[1]", 0.2, 0.3)
    assert find_difference("steps", 4, 8) == ("steps", 4, 8)
    assert find_difference("betas", [1], [1, 2]) == ("betas", [1], [1, 2])
