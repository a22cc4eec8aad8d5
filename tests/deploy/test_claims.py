"""The field's claims: their pipeline in its quick form, every method that it trains, and what is told of them."""

import json
from itertools import product
from pathlib import Path

import pytest
import yaml

import deploy.run
from data.files import read_json, write_json
from deploy.cli import main
from deploy.run import command, load
from tests.conftest import REPOSITORY
from trainer.picture import forms, train
from trainer.report.claims import gather, markdown
from trainer.report.costs import Costs

PIPELINE, CLAIMS = (REPOSITORY / "configs/claims" / name for name in ("pipeline.yaml", "claims.yaml"))
STAGES = load(PIPELINE)["stages"]


def named():
    return yaml.safe_load(CLAIMS.read_text())["claims"]


def test_every_method_of_a_claim_is_trained_and_evaluated():
    places = {stage["evaluate"]["out"].split("/evaluation/")[1] for stage in STAGES if "evaluate" in stage}
    for claim in named().values():
        for method in (claim["teacher"], *claim["methods"]):
            assert f"{method}/0/last" in places
    for method in sum((named()[claim]["methods"] for claim in "abg"), []) + ["best", "regression", "distribution"]:
        assert {f"{method}/{seed}/last" for seed in range(3)} <= places


def test_the_quick_form_tries_every_claim(workspace, tmp_path, monkeypatch, inside):
    """Its stages in one process; then every other run of seed 0, so that no method's configuration is left untried."""
    monkeypatch.chdir(workspace.path)
    monkeypatch.setattr(train, "PAIRS", 256)
    out = tmp_path / "claims"
    (out / "images").mkdir(parents=True)
    (out / "images/classifier.safetensors").hardlink_to(workspace.path / "runs/demo/images/classifier.safetensors")
    deploy.run.run(PIPELINE, out, quick=True)
    text, found = (out / "results.md").read_text(), read_json(out / "results.json")
    assert all(f"## {name}. {claim['title']}" in text for name, claim in named().items())
    assert {row["claim"] for row in found["rows"]} >= set("abcef") and "Not evaluated yet: " in text
    assert "\n## In the plane\n" in text and forms.markdown(found["plane"]) in text
    assert found["plane"] == read_json(out / "plane/plane.json") and len(found["plane"]["rows"]) == 2 * len(forms.FORMS)
    assert (out / "results.png").stat().st_size > 10_000
    for stage in STAGES:
        verb = next(key for key in stage if key not in deploy.run.APART)
        words = command(stage, out, quick=True)
        if verb in ("fit", "collect") and Path(words[words.index("--out") + 1]).name not in ("1", "2"):
            assert Path(words[words.index("--out") + 1]).exists() or main(words) == 0, stage["name"]


ROW = {"nfe": 1, "recall": 0.5, "precision": 0.5}


def evaluated(out, method, seed, at, fds, run):
    """Write an evaluation of the form that `rectify evaluate` gives, with these distances by steps."""
    path = out / "evaluation" / method / seed / at / "evaluation.json"
    path.parent.mkdir(parents=True)
    steps = {str(n): {**ROW, "fd": fd, "accuracy": 0.9} for n, fd in fds.items()}
    floors = {"autoencoder": 0.0, "bootstrap": 0.1}
    about = {"floors": floors, "classifier_accuracy_heldout": 1.0, "reference": "0" * 64, "run": str(run)}
    settings = {"samples": 2000, "guidance": 1.0, "seed": 2, "sampler": "DDIM"}
    write_json(path, {"steps": steps, "settings": settings, "first_orderness": 0.1, "straightness": 0.2, **about})


def trained(out, place, evaluations, *inputs):
    """Write what a run leaves that `results` reads: its log, its batch, its stage's record."""
    folder = out / place
    folder.mkdir(parents=True)
    lines = [{"step": step, "seconds": 1.0, "loss": 1.0, "evaluations": evaluations * step // 100} for step in (50, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text("data: {batch: 10}\n")
    words = ["fit", "--out", str(folder), *(word for one in inputs for word in ("--model.initial", str(out / one)))]
    write_json(out / "stages" / f"00-{place.replace('/', '-')}.json", {"words": words, "seconds": 1.0})


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline's folder: a teacher, pairs, a student of three seeds and one of that student's first."""
    out = tmp_path / "runs"
    (out / "stages").mkdir(parents=True)
    trained(out, "teacher/0", 1000)
    (out / "pairs").mkdir()
    write_json(out / "pairs/manifest.json", {"kind": "pairs", "evaluations": 300})
    words = ["collect", "--teacher", str(out / "teacher/0"), "--out", str(out / "pairs")]
    write_json(out / "stages/00-pairs.json", {"words": words, "seconds": 1.0})
    evaluated(out, "teacher", "0", "last", {1: 9.0, 32: 2.0}, out / "teacher/0")
    for seed in ("0", "1", "2"):
        trained(out, f"student/{seed}", 500, "teacher/0", "pairs")
        evaluated(out, "student", seed, "last", {1: 2.0 + int(seed), 4: 1.0}, out / "student" / seed)
        evaluated(out, "student", seed, "50", {1: 4.0}, out / "student" / seed / "checkpoints/step=000000050.ckpt")
    trained(out, "second/0", 200, "student/0", "teacher/0")
    evaluated(out, "second", "0", "last", {1: 2.2, 4: 2.0}, out / "second/0")
    return out


def claim(**changes):
    return {"title": "t", "teacher": "teacher", "methods": ["student", "second"], "steps": [1, 4], "trained": True, **changes}


def test_costs_are_those_of_all_that_a_run_was_made_from_but_the_teachers(pipeline):
    costs = Costs(pipeline)
    assert costs.before("second/0") == {"student/0", "teacher/0", "pairs"}
    assert [costs.whole(place) for place in ("teacher/0", "student/1", "second/0")] == [1000, 800, 1000]
    assert costs.whole("student/0", 50) == 550 and costs.own("student/0") == 500
    moved = pipeline.rename(pipeline.with_name("moved"))
    assert Costs(moved).whole("second/0") == 1000
    write_json(
        moved / "stages/00-pairs.json",
        {"words": ["collect", "--teacher", "away", "--out", str(pipeline / "pairs")], "seconds": 1.0},
    )
    assert Costs(moved).whole("student/0") == 800, "pairs of a teacher from elsewhere were drawn all the same"


def test_results_are_medians_over_seeds_with_what_they_cost(pipeline):
    told = {"x": claim(passes=["second"], reach=1.6)}
    found = gather(pipeline, told)
    row = next(row for row in found["rows"] if (row["method"], row["steps"], row["trained"]) == ("student", 1, 1000))
    assert row["fd"] == {"0": 2.0, "1": 3.0, "2": 4.0} and row["evaluations"] == 800 and row["claim"] == "x"
    assert all(row["fd"].keys() == {"0"} for row in gather(pipeline, {"x": claim(seeds=["0"])})["rows"])
    assert len(found["rows"]) == 5, "four steps were not measured at the middle"
    text = markdown("x", told["x"], found)
    assert "| student | 1,000 | 800 (0.80) | 3.00 (2.00 to 4.00) | 1.00 | 0.900 | 0.1 | 0.2 |" in text
    assert "| student | 500 | 550 (0.55) | 4.00 |  | 0.900 |" in text and "FD 2.00, accuracy 0.900" in text
    assert "- student in 1 step: as good as second at its end (FD 2.20) never" in text
    assert "- student in 4 steps: as good as second at its end (FD 2.00) after 1,000 samples (100%)" in text
    assert "- student: 800 (0.80), 1.50 times\n- second: 1,000 (1.00), 1.10 times" in text


FLAT = {"straightness": {"0": 0.5}, "first_orderness": {"0": 0.25}, "form": "Linear + Velocity"}
BEFORE = {**FLAT, "when": "before", "evaluations": {"0": 100}, "energy": {"1": {"0": 0.75}, "64": {"0": 0.002}}}
AFTER = {**FLAT, "when": "after", "evaluations": {"0": 250}, "energy": {"1": {"0": 0.003}, "64": {"0": 0.002}}}
FIGURES = {"format": 1, "law": "two_moons", "updates": 1500, "samples": 4000, "rows": [BEFORE, AFTER]}


def test_the_plane_is_a_section_where_it_was_measured(pipeline, tmp_path, capfd):
    file, out, measured = tmp_path / "claims.yaml", tmp_path / "results.md", pipeline / "plane/plane.json"
    words = ["results", "--run", str(pipeline), "--claims", str(file), "--out", str(out)]
    file.write_text(yaml.safe_dump({"claims": {"x": claim()}}))
    assert main(words) == 0 and "plane" not in out.read_text() + out.with_suffix(".json").read_text()
    without = out.read_text()
    write_json(measured, FIGURES)
    assert main(words) == 0 and read_json(out.with_suffix(".json"))["plane"] == FIGURES
    text = out.read_text()
    assert text.startswith(without) and "\n## In the plane\n" in text, "the claims' parts are what they were"
    assert "| form | | 1 step | 64 steps | first-order | straight |\n|---|---|---|---|---|---|\n" in text
    assert "| Linear + Velocity | after | 0.003 (0.003 to 0.003) | 0.002 (0.002 to 0.002) | 0.25 (" in text
    assert "each seed: 100 before, 250 after, pairs included (2.50)." in text
    out.write_text(text + "\nWhat I found.\n")
    write_json(measured, {**FIGURES, "rows": [{**AFTER, "energy": {"1": {"0": "much"}}}]})
    assert main(words) == 2 and "plane.json: rows[0]: energy: 1: 0: is 'much'" in capfd.readouterr().err
    measured.unlink()
    assert main(words) == 0 and "Not measured yet: `rectify plane" in out.read_text()
    assert out.read_text().endswith("\nWhat I found.\n") and "| form |" not in out.read_text()
    assert "plane" not in read_json(out.with_suffix(".json"))


def test_what_is_missing_is_told_and_what_cannot_be_compared_refused(pipeline, tmp_path, capfd):
    file, out = tmp_path / "claims.yaml", tmp_path / "results.md"
    words = ["results", "--run", str(pipeline), "--claims", str(file), "--out", str(out)]
    file.write_text(yaml.safe_dump({"claims": {"x": claim(methods=["student", "third"]), "y": claim(teacher="nobody")}}))
    assert main(words) == 0
    text = out.read_text()
    assert "Not evaluated yet: third." in text and "Not evaluated yet: nobody." in text
    out.write_text(text.replace("## x. t", "## x. what I found"))
    assert main(words) == 0 and out.read_text() == text.replace("## x. t", "## x. what I found")
    assert read_json(out.with_suffix(".json"))["missing"] == ["third", "nobody"]
    file.write_text("claims: {x: {title: t}}")
    assert main(words) == 2 and "claims.yaml: claims: x: has no entry `methods`" in capfd.readouterr().err
    for wrong, said in [
        ({"passes": ["third"]}, "must name some of its methods"),
        ({"reach": "x"}, "reach: is 'x'"),
        ({"pass": []}, "has an entry `pass`"),
    ]:
        file.write_text(yaml.safe_dump({"claims": {"x": claim(**wrong)}}))
        assert main(words) == 2 and said in capfd.readouterr().err
    file.write_text(yaml.safe_dump({"claims": {"x": claim(teacher="nobody", methods=["third"])}}))
    assert main(words) == 2 and "no METHOD/SEED/AT/evaluation.json" in capfd.readouterr().err
    path = pipeline / "evaluation/second/0/last/evaluation.json"
    write_json(path, {**read_json(path), "settings": {"samples": 9, "guidance": 1.0, "seed": 2, "sampler": "DDIM"}})
    file.write_text(yaml.safe_dump({"claims": {"x": claim()}}))
    assert main(words) == 2 and "cannot be compared" in capfd.readouterr().err


def test_the_published_results_are_those_of_their_figures():
    text, found = ((REPOSITORY / f"docs/results.{kind}").read_text() for kind in ("md", "json"))
    results = json.loads(found)
    assert all(markdown(name, claim, results) in text for name, claim in named().items()) and not results["missing"]
    assert forms.markdown(results["plane"]) in text
    assert [(row["form"], row["when"]) for row in results["plane"]["rows"]] == [*product(forms.FORMS, forms.WHEN)]
    assert all(row["straightness"].keys() == set("012") for row in results["plane"]["rows"])
    for row in results["rows"]:
        assert {"claim", "method", "steps", "fd", "evaluations"} <= row.keys() and row["evaluations"] > 0
        if row["claim"] in "ab" and not row["method"].startswith("teacher"):
            assert row["fd"].keys() == set("012")
