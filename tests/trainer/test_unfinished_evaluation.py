"""An evaluation that was broken off goes on with the chunks that it lacks."""

import pytest

from data.files import read_json
from tests.helpers.commands import run_command, succeed
from tests.helpers.refusals import assert_refused
from trainer.jobs import evaluate

WORDS = (
    *("evaluate", "--run", "runs/demo/student", "--images", "runs/demo/images"),
    *("--samples", "100", "--steps", "[1,2]"),
)
CHUNKS = 6  # three for each number of steps


class Breaking:
    """Measures chunks, and breaks off after a number of them."""

    def __init__(self):
        self.measure = evaluate.measure_chunk
        self.count = 0
        self.limit = CHUNKS

    def __call__(self, *arguments):
        if self.count == self.limit:
            raise ValueError("broken off")
        self.count += 1
        return self.measure(*arguments)


@pytest.fixture
def measured(workspace, monkeypatch):
    """Return the count of measured chunks, which are small."""
    monkeypatch.chdir(workspace.path)
    breaking = Breaking()
    monkeypatch.setattr(evaluate, "SAMPLE_CHUNK", 40)
    monkeypatch.setattr(evaluate, "TRAJECTORY_COUNT", 10)
    monkeypatch.setattr(evaluate, "measure_chunk", breaking)
    return breaking


def read_figures(out):
    """Return the figures of an evaluation, without the time that it took; nothing else is left."""
    assert not list(out.glob(".*"))
    figures = read_json(out / "evaluation.json")
    del figures["seconds"]
    return figures


@pytest.mark.slow
def test_it_goes_on_beside_another_one(measured, tmp_path):
    words = (*WORDS, "--out", tmp_path)
    leased = (*words, "--lease", "5")

    # It is broken off, and another one in the folder begins anew.
    measured.limit = 2
    assert run_command(*leased) == 2
    measured.limit = CHUNKS
    measured.count = 0
    succeed(*words, "--seed", "3")
    assert measured.count == CHUNKS
    assert read_json(tmp_path / "evaluation.json")["settings"]["seed"] == 3

    # It goes on, and replaces the other's results. Then a process that comes late does nothing.
    measured.count = 0
    succeed(*leased)
    assert measured.count == CHUNKS - 2
    found = read_figures(tmp_path)
    succeed(*leased)
    assert measured.count == CHUNKS - 2

    # Without a lease the same is measured again.
    measured.count = 0
    succeed(*words)
    assert measured.count == CHUNKS
    assert read_figures(tmp_path) == found


def test_a_lease_is_a_duration_that_makes_sense(workspace, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(workspace.path)
    for lease in ("-1", "0.01", "1e9"):
        words = (*WORDS, "--out", tmp_path / "out", "--lease", lease)
        assert_refused(capfd, words, "lease", "0.1", alone=True)
    assert not (tmp_path / "out").exists()
