"""Refusals: tested by exit code and by the file, key or value they name, never by wording."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tests.helpers.commands import run_command

PREFIX = "rectify: error: "


def assert_names(line: str, named: tuple[object, ...]) -> None:
    """Assert that a message is one line that contains each of `named`."""
    assert "\n" not in line.strip(), line
    for name in named:
        assert str(name) in line, f"does not name {name}: {line}"


@contextmanager
def refused(
    *named: object, kind: type[Exception] | tuple[type[Exception], ...] = (ValueError, OSError)
) -> Iterator[SimpleNamespace]:
    """Assert that the block raises bad input as one line that names each of `named`.

    The line is the `line` of what is yielded, once the block has ended.
    """
    found = SimpleNamespace(line="")
    with pytest.raises(kind) as raised:
        yield found
    found.line = str(raised.value)
    assert_names(found.line, named)


def refused_line(err: str) -> str:
    """Return the one error line of a command's standard error."""
    lines = [line for line in err.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 1, err
    assert "Traceback" not in err, err
    return lines[0].removeprefix(PREFIX)


def assert_refused(
    capfd: pytest.CaptureFixture, words: tuple[object, ...], *named: object, alone: bool = False
) -> str:
    """Run `rectify WORDS`; it must end with exit code 2 and one line that names each of `named`.

    The line is the last one of standard error; if `alone`, it is the only one. Returns the line.
    """
    capfd.readouterr()
    code = run_command(*words)
    err = capfd.readouterr().err
    assert code == 2, f"exit {code}: {err}"
    line = refused_line(err)
    assert err.rstrip().endswith(line), err
    if alone:
        assert err == f"{PREFIX}{line}\n", err
    assert_names(line, named)
    return line
