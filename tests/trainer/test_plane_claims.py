"""The benchmark in the plane: what it measures and counts, what it reuses of an earlier run."""

import json
import math

import pytest

from data.files import read_json, write_json
from data.schema import check_schema
from tests.helpers.refusals import refused
from trainer.metrics.sample_distances import energy_distance
from trainer.metrics.trajectories import first_orderness
from trainer.toy import benchmark, train
from trainer.toy.benchmark import PARAMETRISATIONS

PAIRS = 64
BATCH = 32
FINE = 8
SMALL = {"seeds": 2, "updates": 3, "samples": 50}
ONE_SEED = {**SMALL, "seeds": 1}


@pytest.fixture(autouse=True)
def trainings(monkeypatch):
    """Make pairs, batches and steps few; return the list of the seeds that are trained."""
    monkeypatch.setattr(train, "PAIRS", PAIRS)
    monkeypatch.setattr(train, "BATCH", BATCH)
    monkeypatch.setattr(train, "FLOW_STEPS", FINE)
    monkeypatch.setattr(benchmark, "FLOW_STEPS", FINE)
    seeds = []
    original = train.Rectification

    def recorded(x, interpolant, prediction, updates, seed, show):
        seeds.append(seed)
        return original(x, interpolant, prediction, updates, seed, show)

    monkeypatch.setattr(benchmark, "Rectification", recorded)
    return seeds


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is measured


def test_every_model_is_measured_before_and_after_for_every_seed(tmp_path):
    benchmark.benchmark(tmp_path, **SMALL)
    found = read_json(tmp_path / "plane.json")
    check_schema(found, benchmark.FIGURES, "plane.json")
    expected = [(name, when) for name in PARAMETRISATIONS for when in benchmark.PHASES]
    assert [(row["parametrisation"], row["when"]) for row in found["rows"]] == expected
    for row in found["rows"]:
        assert row["energy"].keys() == {"1", "2", "4", str(FINE)}
        for by_seed in (*row["energy"].values(), row["first_orderness"], row["straightness"]):
            assert by_seed.keys() == {"0", "1"}
            assert all(math.isfinite(value) and value > 0 for value in by_seed.values())


def test_it_prints_the_table_and_one_progress(tmp_path, capsys):
    benchmark.benchmark(tmp_path, **ONE_SEED)
    printed = capsys.readouterr()
    assert benchmark.markdown(read_json(tmp_path / "plane.json")) in printed.out
    assert "4/4 rectifications" in printed.err
    assert "updates/s" not in printed.err


def test_the_cost_counts_training_and_pairs_but_not_measuring(tmp_path):
    """Training: one evaluation for each sample of a batch; pairs: one for each step of each."""
    benchmark.benchmark(tmp_path, **ONE_SEED)
    training = SMALL["updates"] * BATCH
    cost = {"before": training, "after": PAIRS * FINE + training}
    for row in read_json(tmp_path / "plane.json")["rows"]:
        assert row["evaluations"] == {"0": cost[row["when"]]}


def test_a_seed_determines_points_network_and_noise():
    found = benchmark.rectify("VP + Noise", 1, "checkerboard", 3, 50)
    x = benchmark.Plane("checkerboard", seed=2).points
    true = benchmark.Plane("checkerboard", seed=3).points
    model = train.Rectification(x.view(-1, 2, 1, 1), *PARAMETRISATIONS["VP + Noise"], 3, 1)
    eps = model.noise(50, 1)
    for when, denoiser in (("before", model.teacher), ("after", model.student)):
        samples = benchmark.DDIM(2, train.solvable_grid(denoiser, 2))(denoiser, eps)
        order = first_orderness(denoiser, eps, steps=4, times=train.solvable_grid(denoiser, 4))
        assert found[when]["energy"]["2"] == energy_distance(samples.flatten(1), true[:50])
        assert found[when]["first_orderness"] == order


# What is reused


def test_a_finished_run_is_not_repeated(tmp_path, trainings):
    benchmark.benchmark(tmp_path, **SMALL)
    first = read_files(tmp_path)
    assert sorted(trainings) == [0] * 4 + [1] * 4
    assert len(first) == 9
    trainings.clear()
    benchmark.benchmark(tmp_path, **SMALL)
    assert trainings == []
    assert read_files(tmp_path) == first


def test_a_killed_run_makes_only_what_is_missing(tmp_path, trainings):
    benchmark.benchmark(tmp_path, **SMALL)
    first = read_files(tmp_path)
    trainings.clear()
    (tmp_path / "vp-1.json").unlink()
    (tmp_path / "plane.json").unlink()
    benchmark.benchmark(tmp_path, **SMALL)
    assert trainings == [1]
    assert read_files(tmp_path) == first


def test_more_seeds_are_added_to_a_finished_run(tmp_path, trainings):
    benchmark.benchmark(tmp_path, **SMALL)
    first = read_files(tmp_path)
    trainings.clear()
    benchmark.benchmark(tmp_path, **{**SMALL, "seeds": 3})
    assert trainings == [2] * 4
    after = read_files(tmp_path)
    for name in first.keys() - {"plane.json"}:
        assert after[name] == first[name]


# What is refused


@pytest.mark.parametrize("name", ["seeds", "updates", "samples"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(tmp_path, name, value):
    with refused(name, value, 1):
        benchmark.benchmark(tmp_path / "out", **{**SMALL, name: value})
    assert not (tmp_path / "out").exists()


def test_more_samples_than_memory_holds_the_distances_of_are_refused(tmp_path):
    with refused("samples", 10001, 10000):
        benchmark.benchmark(tmp_path, samples=benchmark.MAX_SAMPLES + 1)


def test_an_unknown_data_set_is_refused(tmp_path):
    with refused("distribution", "three_moons", "two_moons"):
        benchmark.benchmark(tmp_path, "three_moons", **SMALL)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"updates": 4}, ("updates", 3, 4)),
        ({"distribution": "checkerboard"}, ("two_moons", "checkerboard")),
    ],
    ids=["updates", "distribution"],
)
def test_results_of_other_settings_are_refused(tmp_path, trainings, changed, named):
    benchmark.benchmark(tmp_path, **ONE_SEED)
    before = read_files(tmp_path)
    trainings.clear()
    with refused("linear-0.json", *named, "--out"):
        benchmark.benchmark(tmp_path, **{**ONE_SEED, **changed})
    assert trainings == []
    assert read_files(tmp_path) == before


def test_a_result_that_is_no_number_is_refused(tmp_path):
    benchmark.benchmark(tmp_path, **ONE_SEED)
    path = tmp_path / "ve-0.json"
    part = read_json(path)
    write_json(path, {**part, "after": {**part["after"], "energy": {"1": None}}})
    with refused("ve-0.json", "after: energy: 1", None):
        benchmark.benchmark(tmp_path, **ONE_SEED)


def test_a_file_that_was_edited_is_refused(tmp_path):
    benchmark.benchmark(tmp_path, **ONE_SEED)
    path = tmp_path / "ve-0.json"
    path.write_text(json.dumps(read_json(path)))
    with refused("ve-0.json", "seal"):
        benchmark.benchmark(tmp_path, **ONE_SEED)
