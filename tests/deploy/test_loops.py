"""Loops over a pipeline's stages."""

import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from data.files import read_json
from deploy.pipeline import command, load, unroll
from deploy.run import run
from tests.helpers.commands import REPOSITORY
from tests.helpers.pipelines import write_pipeline
from tests.helpers.refusals import refused

VARIANTS = {
    "flow": None,
    "vp": {"model.denoiser.interpolant": "VariancePreserving", "of": "{seed}"},
}
STAGE = {
    "name": "fit-{form}-{seed}",
    "for": {"seed": [0, 1], "form": VARIANTS},
    "fit": {
        "config": "{form}.yaml",
        "out": "{out}/{form}/{seed}",
        "parts": ["{seed}", 7, {"of": "{form}"}],
    },
    "smoke": {"steps": "{seed}"},
}


def test_the_last_loop_changes_fastest():
    stages = unroll(STAGE)
    names = [stage["name"] for stage in stages]
    assert names == ["fit-flow-0", "fit-vp-0", "fit-flow-1", "fit-vp-1"]
    assert all("for" not in stage for stage in stages)


def test_values_are_substituted_at_every_depth():
    assert unroll(STAGE)[0]["fit"] == {
        "config": "flow.yaml",
        "out": "{out}/flow/0",
        "parts": ["0", 7, {"of": "flow"}],
    }


def test_a_mappings_values_add_options():
    flow, vp = unroll(STAGE)[2:]
    assert vp["fit"].keys() - flow["fit"].keys() == {"model.denoiser.interpolant", "of"}
    assert vp["fit"]["of"] == "1"
    assert "of" not in STAGE["fit"], "the stage itself is not changed"


def test_a_smoke_run_takes_every_loops_first_value(tmp_path):
    (stage,) = unroll(STAGE, smoke=True)
    assert stage["name"] == "fit-flow-0"
    assert command(stage, tmp_path, smoke=True)[-2:] == ["--steps", "0"]


def test_a_verb_of_two_words_is_two_words_of_the_command(tmp_path):
    stage = {"name": "table", "report seeds": {"out": "{out}/x.md"}}
    assert command(stage, tmp_path, smoke=False) == [
        *("report", "seeds"),
        *("--out", f"{tmp_path}/x.md"),
    ]


def test_files_of_a_configuration_come_first_and_win_over_no_option(tmp_path):
    options = {"out": "{out}/x", "config": ["base.yaml", "{out}/more.yaml"], "steps": [1, 2]}
    assert command({"name": "a", "fit": options}, tmp_path, smoke=False) == [
        *("fit", "--config", "base.yaml", "--config", f"{tmp_path}/more.yaml"),
        *("--out", f"{tmp_path}/x", "--steps", "[1, 2]"),
    ]


def test_one_file_of_a_configuration_is_one_word(tmp_path):
    words = command({"name": "a", "fit": {"config": "x.yaml"}}, tmp_path, smoke=False)
    assert words == ["fit", "--config", "x.yaml"]


@pytest.mark.parametrize("smoke", [False, True])
def test_a_stage_without_loops_is_unchanged(smoke):
    stage = {"name": "pack", "pack": {"out": "{out}/x", "size": 3}}
    assert unroll(stage, smoke=smoke) == [stage]


def looped_stages(*sizes: Any) -> list[dict[str, Any]]:
    """Return stages that pack the digits: a loop over sizes, and one more stage after it."""
    return [
        {
            "name": "pack-{size}",
            "for": {"size": list(sizes)},
            "pack": {"out": "{out}/{size}", "size": "{size}"},
        },
        {"name": "last", "pack": {"out": "{out}/8", "size": 8}},
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return config and folder of a pipeline that ran with two jobs, and what it printed."""
    folder = tmp_path_factory.mktemp("loops")
    config = write_pipeline(folder / "x.yaml", looped_stages(8, 9))
    with redirect_stderr(StringIO()) as printed:
        run(config, folder / "out", jobs=2)
    return config, folder / "out", printed.getvalue()


def test_the_stages_of_a_loop_run_at_once(finished):
    """Both stages begin before either ends; the next stage begins after both."""
    _, _, printed = finished
    wanted = ("pack-8: rectify", "pack-9: rectify", "pack-8: done", "last: rectify", "last: done")
    begins = [printed.index(text) for text in wanted]
    assert begins == sorted(begins)


def test_every_stage_of_a_loop_has_a_log_and_a_record(finished):
    _, out, _ = finished
    records = [read_json(path) for path in sorted((out / "stages").glob("*.json"))]
    assert [record["words"][-1] for record in records] == ["8", "9", "8"]
    assert (out / "9/train/manifest.json").exists()
    assert "images" in (out / "stages/pack-8/logs/0001.txt").read_text()


def test_finished_stages_of_a_loop_are_skipped(finished, capfd):
    config, out, _ = finished
    run(config, out, jobs=2)
    err = capfd.readouterr().err
    for name in ("pack-8", "pack-9", "last"):
        assert f"{name}: finished" in err


def test_the_pipelines_file_is_copied_into_the_folder(finished):
    config, out, _ = finished
    assert (out / "pipeline.yaml").read_bytes() == config.read_bytes()


def test_a_refused_pipeline_leaves_the_copy_of_the_one_that_ran(finished, tmp_path):
    config, out, _ = finished
    stages = looped_stages(8, 9)
    stages[1]["pack"]["size"] = 7
    other = write_pipeline(tmp_path / "other.yaml", stages)
    with refused(out, "last", "size", "'7'", "'8'", "--force", "--out"):
        run(other, out)
    assert (out / "pipeline.yaml").read_bytes() == config.read_bytes()


HOLD = """
import sys, time
from pathlib import Path
from deploy.run import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    """Start a process that locks a folder; return it when the folder is locked."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, stdout=PIPE, stderr=PIPE, text=True, cwd=REPOSITORY)
    return process


def test_a_second_run_waits_for_the_first_even_if_that_is_killed(tmp_path):
    first = hold(tmp_path)
    assert first.stdout.readline() == "locked\n"
    second = hold(tmp_path)
    assert "waiting" in second.stderr.readline()
    assert second.poll() is None
    first.kill()
    assert second.stdout.readline() == "locked\n"
    second.kill()
    first.communicate()
    second.communicate()


def test_a_stage_that_fails_ends_the_run(tmp_path, capfd):
    config = write_pipeline(tmp_path / "x.yaml", looped_stages(8, "x"))
    with pytest.raises(SystemExit, match="2"):
        run(config, tmp_path / "out", jobs=2)
    assert "size" in capfd.readouterr().err
    assert not (tmp_path / "out/stages/03-last.json").exists()


def test_a_pipeline_without_jobs_is_refused(tmp_path):
    config = write_pipeline(tmp_path / "x.yaml", looped_stages(8))
    with refused("jobs", 0):
        run(config, tmp_path / "out", jobs=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"for": ["a"]}, ("fit-{form}-{seed}", "for")),
        ({"for": {"seed": 3}}, ("for: seed", 3)),
        ({"for": {"seed": ["../away"]}}, ("for: seed",)),
        ({"for": {"form": {"flow": 3}}}, ("for: form",)),
        ({"for": {"seed": [0, 1]}, "name": "fit"}, ("name", "'fit'")),
    ],
    ids=["list", "number", "path", "options are a number", "one name for two stages"],
)
def test_a_bad_loop_is_refused(tmp_path, change, named):
    config = write_pipeline(tmp_path / "pipeline.yaml", [{**STAGE, **change}])
    with refused("pipeline.yaml", *named):
        load(config)
