"""A pipeline as a graph: which stages need which, and what runs when."""

import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.files import read_json
from deploy.pipeline import load
from tests.helpers.commands import run_command
from tests.helpers.pipelines import FakeCommands, write_pipeline
from tests.helpers.refusals import assert_refused, refused


def stage(name: str, *needs: str, **more: Any) -> dict[str, Any]:
    """Return a stage that packs into a folder of its name, after those that it needs."""
    return {"name": name, "pack": {"out": f"{{out}}/{name}"}, "needs": list(needs), **more}


def without_needs(name: str, **more: Any) -> dict[str, Any]:
    """Return a stage that does not say what it needs."""
    return {"name": name, "pack": {"out": f"{{out}}/{name}"}, **more}


def needs_of(folder: Path, *stages: dict[str, Any], smoke: bool = False) -> dict[str, list[str]]:
    """Return what each stage of a pipeline needs."""
    pipeline = load(write_pipeline(folder / "x.yaml", list(stages)), smoke)
    return {one.name: one.needs for one in pipeline.stages}


LOOP = {"for": {"seed": [0, 1]}}


def test_a_stage_needs_the_one_before_it_by_default(tmp_path):
    found = needs_of(tmp_path, *map(without_needs, "abc"))
    assert found == {"a": [], "b": ["a"], "c": ["b"]}


def test_the_stages_of_a_loop_need_all_of_the_one_before_but_not_each_other(tmp_path):
    loops = [without_needs(f"{name}-{{seed}}", **LOOP) for name in "ab"]
    found = needs_of(tmp_path, *loops, without_needs("c"))
    assert found == {
        **{"a-0": [], "a-1": []},
        **{"b-0": ["a-0", "a-1"], "b-1": ["a-0", "a-1"]},
        "c": ["b-0", "b-1"],
    }


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ([], []),
        ("a-1", ["a-1"]),
        (["a-{seed}"], ["a-0", "a-1"]),
        (["a-0", "a-{seed}", "a-0"], ["a-0", "a-1"]),
    ],
    ids=["nothing", "one word", "a whole loop", "one twice"],
)
def test_needs_are_names_of_stages_or_of_whole_loops(tmp_path, needs, expected):
    stages = [stage("a-{seed}", **LOOP), stage("b") | {"needs": needs}]
    assert needs_of(tmp_path, *stages)["b"] == expected


def test_a_value_of_a_loop_may_be_in_needs(tmp_path):
    found = needs_of(tmp_path, stage("a-{seed}", **LOOP), stage("b-{seed}", "a-{seed}", **LOOP))
    assert (found["b-0"], found["b-1"]) == (["a-0"], ["a-1"])


def test_a_smoke_run_needs_no_stage_that_it_leaves_out(tmp_path):
    stages = (stage("a-{seed}", **LOOP), stage("b", "a-0", "a-1"), stage("c", "a-{seed}"))
    assert needs_of(tmp_path, *stages, smoke=True) == {"a-0": [], "b": ["a-0"], "c": ["a-0"]}
    with refused("x.yaml", "stage d", "'a-2'"):
        needs_of(tmp_path, *stages, stage("d", "a-2"), smoke=True)


@pytest.mark.parametrize(
    ("needs", "named"),
    [
        ({"a": ["a"]}, "a -> a"),
        ({"a": ["b"], "b": ["a"]}, "a -> b -> a"),
        ({"a": ["b"], "b": ["c", "a"], "c": ["b"]}, "a -> b -> a"),
        ({"a": [], "b": ["a", "d"], "c": ["b"], "d": ["c"]}, "b -> d -> c -> b"),
    ],
    ids=["itself", "two", "a cycle beside another", "beginning later"],
)
def test_a_cycle_is_shown(tmp_path, capfd, needs, named):
    config = write_pipeline(tmp_path / "x.yaml", [stage(*pair) for pair in unpack(needs)])
    assert_refused(capfd, ("run", config), config, named, alone=True)
    assert not (tmp_path / "out").exists()


def unpack(needs: dict[str, list[str]]) -> list[tuple[str, ...]]:
    """Return a name and what it needs, for each stage."""
    return [(name, *needed) for name, needed in needs.items()]


@pytest.mark.parametrize("needs", ["teachr", ["teacher", "teachr"]], ids=["word", "list"])
def test_a_need_of_nothing_is_refused_with_the_nearest_name(tmp_path, capfd, needs):
    stages = [stage("teacher"), stage("student") | {"needs": needs}]
    config = write_pipeline(tmp_path / "x.yaml", stages)
    named = (config, "stage student", "'teachr'", "teacher")
    assert_refused(capfd, ("run", config), *named, alone=True)


@pytest.mark.parametrize("needs", [3, [3], {"a": 1}, ["../a"], None], ids=str)
def test_needs_of_another_kind_are_refused(tmp_path, capfd, needs):
    config = write_pipeline(tmp_path / "x.yaml", [stage("a"), stage("b") | {"needs": needs}])
    assert_refused(capfd, ("run", config), config, "stage b", "needs", alone=True)


@pytest.mark.parametrize(
    "options",
    [
        {"images": "{out}/a"},
        {"images": "{out}/a/train"},
        {"images": ["elsewhere", "{out}/a/0.tar"]},
        {"images": {"init_args": {"path": "{out}/a"}}},
        {"config": ["base.yaml", "{out}/a/config.yaml"]},
    ],
    ids=["folder", "inside it", "list", "mapping", "configuration"],
)
def test_a_stage_that_reads_what_it_does_not_need_is_refused(tmp_path, capfd, options):
    reader = {"name": "b", "pack": {"out": "{out}/b", **options}, "needs": []}
    config = write_pipeline(tmp_path / "x.yaml", [stage("a"), reader])
    option = next(iter(options))
    assert_refused(capfd, ("run", config), config, "stage b", option, "stage a", "needs")
    reader["needs"] = ["c"]
    indirectly = [stage("a"), stage("c", "a"), reader]
    assert len(load(write_pipeline(tmp_path / "x.yaml", indirectly)).stages) == 3


# What runs.


@pytest.fixture
def commands(monkeypatch) -> FakeCommands:
    """Replace the commands of stages by one that writes a file into the stage's folder."""
    return FakeCommands(monkeypatch)


DIAMOND = (stage("end", "left", "right"), stage("left", "top"), stage("right", "top"), stage("top"))


def test_stages_run_after_those_that_they_need_whatever_the_files_order(tmp_path, commands, capfd):
    config = write_pipeline(tmp_path / "x.yaml", list(DIAMOND))
    assert run_command("run", config) == 0
    assert commands.begun == ["top", "left", "right", "end"]
    assert run_command("run", config) == 0
    assert len(commands.begun) == 4
    assert capfd.readouterr().err.count(": finished") == 4


def test_independent_stages_run_at_once(tmp_path, commands):
    """Each of the two waits until the other one has begun."""
    meeting = threading.Barrier(2, timeout=10)
    commands.act = {"left": meeting.wait, "right": meeting.wait}
    config = write_pipeline(tmp_path / "x.yaml", list(DIAMOND))
    assert run_command("run", config, "--jobs", 2) == 0
    assert commands.begun[0] == "top"
    assert commands.begun[-1] == "end"


def test_a_stage_begins_as_soon_as_those_that_it_needs_are_done(tmp_path, commands):
    """`left` lasts until `after` has begun, which needs only `right`."""
    begun = threading.Event()
    commands.act = {"left": lambda: begun.wait(10), "after": begun.set}
    stages = [stage("left"), stage("right"), stage("after", "right")]
    assert run_command("run", write_pipeline(tmp_path / "x.yaml", stages), "--jobs", 2) == 0
    assert begun.is_set()


def test_a_failing_stage_lets_a_running_one_end_and_begins_no_other(tmp_path, commands, capfd):
    meeting = threading.Barrier(2, timeout=10)
    commands.act = {"left": meeting.wait, "right": meeting.wait}
    commands.codes = {"left": 3}
    config = write_pipeline(tmp_path / "x.yaml", list(DIAMOND))
    with pytest.raises(SystemExit, match="3"):
        run_command("run", config, "--jobs", 2)
    assert sorted(commands.begun) == ["left", "right", "top"]
    assert "left: failed" in capfd.readouterr().err
    names = [path.name for path in sorted((tmp_path / "out/stages").glob("*.json"))]
    assert names == ["03-right.json", "04-top.json"]

    # The mended pipeline goes on.
    commands.codes = {}
    commands.act = {}
    assert run_command("run", config, "--jobs", 2) == 0
    assert commands.begun[3:] == ["left", "end"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--to", "left"), ["top", "left"]),
        (("--from", "top", "--to", "right"), ["top", "right"]),
        (("--to=top",), ["top"]),
    ],
)
def test_a_part_of_a_pipeline(tmp_path, commands, words, expected):
    config = write_pipeline(tmp_path / "x.yaml", list(DIAMOND))
    assert run_command("run", config, *words) == 0
    assert commands.begun == expected


def test_a_part_needs_what_is_before_it(tmp_path, commands, capfd):
    config = write_pipeline(tmp_path / "x.yaml", list(DIAMOND))
    named = ("--from left", "stage top", "not finished")
    assert_refused(capfd, ("run", config, "--from", "left"), *named, alone=True)
    assert run_command("run", config, "--to", "top") == 0
    named = ("--from left", "stage right", "not finished")
    assert_refused(capfd, ("run", config, "--from", "left"), *named, alone=True)
    assert run_command("run", config, "--from", "right", "--to", "right") == 0
    assert run_command("run", config, "--from", "left") == 0
    assert commands.begun == ["top", "right", "left", "end"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--from", "lft"), ("--from lft", "left")),
        (("--to", "x"), ("--to x", "end", "left", "right", "top")),
        (("--from", "left", "--to", "right"), ("--from left", "--to right")),
        (("--form", "left"), ("`form`", "`from`")),
        (("--dry-runn",), ("dry-runn", "dry_run")),
    ],
)
def test_a_part_that_is_none_is_refused(tmp_path, capfd, words, named):
    config = write_pipeline(tmp_path / "x.yaml", list(DIAMOND))
    assert_refused(capfd, ("run", config, *words), *named, alone=True)


@pytest.mark.parametrize("option", ["--dry-run", "--dry_run", "--dry-run=true"])
def test_a_dry_run_shows_what_would_run_and_changes_nothing(tmp_path, commands, capfd, option):
    config = write_pipeline(tmp_path / "x.yaml", list(DIAMOND))
    assert run_command("run", config, option) == 0
    assert not (tmp_path / "out").exists()
    assert run_command("run", config, "--to", "left") == 0
    before = snapshot(tmp_path / "out")
    capfd.readouterr()

    assert run_command("run", config, option) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.partition("; ")[0] for line in lines] == [
        *("[4/4] top: finished", "[2/4] left: finished"),
        *("[3/4] right: runs", "[1/4] end: runs"),
    ]
    assert lines[0].endswith("it took 0:00:00")
    assert snapshot(tmp_path / "out") == before
    assert commands.begun == ["top", "left"]


def snapshot(folder: Path) -> dict[Path, int]:
    """Return the files in a folder, with their times."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_pipelines_folder_has_its_graph(tmp_path, commands):
    config = write_pipeline(tmp_path / "x.yaml", list(DIAMOND))
    assert run_command("run", config) == 0
    found = {one["name"]: one["needs"] for one in read_json(tmp_path / "out/graph.json")["stages"]}
    assert found == {"end": ["left", "right"], "left": ["top"], "right": ["top"], "top": []}


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"wandb": {"api_key": "x1y2z3"}}, "api_key"),
        ({"logger.init_args.access_token": "x1y2z3"}, "access_token"),
        ({"HF_TOKEN": "x1y2z3"}, "HF_TOKEN"),
        ({"password": 123456}, "password"),
        ({"callbacks": [{"init_args": {"secret": "x1y2z3"}}]}, "secret"),
        ({"options": ["--export=WANDB_API_KEY=x1y2z3,HOME=/root"]}, "WANDB_API_KEY"),
        ({"words": "--api_key=x1y2z3"}, "api_key"),
    ],
    ids=lambda part: str(part)[:20],
)
@pytest.mark.parametrize("where", ["options", "smoke", "resources", "pipeline"])
def test_a_secret_by_value_is_refused_and_not_printed(tmp_path, capfd, part, named, where):
    one = stage("a")
    more = {}
    if where == "options":
        one["pack"] |= part
    elif where == "pipeline":
        more = {"resources": {"engines": {"slurm": part}}}
    else:
        one[where] = part
    config = write_pipeline(tmp_path / "x.yaml", [one], **more)
    line = assert_refused(capfd, ("run", config), config, named, "resources.environment")
    assert "x1y2z3" not in line
    assert "123456" not in line


def test_words_that_only_resemble_secrets_are_none(tmp_path):
    options = {"max_tokens": 77, "tokenizer": "x", "key": "png", "a": "secret=", "password": ""}
    one = {"name": "a", "pack": {"out": "{out}/a", **options}}
    assert len(load(write_pipeline(tmp_path / "x.yaml", [one])).stages) == 1


def test_a_stage_of_several_verbs_is_refused(tmp_path, capfd):
    config = tmp_path / "x.yaml"
    config.write_text(yaml.safe_dump({"out": "x", "stages": [stage("a") | {"fit": {}}]}))
    assert_refused(capfd, ("run", config), config, "one verb", alone=True)
