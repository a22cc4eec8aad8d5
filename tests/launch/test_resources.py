"""What a stage gets from an engine: bad input, secrets, and the scripts that are rendered."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deploy.launch import slurm
from deploy.launch.launch import make_tasks
from deploy.launch.resources import Resources, limit_seconds, parse_resources, read_secrets
from deploy.launch.slurm import Slurm, launcher_words
from deploy.pipeline import load
from tests.helpers.commands import run_command
from tests.helpers.pipelines import write_pipeline
from tests.helpers.refusals import assert_refused

SECRET = "x1y2z3"
OPTIONS: dict[str, dict[str, Any]] = {"collect": {"run": "x"}, "fit": {}, "pack": {}, "report": {}}


def pipeline_of(folder: Path, given: Any, verb: str = "collect", **more: Any) -> Path:
    """Write a pipeline of one stage with these resources."""
    stage = {"name": "one", verb: {**OPTIONS[verb], "out": "{out}/one"}, "resources": given}
    return write_pipeline(folder / "x.yaml", [stage], **more)


@pytest.mark.parametrize(
    ("verb", "resources", "named"),
    [
        ("fit", {"node": 2}, ("`node`", "`nodes`")),
        ("fit", {"zzz": 2}, ("`zzz`", "nodes", "gpus", "environment")),
        ("fit", {"nodes": "8-1"}, ("nodes", "8-1")),
        ("fit", {"nodes": 0}, ("nodes", "0")),
        ("fit", {"nodes": "1-"}, ("nodes", "1-")),
        ("fit", {"nodes": 1.5}, ("nodes", "1.5")),
        ("fit", {"nodes": True}, ("nodes", "True")),
        ("fit", {"gpus": -1}, ("gpus", "-1")),
        ("fit", {"gpus": "eight"}, ("gpus", "eight")),
        ("fit", {"cpus": 0}, ("cpus", "0")),
        ("fit", {"memory": "64GB"}, ("memory", "64GB")),
        ("fit", {"time": "1h"}, ("time", "1h")),
        ("fit", {"time": 1, "grace": 60}, ("time", "1", "grace", "60")),
        ("fit", {"time": "1:59"}, ("time", "1:59", "grace", "120")),
        ("fit", {"grace": 0}, ("grace", "0")),
        ("fit", {"volumes": ["data:/data"]}, ("volumes", "data:/data")),
        ("fit", {"volumes": "/a:/b"}, ("volumes", "/a:/b")),
        ("fit", {"environment": ["A-B"]}, ("environment", "A-B")),
        ("fit", {"container": 3}, ("container", "3")),
        ("fit", {"engines": ["slurm"]}, ("engines", "slurm")),
        ("fit", {"engines": {"slrum": {}}}, ("engines", "`slrum`", "`slurm`")),
        ("pack", {"nodes": 2}, ("nodes", "pack", "fit")),
        ("report", {"nodes": "1-2"}, ("nodes", "report")),
        ("fit", {"array": 4}, ("array", "fit", "collect")),
        ("pack", {"array": 4}, ("array", "pack", "collect")),
        ("collect", {"array": 4, "nodes": 2}, ("array", "4", "nodes", "2")),
        ("collect", {"array": "0-3"}, ("array", "0-3")),
    ],
    ids=str,
)
def test_resources_that_cannot_be_are_refused(tmp_path, capfd, verb, resources, named):
    """Before anything is submitted or written; the corrected ones are accepted."""
    config = pipeline_of(tmp_path, resources, verb)
    words = ("launch", config, "--on", "local")
    assert_refused(capfd, words, "stage one", "resources", *named, alone=True)
    assert not (tmp_path / "out").exists()
    assert run_command(*words[:2], "--on", "local", "--dry-run") == 2
    pipeline_of(tmp_path, {"cpus": 1}, verb)
    assert run_command(*words, "--dry-run") == 0


@pytest.mark.parametrize(
    ("verb", "more", "wanted"),
    [
        ("pack", {}, (1, 1)),
        ("fit", {}, (2, 1)),
        ("collect", {}, (1, 3)),
        ("collect", {"nodes": 4}, (4, 1)),
        ("collect", {"array": 5}, (1, 5)),
    ],
)
def test_resources_of_the_pipeline_count_for_stages_that_can_use_them(tmp_path, verb, more, wanted):
    config = pipeline_of(tmp_path, more, verb, resources={"nodes": 2, "array": 3})
    (stage,) = load(config).stages
    resources = parse_resources(stage)
    assert (resources.nodes, resources.array) == wanted


@pytest.mark.parametrize("value", [3, [], "x"], ids=str)
def test_resources_are_a_mapping(tmp_path, capfd, value):
    config = pipeline_of(tmp_path, value)
    assert_refused(capfd, ("run", config), config, "stage one", "resources", alone=True)


def test_an_unknown_engine_is_refused(tmp_path, capfd):
    config = pipeline_of(tmp_path, {})
    for verb_words in (("--on", "slrm"), ("--on", "k8s")):
        words = ("launch", config, *verb_words)
        assert_refused(capfd, words, f"--on {verb_words[1]}", "local", "slurm", alone=True)
    assert_refused(capfd, ("launch", config), "on", alone=True)


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"partitions": "a"}, ("`partitions`", "partition")),
        ({"partition": 3}, ("partition", "3")),
        ({"options": ["-p x"]}, ("options", "-p x")),
        ({"container": "docker"}, ("container", "docker", "apptainer")),
        ([], ("slurm", "[]")),
    ],
    ids=str,
)
def test_entries_of_slurm_that_cannot_be_are_refused(tmp_path, capfd, monkeypatch, entries, named):
    programs(tmp_path, monkeypatch)
    config = pipeline_of(tmp_path, {"engines": {"slurm": entries}})
    assert_refused(capfd, ("launch", config, "--on", "slurm"), "engines", *named, alone=True)
    assert not list((tmp_path / "out").rglob("job.json"))


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Put commands of Slurm that do nothing on the path, and nothing else."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        (folder / "bin" / name).write_text("#!/bin/sh\n")
        (folder / "bin" / name).chmod(0o755)
    for name in missing:
        (folder / "bin" / name).unlink()
    monkeypatch.setenv("PATH", str(folder / "bin"))


@pytest.mark.parametrize("name", ["sbatch", "scancel"])
def test_a_missing_command_names_the_package(tmp_path, capfd, monkeypatch, name):
    programs(tmp_path, monkeypatch, name)
    config = pipeline_of(tmp_path, {})
    words = ("launch", config, "--on", "slurm")
    assert_refused(capfd, words, name, "slurm-client", alone=True)
    assert not (tmp_path / "out").exists()


# Secrets.


def secrets_file(folder: Path, text: str, mode: int = 0o600) -> Path:
    """Write a file of secrets."""
    path = folder / "secrets.env"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_values_in_the_environment_are_refused_and_not_printed(tmp_path, capfd):
    for environment in ({"WANDB_MODE": SECRET}, {"MY_VARIABLE": SECRET}):
        config = pipeline_of(tmp_path, {"environment": environment})
        words = ("launch", config, "--on", "local")
        line = assert_refused(capfd, words, "environment", *environment, alone=True)
        assert SECRET not in line


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o622])
def test_a_file_of_secrets_that_others_may_read_is_refused(tmp_path, capfd, mode):
    path = secrets_file(tmp_path, f"TOKEN={SECRET}\n", mode)
    config = pipeline_of(tmp_path, {"environment": ["TOKEN"], "secrets": str(path)})
    words = ("launch", config, "--on", "local")
    line = assert_refused(capfd, words, path, "chmod 600", alone=True)
    assert SECRET not in line
    path.chmod(0o600)
    assert run_command(*words, "--dry-run") == 0
    assert SECRET not in "".join(capfd.readouterr())


def test_a_missing_secret_or_file_is_named(tmp_path, capfd):
    path = tmp_path / "secrets.env"
    config = pipeline_of(tmp_path, {"environment": ["A", "B"], "secrets": str(path)})
    words = ("launch", config, "--on", "local")
    assert_refused(capfd, words, path, "A, B", "chmod 600", alone=True)
    secrets_file(tmp_path, f"A={SECRET}\nBB=1\n# B=2\n")
    line = assert_refused(capfd, words, path, "B=", alone=True)
    assert SECRET not in line


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=b", "b"),
        ("export A='b c'", "b c"),
        ('A="b=c"', "b=c"),
        ("A=", ""),
        ("A = b", "b"),
        ("A=a$b#c", "a$b#c"),
        ("A=b c\\d", "b c\\d"),
        ("A=it's", "it's"),
        ("A='", "'"),
    ],
)
def test_lines_of_secrets(tmp_path, line, value):
    path = secrets_file(tmp_path, f"# a comment\n\n{line}\nOTHER=1\n")
    assert read_secrets(Resources(environment=["A"], secrets=str(path))) == {"A": value}


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        (90, 5400),
        ("90", 5400),
        ("1:30", 90),
        ("12:00:00", 43_200),
        ("2-3", 183_600),
        ("1-00:30", 88_200),
        ("1-00:00:01", 86_401),
        (None, None),
    ],
)
def test_limits_are_read_as_slurm_reads_them(time, seconds):
    assert limit_seconds(time) == seconds


# Scripts.

EVERYTHING = {
    "nodes": "1-8",
    "gpus": 8,
    "cpus": 12,
    "memory": "64G",
    "time": "1-12:00:00",
    "grace": 300,
    "engines": {
        "slurm": {
            **{"partition": "a100", "account": "me", "qos": "long", "constraint": "a|b"},
            "options": ["--exclusive", "--exclude=n1,n2"],
        }
    },
}
FOLDERS = ["plain", "with space", "dollar$HOME", "it's", "hash # and ; && `ls`", "100%j", "früh"]


def scripts_of(config: Path) -> list[str]:
    """Return the scripts that are rendered for a pipeline of one stage."""
    pipeline = load(config)
    tasks = make_tasks(pipeline, pipeline.stages[0])
    return [Slurm().render(task, ["7", "8"]) for task in (tasks.workers, tasks.main) if task]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize(
    ("verb", "resources"),
    [("fit", EVERYTHING), ("collect", {"array": 4}), ("pack", {})],
    ids=["everything", "array", "nothing"],
)
def test_scripts_are_right_for_odd_paths(tmp_path, monkeypatch, folder, verb, resources):
    """The command in a script gets the words that it should; shellcheck has no complaint."""
    echo = tmp_path / "echo words"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    monkeypatch.setattr(slurm.sys, "executable", str(echo))
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    config = pipeline_of(tmp_path / folder, resources, verb)
    for script in scripts_of(config):
        done = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True)
        words = done.stdout.splitlines()
        assert words[3:8] == ["stage", "--out", f"{tmp_path}/{folder}/out", "--name", "one"]
        check_script(script)

        # Slurm reads a directive as a shell would, but expands nothing; a % stands for a job's id.
        directives = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
        options = [shlex.split(line.removeprefix("#SBATCH "))[0] for line in directives]
        assert all(option.startswith("--") for option in options)
        assert f"--chdir={tmp_path}/{folder}" in options
        (output,) = (option for option in options if option.startswith("--output="))
        logs = f"{tmp_path}/{folder}/out/stages/one/logs/".replace("%", "%%")
        assert output.startswith(f"--output={logs}job-%")
        assert "--export=NONE" in options
        assert "--dependency=afterok:7:8" in options


def check_script(script: str) -> None:
    """Check a script with shellcheck, where it is installed."""
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck")
    words = [program, "--exclude=SC2016", "-"]  # a $ in single quotes is meant to stay one
    done = subprocess.run(words, input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + script


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb"])
def test_paths_that_slurm_cannot_read_are_refused(tmp_path, capfd, monkeypatch, name):
    programs(tmp_path, monkeypatch)
    config = pipeline_of(tmp_path, {})
    words = ("launch", config, "--on", "slurm", "--out", tmp_path / name)
    assert_refused(capfd, words, "rename", alone=True)
    assert not list(tmp_path.rglob("job.json"))


@pytest.mark.parametrize("runs", ["pyxis", "apptainer"])
def test_a_stage_in_a_container(tmp_path, runs):
    resources = Resources(
        gpus=2,
        container="/images/a b.sif",
        volumes=["/data:/data:ro", "/x:/y"],
        engines={"slurm": {"container": runs}},
    )
    words = launcher_words(resources, 1)
    check_script("#!/bin/bash\n" + shlex.join(words) + "\n")
    if runs == "pyxis":
        assert "--container-image=/images/a b.sif" in words
        assert "--container-mounts=/data:/data:ro,/x:/y" in words
    else:
        tail = ["--nv", "--bind=/data:/data:ro", "--bind=/x:/y", "/images/a b.sif"]
        assert words[words.index("apptainer") :] == ["apptainer", "exec", *tail]


def test_a_container_needs_what_runs_it(tmp_path, capfd, monkeypatch):
    programs(tmp_path, monkeypatch)
    config = pipeline_of(tmp_path, {"container": "a.sif"})
    words = ("launch", config, "--on", "slurm")
    assert_refused(capfd, words, "container", "pyxis", "apptainer", alone=True)


def test_no_secret_is_in_a_script(tmp_path, capfd, monkeypatch):
    programs(tmp_path, monkeypatch)
    path = secrets_file(tmp_path, f"HF_TOKEN={SECRET}\n")
    config = pipeline_of(tmp_path, {"environment": ["HF_TOKEN"], "secrets": str(path), "array": 2})
    assert run_command("launch", config, "--on", "slurm", "--dry-run") == 0
    printed = capfd.readouterr().out
    assert SECRET not in printed
    assert printed.count("#!/bin/bash") == 2
    assert "HF_TOKEN" not in os.environ


def test_more_cores_than_this_host_has_are_refused(tmp_path, capfd):
    cores = (os.cpu_count() or 1) + 1
    config = pipeline_of(tmp_path, {"cpus": cores})
    assert_refused(capfd, ("launch", config, "--on", "local"), "cpus", cores, alone=True)
