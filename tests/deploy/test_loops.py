"""Loops of a pipeline's stages."""

import pytest
import yaml

from data.files import read_json
from deploy.run import command, load, run, unrolled

STAGE = {
    "name": "fit-{form}-{seed}",
    "for": {"seed": [0, 1], "form": {"flow": None, "vp": {"model.denoiser.interpolant": "VariancePreserving", "of": "{seed}"}}},
    "fit": {"config": "{form}.yaml", "out": "{out}/{form}/{seed}", "parts": ["{seed}", 7, {"of": "{form}"}]},
    "quick": {"steps": "{seed}"},
}


def test_a_loop_is_the_product_of_its_values_the_last_one_fastest():
    stages = unrolled(STAGE)
    assert [stage["name"] for stage in stages] == ["fit-flow-0", "fit-vp-0", "fit-flow-1", "fit-vp-1"]
    assert all("for" not in stage for stage in stages)
    assert stages[0]["fit"] == {"config": "flow.yaml", "out": "{out}/flow/0", "parts": ["0", 7, {"of": "flow"}]}


def test_a_mappings_values_bring_options_of_their_own():
    flow, vp = unrolled(STAGE)[2:]
    assert vp["fit"].keys() - flow["fit"].keys() == {"model.denoiser.interpolant", "of"} and vp["fit"]["of"] == "1"
    assert "of" not in STAGE["fit"], "the stage itself is not changed"


def test_quick_takes_every_loops_first_value(tmp_path):
    (stage,) = unrolled(STAGE, quick=True)
    assert stage["name"] == "fit-flow-0" and command(stage, tmp_path, quick=True)[-2:] == ["--steps", "0"]


def test_a_stage_without_loops_is_itself():
    stage = {"name": "pack", "pack": {"out": "{out}/x", "size": 3}}
    assert unrolled(stage) == unrolled(stage, quick=True) == [stage]


def test_the_stages_of_a_loop_run_at_once(tmp_path, capfd):
    """As many as `jobs` says, each with a log of its own, the loops one after another; a stage that fails ends the run."""
    looped = {"name": "pack-{size}", "for": {"size": [8, 9]}, "pack": {"out": "{out}/{size}", "size": "{size}"}}
    stages, config, out = [looped, {"name": "last", "pack": {"out": "{out}/8", "size": 8}}], tmp_path / "x.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump({"out": "x", "stages": stages}))
    for _ in range(2):
        run(config, out, jobs=2)
    said = capfd.readouterr().err
    assert "pack-8: done" in said and "last: done" in said and "pack-9: finished" in said
    began = [said.index(text) for text in ("pack-8: rectify", "pack-9: rectify", "pack-8: done", "last: rectify")]
    assert began == sorted(began), "both of the loop begin before one is done"
    records = [read_json(path) for path in sorted((out / "stages").glob("*.json"))]
    assert [record["words"][-1] for record in records] == ["8", "9", "8"] and (out / "9/train/manifest.json").exists()
    assert "images" in (out / "stages/01-pack-8.log").read_text()
    looped["for"]["size"] = [8, "x"]
    config.write_text(yaml.safe_dump({"out": "x", "stages": stages}))
    with pytest.raises(SystemExit, match="2"):
        run(config, tmp_path / "bad", jobs=2)
    assert "size" in capfd.readouterr().err and not (tmp_path / "bad/stages/3-last.json").exists()
    with pytest.raises(ValueError, match="jobs: 0"):
        run(config, tmp_path / "none", jobs=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"for": ["a"]}, "stage fit-{form}-{seed}: for: is"),
        ({"for": {"seed": 3}}, "for: seed: is 3"),
        ({"for": {"seed": ["../away"]}}, "for: seed"),
        ({"for": {"form": {"flow": 3}}}, "for: form"),
        ({"for": {"seed": [0, 1]}, "name": "fit"}, "'fit' is there twice"),
    ],
)
def test_a_loop_that_is_none_is_named(tmp_path, change, said):
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"out": "x", "stages": [{**STAGE, **change}]}))
    with pytest.raises(ValueError, match="pipeline.yaml: ") as refused:
        load(tmp_path / "pipeline.yaml")
    assert said in str(refused.value)
