"""Loops of a pipeline's stages."""

import pytest
import yaml

from deploy.run import command, load, unrolled

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
