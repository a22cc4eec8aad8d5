"""Damaged files and hostile values: no hang, one error line, no wrong data, no code executed."""

import json
import subprocess
import sys

import pytest

from tests.fuzz.bombs import BOMBS, HARMLESS
from tests.helpers.commands import REPOSITORY


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fuzz(request, tmp_path, chronicle):
    """30 seeded cases (500 with --long) and all planted bombs.

    `python -m tests.fuzz.campaign DIR SEED 1` repeats one case.
    """
    count = 500 if request.config.getoption("--long") else 30
    words = ("-m", "tests.fuzz.campaign", str(tmp_path / "fuzz"), "0", str(count))
    ended = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]

    summary = json.loads(ended.stdout.splitlines()[-1])
    failures = summary["failures"]
    cases = f"seeds 0 to {count - 1} and {len(BOMBS | HARMLESS)} planted bombs"
    chronicle(f"fuzz: {cases}, {summary['seconds']} s: {len(failures)} failures")
    assert not failures, "\n\n".join(failures)
