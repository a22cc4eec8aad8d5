"""A run that nobody disturbed, to compare the others with."""

import pytest

from tests.distributed.runs import fit


@pytest.fixture(scope="session")
def undisturbed_run(workspace, tmp_path_factory):
    """Return the folder of an undisturbed tiny run of 40 steps."""
    out = tmp_path_factory.mktemp("fit") / "run"
    workspace.rectify(*fit(out))
    return out
