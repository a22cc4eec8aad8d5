"""Users' YAML: no key twice, `~` is the home folder, null stays null."""

from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from deploy.cli import parse_options
from deploy.pipeline import command, load
from deploy.run import run
from deploy.yaml_files import expand_home, read_yaml, yaml_files
from tests.helpers.commands import REPOSITORY, run_command
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.training import QUIET, fit_words, small_config, spec

CONFIG = small_config(
    spec("Plane", distribution="two_moons"),
    net=spec("models.nets.mlp.MLP", width=16, depth=1),
    lr=0.01,
)

# Keys that occur twice, and the lines of both.
TWICE = {
    "top": ("trainer: {max_steps: 1}\nout: x\ntrainer:\n  callbacks: EMA\n", "trainer", 3, 1),
    "nested": ("trainer:\n  max_steps: 1\n  max_steps: 2\n", "max_steps", 3, 2),
    "in a list": ("a:\n  - {x: 1}\n  - {x: 1, y: 2, x: 3}\n", "x", 3, 3),
    "in an alias": ("a: &a\n  x: 1\n  'x': 2\nb: *a\n", "x", 3, 2),
    "quoted": ('"out": x\nout: y\n', "out", 2, 1),
}


@pytest.mark.parametrize("text, key, line, first", TWICE.values(), ids=TWICE)
def test_a_key_that_occurs_twice_is_refused_with_both_lines(tmp_path, text, key, line, first):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with refused(path, f"`{key}`", f"line {line}", f"line {first}"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("number", "value"), [("010", 8), ("-010", -8), ("1:30", 90), ("12:30:00", 45000)]
)
def test_a_number_that_yaml_reads_as_another_is_refused(tmp_path, number, value):
    path = tmp_path / "x.yaml"
    path.write_text(f"a: 1\nb: [{number}]\n")
    with refused(path, "line 2", number, value):
        read_yaml(path)
    path.write_text(f"a: '{number}'\nb: [0, 10, 0.5, 1e-4, 0x10]\nc: 00:01:00:00\n")
    assert read_yaml(path)["a"] == number


@pytest.mark.parametrize("text", ["x: &x [*x]", "x: &x {y: *x}"])
def test_an_alias_inside_its_anchor_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with refused(path, "ircular"):
        read_yaml(path)


def test_a_text_may_begin_with_a_tilde(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("notes: ~10 epochs\n")
    assert list(yaml_files([str(path), "~nobody-here/x.yaml"])) == [path]


@pytest.mark.parametrize("name", ["x.yaml", "x.txt", "x.json"])
@pytest.mark.parametrize("option", ["--config {}", "--config={}", "-c {}"])
def test_a_configuration_has_any_suffix(tmp_path, capfd, name, option):
    path = tmp_path / name
    path.write_text('{"data": {"batch": 8}, "data": {"batch": 9}}')
    words = ("fit", *option.format(path).split(), "--out", tmp_path / "run")
    assert_refused(capfd, words, path, "`data`", "line 1")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", ("None", "mapping")),
        ("- a\n", ("['a']", "mapping")),
        ("data: {seed: 3}\n", ("data.seed", "seed_everything")),
        ("trainer: {default_root_dir: x}\n", ("trainer.default_root_dir", "out")),
    ],
    ids=["empty", "list", "data.seed", "default_root_dir"],
)
def test_a_file_that_the_parser_would_misread_is_refused(tmp_path, capfd, text, named):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    assert_refused(capfd, ("fit", "--config", path, "--out", tmp_path / "run"), path, *named)


@pytest.mark.parametrize("value", [3, None, [{"every": 1}]], ids=str)
def test_a_group_of_options_is_a_mapping(tmp_path, capfd, value):
    assert_refused(capfd, fit_words({**CONFIG, "metrics": value}, tmp_path / "run"), "metrics is")


def test_a_merged_entry_may_be_replaced(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\nc:\n  <<: *a\n")
    assert read_yaml(path)["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize("verb", ["fit", "run"])
def test_no_command_reads_a_file_with_a_key_twice(tmp_path, capfd, verb):
    path = tmp_path / "x.yaml"
    path.write_text("out: x\nstages: []\nout: y\n")
    words = ("fit", "--config", path) if verb == "fit" else ("run", path)
    assert_refused(capfd, words, path, "`out`", "line 3", "line 1")


def test_a_file_that_a_configuration_names_is_checked_too(tmp_path, capfd):
    (tmp_path / "model.yaml").write_text("class_path: Generator\nclass_path: Generator\n")
    (tmp_path / "x.yaml").write_text(f"model: {tmp_path}/model.yaml\n")
    assert_refused(capfd, ("fit", "--config", tmp_path / "x.yaml"), "model.yaml", "`class_path`")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Return a home folder; the current folder is another one, which must stay empty."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_the_home_folder_is_expanded_at_every_depth(home):
    value = Namespace(a=["~/x", {"b": Path("~/y")}], c=Namespace(d="~"), e="a~b", f=3, g=None)
    assert expand_home(value) == Namespace(
        a=[f"{home}/x", {"b": home / "y"}], c=Namespace(d=str(home)), e="a~b", f=3, g=None
    )


@pytest.mark.parametrize("word", [("--out=~/x",), ("--out", "~/x")], ids=["one word", "two words"])
def test_an_option_of_a_verb_may_begin_with_the_home_folder(home, word):
    from data.pack import pack

    assert Path(parse_options("pack", pack, word)["out"]) == home / "x"


@pytest.mark.parametrize("where", ["yaml", "option"])
def test_a_run_in_the_home_folder_is_found_again(home, capfd, where):
    content = {**CONFIG, "trainer": {**CONFIG["trainer"], "max_steps": 1}}
    words = ()
    if where == "yaml":
        content["out"] = "~/run"
    else:
        words = ("--out=~/run",)
    (home / "x.yaml").write_text(yaml.safe_dump(content))
    fit = ("fit", "--config", "~/x.yaml", *words, *QUIET)
    assert run_command(*fit) == 0
    assert (home / "run/checkpoints/step=000000001.ckpt").exists()
    with pytest.raises(SystemExit, match="0"):
        run_command(*fit)
    assert "is finished" in capfd.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_a_pipeline_in_the_home_folder(home, inside):
    stage = {"name": "pack", "pack": {"out": "{out}/images"}}
    (home / "x.yaml").write_text(yaml.safe_dump({"out": "~/results", "stages": [stage]}))
    pipeline = load(home / "x.yaml")
    assert pipeline.out == home / "results"
    run(home / "x.yaml")
    assert (home / "results/images/train/manifest.json").exists()
    assert not list(Path.cwd().iterdir())


def test_values_of_a_pipeline_are_words_that_mean_the_same(tmp_path):
    options = {
        "a": None,
        "b": [1, None, True],
        "c": {"d": None},
        "e": ["x", "y z"],
        "f": True,
        "g": 1.5,
    }
    words = command({"name": "a", "fit": options}, tmp_path, smoke=False)
    values = dict(zip(words[1::2], words[2::2]))
    assert values["--a"] == "null"
    assert {name: yaml.safe_load(word) for name, word in values.items()} == {
        f"--{name}": value for name, value in options.items()
    }


def test_a_file_that_changes_a_base_is_refused_without_it(capfd):
    overlay = REPOSITORY / "configs/digits/best.yaml"
    assert_refused(capfd, ("fit", "--config", overlay), overlay, "base", "--config base.yaml")


def test_a_file_that_changes_a_base_is_refused_before_it(capfd):
    overlay = REPOSITORY / "configs/digits/best.yaml"
    base = REPOSITORY / "configs/digits/base.yaml"
    assert_refused(capfd, ("fit", "--config", overlay, f"--config={base}"), overlay, "before")


@pytest.mark.parametrize(
    ("file", "key"), [("flows/spline.yaml", "data.source"), ("digits/base.yaml", "out")]
)
def test_what_a_file_alone_does_not_configure_is_named(capfd, file, key):
    words = ("fit", "--config", REPOSITORY / "configs" / file)
    assert_refused(capfd, words, f"`{key}`", "--config base.yaml", f"--{key}")
