"""The field's claims: their pipeline, every method that it trains, and the page of results."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.files import read_json, write_json
from deploy.pipeline import command, stage_verb
from deploy.report.claims import gather, markdown
from deploy.report.costs import Costs
from deploy.run import run
from tests.helpers.commands import REPOSITORY, run_command, succeed
from tests.helpers.pipelines import read_stages
from tests.helpers.refusals import assert_refused
from trainer.toy import benchmark, train

PIPELINE = REPOSITORY / "configs/claims/pipeline.yaml"
CLAIMS = yaml.safe_load((REPOSITORY / "configs/claims/claims.yaml").read_text())["claims"]
STAGES = read_stages(PIPELINE)
SEEDS = {"0", "1", "2"}


def measured_paths() -> set[str]:
    """Return METHOD/SEED/AT of every evaluation of the pipeline."""
    outs = [stage["evaluate"]["out"] for stage in STAGES if "evaluate" in stage]
    return {out.split("/evaluation/")[1] for out in outs}


@pytest.mark.parametrize("name", CLAIMS)
def test_every_method_of_a_claim_is_trained_and_measured(name):
    claim = CLAIMS[name]
    wanted = {f"{method}/0/last" for method in (claim["teacher"], *claim["methods"])}
    assert wanted <= measured_paths()


@pytest.mark.parametrize(
    "methods",
    [*(CLAIMS[name]["methods"] for name in "abg"), ["best", "regression", "distribution"]],
    ids=["claim a", "claim b", "claim g", "recommendation"],
)
def test_the_main_methods_have_three_seeds(methods):
    wanted = {f"{method}/{seed}/last" for method in methods for seed in SEEDS}
    assert wanted <= measured_paths()


@pytest.mark.slow
def test_the_smoke_run_tries_every_claim(workspace, tmp_path, monkeypatch, inside):
    """The stages run in this process; then every other run of seed 0, so that each config runs."""
    monkeypatch.chdir(workspace.path)
    monkeypatch.setattr(train, "PAIRS", 256)
    out = tmp_path / "claims"
    (out / "images").mkdir(parents=True)
    classifier = workspace.path / "runs/demo/images/classifier.safetensors"
    (out / "images/classifier.safetensors").hardlink_to(classifier)
    run(PIPELINE, out, smoke=True)

    # The page has a section for every claim, and lists what the smoke run leaves out.
    text = (out / "results.md").read_text()
    results = read_json(out / "results.json")
    for name, claim in CLAIMS.items():
        assert f"## {name}. {claim['title']}" in text
    assert {row["claim"] for row in results["rows"]} >= set("abcef")
    assert results["missing"]
    assert all(method in text for method in results["missing"])
    assert (out / "results.png").stat().st_size > 10_000

    # It has the figures of the toy data.
    assert benchmark.markdown(results["plane"]) in text
    assert results["plane"] == read_json(out / "plane/plane.json")
    assert len(results["plane"]["rows"]) == 2 * len(benchmark.PARAMETRISATIONS)

    # Runs of seed 0 that the smoke run left out.
    for stage in STAGES:
        if stage_verb(stage) not in ("fit", "collect"):
            continue
        words = command(stage, out, smoke=True)
        folder = Path(words[words.index("--out") + 1])
        if folder.name in ("1", "2") or folder.exists():
            continue
        assert run_command(*words) == 0, stage["name"]


def write_evaluation(
    out: Path, method: str, seed: str, at: str, fds: dict[int, float], run: Path
) -> None:
    """Write an evaluation as `rectify evaluate` does, with these FDs by number of steps."""
    path = out / "evaluation" / method / seed / at / "evaluation.json"
    path.parent.mkdir(parents=True)
    measured = {"nfe": 1, "recall": 0.5, "precision": 0.5, "accuracy": 0.9}
    evaluation = {
        "steps": {str(steps): {**measured, "fd": fd} for steps, fd in fds.items()},
        "settings": {"samples": 2000, "guidance": 1.0, "seed": 2, "sampler": "DDIM"},
        "first_orderness": 0.1,
        "straightness": 0.2,
        "floors": {"autoencoder": 0.0, "bootstrap": 0.1},
        "classifier_accuracy_heldout": 1.0,
        "reference": "0" * 64,
        "run": str(run),
    }
    write_json(path, evaluation)


def write_run(out: Path, name: str, evaluations: int, *inputs: str) -> None:
    """Write what `results` reads about a run: its log, its batch, the record of its stage."""
    folder = out / name
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "seconds": 1.0, "loss": 1.0, "evaluations": evaluations * step // 100}
        for step in (50, 100)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("data: {batch: 10}\n")
    words = ["fit", "--out", str(folder)]
    for path in inputs:
        words += ["--model.initial", str(out / path)]
    write_json(
        out / "stages" / f"00-{name.replace('/', '-')}.json", {"words": words, "seconds": 1.0}
    )


@pytest.fixture
def pipeline(tmp_path):
    """Return a pipeline's folder: teacher, pairs, a student of three seeds, and its own student."""
    out = tmp_path / "runs"
    (out / "stages").mkdir(parents=True)
    write_run(out, "teacher/0", 1000)
    write_evaluation(out, "teacher", "0", "last", {1: 9.0, 32: 2.0}, out / "teacher/0")

    (out / "pairs").mkdir()
    write_json(out / "pairs/manifest.json", {"kind": "pairs", "evaluations": 300})
    words = ["collect", "--teacher", str(out / "teacher/0"), "--out", str(out / "pairs")]
    write_json(out / "stages/00-pairs.json", {"words": words, "seconds": 1.0})

    for seed in ("0", "1", "2"):
        run = out / "student" / seed
        halfway = run / "checkpoints/step=000000050.ckpt"
        write_run(out, f"student/{seed}", 500, "teacher/0", "pairs")
        write_evaluation(out, "student", seed, "last", {1: 2.0 + int(seed), 4: 1.0}, run)
        write_evaluation(out, "student", seed, "50", {1: 4.0}, halfway)

    write_run(out, "second/0", 200, "student/0", "teacher/0")
    write_evaluation(out, "second", "0", "last", {1: 2.2, 4: 2.0}, out / "second/0")
    return out


def a_claim(**changes: Any) -> dict[str, Any]:
    """Return a claim about the methods of the fixture `pipeline`."""
    claim = {
        "title": "t",
        "teacher": "teacher",
        "methods": ["student", "second"],
        "steps": [1, 4],
        "trained": True,
    }
    return {**claim, **changes}


def test_costs_are_those_of_everything_a_run_was_made_from_but_teachers(pipeline):
    costs = Costs(pipeline)
    assert costs.inputs("second/0") == {"student/0", "teacher/0", "pairs"}
    assert costs.total("teacher/0") == 1000
    assert costs.total("student/1") == 800
    assert costs.total("second/0") == 1000


def test_costs_until_a_step_are_smaller(pipeline):
    costs = Costs(pipeline)
    assert costs.total("student/0", 50) == 550
    assert costs.direct("student/0") == 500


def test_costs_of_a_moved_pipeline_are_the_same(pipeline):
    moved = pipeline.rename(pipeline.with_name("moved"))
    assert Costs(moved).total("second/0") == 1000


def test_pairs_of_a_teacher_from_elsewhere_cost_the_same(pipeline):
    words = ["collect", "--teacher", "away", "--out", str(pipeline / "pairs")]
    write_json(pipeline / "stages/00-pairs.json", {"words": words, "seconds": 1.0})
    assert Costs(pipeline).total("student/0") == 800


def test_results_hold_every_seeds_measures_and_costs(pipeline):
    rows = gather(pipeline, {"x": a_claim(passes=["second"], reach=1.6)})["rows"]
    assert len(rows) == 5, "four steps were not measured at the middle"
    found = [row for row in rows if (row["method"], row["steps"]) == ("student", 1)]
    last = next(row for row in found if row["trained"] == 1000)
    assert last["fd"] == {"0": 2.0, "1": 3.0, "2": 4.0}
    assert last["evaluations"] == 800
    assert last["claim"] == "x"


def test_a_claim_may_name_its_seeds(pipeline):
    rows = gather(pipeline, {"x": a_claim(seeds=["0"])})["rows"]
    assert all(row["fd"].keys() == {"0"} for row in rows)


def assert_line(text: str, *parts: str) -> None:
    """Assert that one line of a text contains all parts."""
    lines = [line for line in text.splitlines() if all(part in line for part in parts)]
    assert lines, f"no line with {parts} in\n{text}"


def test_the_page_has_medians_over_seeds_and_relative_costs(pipeline):
    claim = a_claim(passes=["second"], reach=1.6)
    text = markdown("x", claim, gather(pipeline, {"x": claim}))
    last = "| student | 1,000 | 800 (0.80) | 3.00 (2.00 to 4.00) | 1.00 | 0.900 | 0.1 | 0.2 |"
    assert last in text
    assert "| student | 500 | 550 (0.55) | 4.00 |  | 0.900 |" in text
    assert_line(text, "FD 2.00", "accuracy 0.900")


def test_the_page_counts_samples_until_a_method_is_passed(pipeline):
    claim = a_claim(passes=["second"], reach=1.6)
    text = markdown("x", claim, gather(pipeline, {"x": claim}))
    assert_line(text, "student in 1 step", "second", "FD 2.20", "never")
    assert_line(text, "student in 4 steps", "second", "FD 2.00", "1,000 samples (100%)")


def test_the_page_has_the_costs_of_what_is_reached(pipeline):
    claim = a_claim(passes=["second"], reach=1.6)
    text = markdown("x", claim, gather(pipeline, {"x": claim}))
    assert_line(text, "- student", "800 (0.80)", "1.50")
    assert_line(text, "- second", "1,000 (1.00)", "1.10")


FLAT = {
    "straightness": {"0": 0.5},
    "first_orderness": {"0": 0.25},
    "parametrisation": "Linear + Velocity",
}
BEFORE = {
    **FLAT,
    "when": "before",
    "evaluations": {"0": 100},
    "energy": {"1": {"0": 0.75}, "64": {"0": 0.002}},
}
AFTER = {
    **FLAT,
    "when": "after",
    "evaluations": {"0": 250},
    "energy": {"1": {"0": 0.003}, "64": {"0": 0.002}},
}
FIGURES = {
    "format": 1,
    "distribution": "two_moons",
    "updates": 1500,
    "samples": 4000,
    "rows": [BEFORE, AFTER],
}


class Page:
    """The page of results of the fixture `pipeline`, and the file of claims behind it."""

    def __init__(self, pipeline: Path, folder: Path):
        self.pipeline = pipeline
        self.claims = folder / "claims.yaml"
        self.out = folder / "results.md"
        self.words = ("report", "claims", "--run", pipeline)
        self.words += ("--claims", self.claims, "--out", self.out)
        self.state(x=a_claim())

    def state(self, **claims: dict[str, Any]) -> None:
        """Write the file of claims."""
        self.claims.write_text(yaml.safe_dump({"claims": claims}))

    def write(self) -> str:
        """Write the page and return its text."""
        succeed(*self.words)
        return self.out.read_text()

    @property
    def results(self) -> dict[str, Any]:
        """The figures beside the page."""
        return read_json(self.out.with_suffix(".json"))


@pytest.fixture
def page(pipeline, tmp_path):
    return Page(pipeline, tmp_path)


@pytest.fixture
def toy_figures(pipeline):
    """Write the figures of the toy data into the pipeline; return their file."""
    path = pipeline / "plane/plane.json"
    write_json(path, FIGURES)
    return path


def test_without_toy_figures_the_page_has_no_section_for_them(page):
    page.write()
    assert "plane" not in page.results
    assert "plane" not in page.out.read_text()


def test_toy_figures_are_a_section_after_the_claims(page, pipeline):
    without = page.write()
    write_json(pipeline / "plane/plane.json", FIGURES)
    text = page.write()
    assert page.results["plane"] == FIGURES
    assert text.startswith(without), "the claims' sections are unchanged"
    assert "| parametrisation | | 1 step | 64 steps | first-order | straight |" in text
    energies = "0.003 (0.003 to 0.003) | 0.002 (0.002 to 0.002)"
    assert f"| Linear + Velocity | after | {energies} | 0.25 (" in text
    assert_line(text, "100 before", "250 after", "(2.50)")


def test_damaged_toy_figures_are_refused(page, toy_figures, capfd):
    rows = [{**AFTER, "energy": {"1": {"0": "much"}}}]
    write_json(toy_figures, {**FIGURES, "rows": rows})
    assert_refused(capfd, page.words, "plane.json", "rows[0]", "energy", "1: 0", "'much'")


def test_toy_figures_that_are_gone_leave_the_page_and_hand_written_text_stays(page, toy_figures):
    text = page.write()
    page.out.write_text(text + "\nWhat I found.\n")
    toy_figures.unlink()
    text = page.write()
    assert text.endswith("\nWhat I found.\n")
    assert "| Linear + Velocity | after |" not in text
    assert "`rectify toy benchmark" in text, "the page names the command that measures them"
    assert "plane" not in page.results


def test_methods_that_were_not_measured_are_listed(page):
    page.state(x=a_claim(methods=["student", "third"]), y=a_claim(teacher="nobody"))
    text = page.write()
    assert page.results["missing"] == ["third", "nobody"]
    assert "third." in text
    assert "nobody." in text


def test_hand_written_headings_stay(page):
    text = page.write().replace("## x. t", "## x. what I found")
    page.out.write_text(text)
    assert page.write() == text


@pytest.mark.parametrize(
    ("claim", "named"),
    [
        ({"title": "t"}, ("methods",)),
        (a_claim(passes=["third"]), ("passes",)),
        (a_claim(steps=[]), ("steps",)),
        (a_claim(reach="x"), ("reach", "'x'")),
        (a_claim(**{"pass": []}), ("`pass`",)),
    ],
    ids=["entry missing", "passes no method", "no steps", "no number", "unknown entry"],
)
def test_a_claim_that_is_none_is_refused(page, capfd, claim, named):
    page.state(x=claim)
    assert_refused(capfd, page.words, "claims.yaml", "x", *named)


def test_claims_without_any_measured_method_are_refused(page, capfd):
    page.state(x=a_claim(teacher="nobody", methods=["third"]))
    assert_refused(capfd, page.words, "evaluation", "METHOD/SEED/AT/evaluation.json")


def test_measures_of_other_settings_are_refused(page, pipeline, capfd):
    path = pipeline / "evaluation/second/0/last/evaluation.json"
    settings = {"samples": 9, "guidance": 1.0, "seed": 2, "sampler": "DDIM"}
    write_json(path, {**read_json(path), "settings": settings})
    assert_refused(
        capfd, page.words, str(pipeline / "evaluation"), "'samples': 9", "'samples': 2000"
    )


@pytest.fixture(scope="module")
def published():
    """Return the published results."""
    return json.loads((REPOSITORY / "docs/results.json").read_text())


def test_the_published_page_is_made_from_the_published_figures(published):
    text = (REPOSITORY / "docs/results.md").read_text()
    assert not published["missing"]
    assert benchmark.markdown(published["plane"]) in text
    for name, claim in CLAIMS.items():
        assert markdown(name, claim, published) in text


def test_the_published_toy_figures_are_complete(published):
    rows = published["plane"]["rows"]
    assert [(row["parametrisation"], row["when"]) for row in rows] == [
        *product(benchmark.PARAMETRISATIONS, benchmark.PHASES)
    ]
    assert all(row["straightness"].keys() == SEEDS for row in rows)


def test_the_published_rows_are_complete(published):
    for row in published["rows"]:
        assert {"claim", "method", "steps", "fd", "evaluations"} <= row.keys()
        assert row["evaluations"] > 0
        if row["claim"] in "ab" and not row["method"].startswith("teacher"):
            assert row["fd"].keys() == SEEDS
