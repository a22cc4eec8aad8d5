"""The form of what is read back."""

import copy
import re

import pytest

from data.form import COUNT, NAME, conform

FORM = {"name": NAME, "count": COUNT, "parts": [{"size": float}], "classes": (None, [str]), "sums": {re.compile("[0-9]+"): bool}}
SOUND = {"name": "a.tar", "count": 3, "parts": [{"size": 1}, {"size": 2.5}], "classes": ["x"], "sums": {"1": True}, "more": 0}


@pytest.mark.parametrize("change", [{}, {"classes": None}, {"parts": []}, {"count": 0}])
def test_what_has_the_form_is_taken(change):
    value = {**SOUND, **change}
    before = copy.deepcopy(value)
    conform(value, FORM, "file")
    assert value == before, "it is looked at, not changed"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": -1}, "file: count: is -1, wanted a whole number from 0"),
        ({"count": True}, "file: count: is True, wanted a whole number"),
        ({"count": 1.0}, "file: count: is 1.0, wanted a whole number"),
        ({"name": "../a.tar"}, "file: name: is '../a.tar', wanted text like"),
        ({"name": "a\0.tar"}, "file: name: "),
        ({"parts": [{"size": 1}, {}]}, r"file: parts\[1\]: has no entry `size`"),
        ({"parts": {"size": 1}}, "file: parts: is .*, wanted a list"),
        ({"classes": [3]}, r"file: classes\[0\]: is 3, wanted text"),
        ({"classes": 3}, "file: classes: is 3, wanted null or a list"),
        ({"sums": {"x": True}}, "file: sums: an entry's name: is 'x'"),
        ({"sums": {"1": None}}, "file: sums: 1: is None, wanted true or false"),
    ],
)
def test_what_has_not_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        conform({**SOUND, **change}, FORM, "file")


def test_no_object_at_all_is_named():
    with pytest.raises(ValueError, match=r"file: is \[\], wanted an object"):
        conform([], FORM, "file")
