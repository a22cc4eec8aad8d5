"""Consistency and progressive distillation run by their configurations, on the demo's artefacts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from deploy.cli import main
from models import teacher

OBJECTIVE = "--model.objective.init_args"


@pytest.fixture
def fit(workspace, monkeypatch, tmp_path):
    """Train three steps in this process; return the exit code."""
    monkeypatch.chdir(workspace.path)

    def run(name, *words, teacher=True):
        config = yaml.safe_load(Path(f"configs/digits/{name}.yaml").read_text())
        if not teacher:
            del config["model"]["init_args"]["objective"]["init_args"]["teacher"]
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        out = ("--out", str(tmp_path / "run"), "--trainer.max_steps", "3", "--data.batch", "32", "--trainer.logger", "false")
        return main(["fit", "--config", str(tmp_path / "run.yaml"), *out, "--metrics.every", "1", *words])

    return run


@pytest.mark.parametrize(
    ("name", "words", "taught"),
    [
        ("consistency", (), True),
        ("consistency", (f"{OBJECTIVE}.doublings", "2", f"{OBJECTIVE}.every", "1"), False),
        ("consistency", (f"{OBJECTIVE}.windows", "4", f"{OBJECTIVE}.teacher.init_args.guidance", "2"), True),
        ("consistency", (f"{OBJECTIVE}.drawn", "true", "--model.denoiser.init_args.net.init_args.jumps", "true"), True),
        ("progressive", (), True),
    ],
)
def test_the_configuration_trains(fit, tmp_path, name, words, taught):
    assert not fit(name, *words, teacher=taught)
    assert [json.loads(line)["loss"] > 0 for line in (tmp_path / "run" / "metrics.jsonl").open()] == [True] * 3
    kept = teacher.read(teacher.newest(tmp_path / "run"))["state_dict"]
    assert all(key.startswith("denoiser.") for key in kept), "a frozen teacher is in no checkpoint"


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("consistency", (f"{OBJECTIVE}.windows", "5"), "steps is 32, no multiple of windows, 5"),
        ("consistency", (f"{OBJECTIVE}.drawn", "true"), "drawn is true, but the network reads one time"),
        ("consistency", (f"{OBJECTIVE}.teacher.init_args.run", "nowhere"), "nowhere: no such run folder"),
        ("progressive", (f"{OBJECTIVE}.steps", "0"), "steps is 0, it must be at least 1"),
        ("progressive", ("--model.denoiser.interpolant", "Trigonometric"), "teacher is on Linear(sigma_min=0.0), the student on"),
    ],
)
def test_what_cannot_be_is_one_line(fit, capfd, name, words, said):
    assert fit(name, *words) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rectify: error: ")]
    assert len(lines) == 1 and said in lines[0]


def test_a_target_that_is_an_average_goes_on_where_it_was(fit, tmp_path):
    """Two steps and then a third give what three give: averages are read back before they are asked."""
    averaged = (f"{OBJECTIVE}.target", "Averaged", "--trainer.max_steps")
    kept = {}
    for steps in (("3",), ("2", "3")):
        for until in steps:
            assert not fit("consistency", *averaged, until)
        kept[steps] = teacher.read(teacher.newest(tmp_path / "run"))
        shutil.rmtree(tmp_path / "run")
    one, two = kept.values()
    for part in ("state_dict", "ema"):
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items())
