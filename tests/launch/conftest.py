"""A cluster of two nodes, and folders to launch from."""

from collections.abc import Iterator

import pytest

from tests.helpers.launched import Launched
from tests.helpers.slurm import SlurmCluster, require_slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster(answer_within=3) as cluster:
        yield cluster


@pytest.fixture
def launched(cluster, tmp_path) -> Iterator[Launched]:
    """Return a folder to launch from; its jobs end with the test."""
    yield Launched(cluster, tmp_path)
    cluster.run("scancel", "--user=root", check=False)
    cluster.wait_until_idle()
