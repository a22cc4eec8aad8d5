"""The command line: instant help, and one clear line for whatever is wrong."""

import shutil
import subprocess
import sys

import pytest
import torch

from deploy.cli import VERBS, main
from models import teacher
from models.codec import KL

STUDENT = ("fit", "--config", "configs/digits/student.yaml")
TEACHER = ("fit", "--config", "configs/digits/teacher.yaml")


@pytest.fixture
def refused(workspace, monkeypatch, capfd):
    """Run a command that must fail with exit code 2 and one line; return the line."""
    monkeypatch.chdir(workspace.path)

    def run(*words):
        assert main([str(word) for word in words]) == 2
        said = capfd.readouterr().err.strip()
        lines = [line for line in said.splitlines() if line.startswith("rectify: error: ")]
        assert len(lines) == 1 and said.endswith(lines[0]) and "Traceback" not in said, said
        return lines[0]

    return run


def test_help_is_instant_and_names_every_verb():
    code = "import sys; from deploy.cli import parser; parser().print_help(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {verb}" in done.stdout for verb in VERBS)
    assert not {"torch", "numpy", "lightning", "diffusers", "jsonargparse"} & set(done.stderr.split())


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_for_a_stranger(capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) > 8 and ("--out" in text or verb in ("report", "index"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("colect",), "no verb 'colect'; did you mean `collect`?"),
        (("collect", "--techer", "x"), "no option `techer`; did you mean `teacher`?"),
        ((*TEACHER, "--trainer.max_stepz", "3"), "no option `trainer.max_stepz`; did you mean `trainer.max_steps`?"),
        ((*TEACHER, "--model.denoiser.interpolant", "Linaer"), "denoiser.interpolant: no class `Linaer`; did you mean `Linear`?"),
        ((*TEACHER, "--data.source.pth", "x"), "data.source: Latents has no `pth`; did you mean `path`?"),
        ((*TEACHER, "--optimizer.lrr", "1"), "AdamW has no `lrr`; did you mean `lr`?"),
        (("fit", "--config", "nowhere.yaml"), "nowhere.yaml"),
        (("run", "nowhere.yaml"), "nowhere.yaml"),
        (("pack", "--out", "x", "--images", "nowhere"), "nowhere: no such folder"),
        (("encode", "--images", "nowhere", "--codec", "runs/demo/autoencoder", "--out", "x"), "nowhere: no such folder"),
        (("encode", "--images", "runs/demo/images/train", "--codec", "nowhere", "--out", "x"), "nowhere: no such codec folder"),
        (("encode", "--images", "runs/demo/latents", "--codec", "runs/demo/autoencoder", "--out", "x"), "holds latents, wanted"),
        (("collect", "--teacher", "nowhere", "--out", "x"), "nowhere: no such run folder"),
        (("collect", "--teacher", "runs/demo/images", "--out", "x"), "no checkpoint under"),
        (("collect", "--teacher", "runs/demo/autoencoder", "--out", "x"), "holds no denoiser"),
        (("sample", "--run", "runs/demo/student", "--out", "x.png", "--steps", "0"), "steps is 0"),
        (("sample", "--run", "runs/demo/student", "--out", "x.png", "--count", "7"), "count: 7 is not"),
        (("export", "--run", "nowhere", "--out", "x"), "nowhere: no such run folder"),
        (("report", "--run", "runs/demo/images"), "no evaluation.json below it"),
        ((*STUDENT, "--out", "x", "--data.source.guidance", "5"), "collected with guidance 1.0, the configuration says 5"),
        ((*TEACHER, "--out", "x", "--model.denoiser.net.channels", "3"), "(4, 8, 8), model.denoiser.net is built for (3, 8, 8)"),
        ((*TEACHER, "--out", "x", "--model.condition.classes", "3"), "model.denoiser.net.classes is 10, model.condition has 3"),
        ((*TEACHER, "--out", "x", "--model.denoiser.net.heads", "5"), "fit: Attention: width 64 is not a multiple of heads 5"),
        ((*TEACHER, "--out", "x", "--model.condition.dropout", "2"), "fit: ClassLabel: dropout is 2.0, it must lie in [0, 1]"),
        ((*TEACHER, "--out", "x", "--model.codec", "nowhere"), "fit: nowhere: no such codec folder"),
        ((*TEACHER, "--out", "x", "--model.codec", "null"), "model.codec: the data are latents"),
        ((*TEACHER, "--out", "x", "--trainer.max_steps", "-1"), "trainer.max_steps: -1"),
        (("run", "configs/digits/pipeline.yaml"), "was finished with other settings"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(refused, words, said):
    assert said in refused(*words)


def test_pairs_of_another_teacher_are_refused(refused, tmp_path):
    other = ("--model.initial", "runs/demo/student", "--out", tmp_path / "x", "--trainer.max_steps", "2")
    line = refused(*STUDENT, *other)
    assert "collected with teacher " in line and ", the configuration says " in line


def test_pairs_of_another_form_are_refused(refused, tmp_path):
    other = ("--model.initial", "null", "--model.denoiser.interpolant", "Trigonometric", "--out", tmp_path / "x")
    line = refused(*STUDENT, *other, "--trainer.max_steps", "2")
    assert "collected with interpolant Linear(sigma_min=0.0), the configuration says Trigonometric(); to convert them set" in line


def test_pairs_of_another_form_are_converted_when_told_to(workspace, tmp_path, monkeypatch):
    monkeypatch.chdir(workspace.path)
    words = ("--model.denoiser.interpolant", "Trigonometric", "--data.source.convert", "true", "--trainer.max_steps", "2")
    assert not main([*STUDENT, *words, "--out", str(tmp_path / "x"), "--trainer.logger", "false"])
    assert repr(teacher.load(tmp_path / "x")[0].interpolant) == "Trigonometric()"


@pytest.mark.parametrize("damage", ["torn", "foreign", "pickle", "empty"])
def test_a_checkpoint_that_is_not_ours_is_named_and_runs_nothing(workspace, refused, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(workspace.path / "runs/demo/teacher", run)
    path = sorted((run / "checkpoints").glob("*.ckpt"))[-1]

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-5000])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"state_dict": {}} if damage == "foreign" else {"rectify": Bomb()}, path)
    line = refused("collect", "--teacher", run, "--out", tmp_path / "pairs")
    assert path.name in line
    fit = ("--out", run, "--trainer.max_steps", "30")
    assert path.name in refused(*TEACHER, *fit), "a torn checkpoint is never a silent restart"
    assert not (tmp_path / "owned").exists()


def test_a_run_of_another_model_is_not_resumed(workspace, refused, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workspace.path / "runs/demo/teacher", run)
    line = refused(*TEACHER, "--out", run, "--trainer.max_steps", "30", "--model.denoiser.net.depth", "2")
    assert "holds a run of another model" in line
    assert (run / "config.yaml").read_bytes() == (workspace.path / "runs/demo/teacher/config.yaml").read_bytes()


def test_a_teacher_that_cannot_start_from_noise_writes_no_pairs(workspace, refused, tmp_path):
    """Noise on Linear is singular at t = 1: no NaN is ever written under a final name."""
    run = tmp_path / "run"
    words = ("--model.denoiser.prediction", "Noise", "--trainer.max_steps", "1", "--out", run)
    workspace.rectify(*TEACHER, *words)
    assert "is singular" in refused("collect", "--teacher", run, "--out", tmp_path / "pairs", "--pairs", "64", "--steps", "2")
    assert not list((tmp_path / "pairs").glob("*.tar"))
    assert "is singular" in refused("sample", "--run", run, "--out", tmp_path / "x.png")


def test_an_export_never_replaces_a_folder_that_is_none(refused, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "is no export of ours" in refused("export", "--run", "runs/demo/student", "--out", tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "text", ["stages: [a: {b", "{out: x, stages: [pack]}", "{out: x, stages: 3}", "{out: x, stages: [{name: a}]}"]
)
def test_a_pipeline_that_is_none_is_named(refused, tmp_path, text):
    (tmp_path / "pipeline.yaml").write_text(text)
    assert "pipeline.yaml: " in refused("run", tmp_path / "pipeline.yaml")


def test_another_seed_or_batch_is_not_resumed(workspace, refused, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workspace.path / "runs/demo/teacher", run)
    more = ("--out", run, "--trainer.max_steps", "30")
    assert "data.batch: the run was begun with 256, the configuration says 64" in refused(*TEACHER, *more, "--data.batch", "64")
    assert "data.seed: the run was begun with 0" in refused(*TEACHER, *more, "--seed_everything", "9")


def test_latents_of_another_codec_are_refused(workspace, refused, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(workspace.path / "runs/demo/autoencoder/codec", other)
    codec = KL(str(other))
    codec.vae.decoder.conv_out.bias.data += 1
    codec.save(other)
    line = refused(*TEACHER, "--out", tmp_path / "x", "--model.codec", other, "--trainer.max_steps", "1")
    assert "is not the codec that runs/demo/latents was encoded with" in line
