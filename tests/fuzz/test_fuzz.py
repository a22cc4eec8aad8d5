"""Damaged files and hostile values: no hang, one line, no wrong data accepted, no code executed."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.fuzz.bombs import BOMBS, HARMLESS


@pytest.mark.timeout(3600)
def test_fuzz(request, tmp_path, chronicle):
    """30 seeded cases and all planted bombs; with --long, 500 cases. `python -m tests.fuzz.campaign DIR SEED 1` repeats one."""
    count = 500 if request.config.getoption("--long") else 30
    words = [sys.executable, "-m", "tests.fuzz.campaign", str(tmp_path / "fuzz"), "0", str(count)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    verdict = f"{len(found['failures'])} failures"
    chronicle(f"fuzz: seeds 0 to {count - 1} and {len(BOMBS | HARMLESS)} planted bombs, {found['seconds']} s: {verdict}")
    assert not found["failures"], "\n\n".join(found["failures"])
