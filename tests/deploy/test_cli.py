"""The command line: immediate help, and one clear line for bad input."""

import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch

from data.shards import read_manifest
from deploy.cli import POSITIONAL, VERBS, complete_flags, main
from deploy.help import BOOL_HELP, LIST_HELP
from models.checkpoint import fingerprint, load_checkpoint
from models.codec import KL
from tests.helpers.refusals import assert_refused
from tests.helpers.training import config_words, study_config, train

STUDENT = ("fit", *config_words(study_config("digits", "student")))
TEACHER = ("fit", *config_words(study_config("digits", "teacher")))
CODEC = ("--codec", "runs/demo/autoencoder")
HEAVY_MODULES = {"torch", "numpy", "lightning", "diffusers", "jsonargparse"}


@pytest.fixture
def refused(workspace, monkeypatch, capfd):
    """Return `assert_refused` for commands in the workspace."""
    monkeypatch.chdir(workspace.path)

    def run(words: tuple[object, ...], *named: object) -> str:
        return assert_refused(capfd, words, *named)

    return run


def test_help_names_every_verb_without_heavy_imports():
    code = """
import sys
from deploy.cli import help_text
print(help_text())
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {verb}" in done.stdout for verb in VERBS)
    assert not HEAVY_MODULES & set(done.stderr.split())


def option_names(verb: str) -> list[str]:
    """Return the options of a verb, from the signature of its function."""
    module, _, name = VERBS[verb][0].partition(":")
    names = []
    for parameter in signature(getattr(import_module(module), name)).parameters.values():
        if is_dataclass(parameter.annotation):
            names += [field.name for field in fields(parameter.annotation)]
        else:
            names.append(parameter.name.rstrip("_"))
    return names


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"fit"}))
def test_a_verbs_help_names_its_options_without_heavy_imports(verb):
    code = f"""
import sys
from deploy.cli import main
code = main([*{verb.split()}, "--help"])
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY_MODULES & set(done.stderr.split())
    for name in option_names(verb):
        is_positional = POSITIONAL.get(verb) == name
        written = name.upper() if is_positional else f"--{name}"
        assert f"  {written} " in done.stdout


@pytest.mark.parametrize(
    ("verb", "needless"),
    [
        ("sample", {"accelerate", "webdataset", "lightning", "diffusers", "scipy"}),
        ("collect", {"lightning", "diffusers", "scipy", "matplotlib"}),
        ("likelihood", {"accelerate", "lightning", "diffusers", "scipy"}),
        ("report", {"torch", "lightning"}),
    ],
)
def test_a_verb_imports_only_what_it_needs(verb, needless):
    module, _, _ = VERBS[verb][0].partition(":")
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not needless & set(done.stdout.split())


def test_the_classes_that_fit_lists_need_no_library_before_one_is_built():
    code = """
import sys
from deploy.fit import import_components
import_components()
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needless = {"diffusers", "transformers", "sklearn", "torchdiffeq", "accelerate", "wandb"}
    assert not needless & set(done.stdout.split())


def test_fit_has_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    assert "--out" in capsys.readouterr().out


def test_help_shows_types_choices_and_defaults(capsys):
    assert main(["evaluate", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--steps [INT,...] numbers of steps of the sampler. Default: [1, 2, 4, 8, 32]." in text
    assert "--sampler NAME or [NAME,...]" in text
    assert "One of DDIM, DPMSolver2M," in text
    assert "--guidance_interval [FLOAT,FLOAT]" in text
    assert LIST_HELP in text


def test_help_of_a_class_lists_its_arguments(capsys):
    assert main(["likelihood", "--help"]) == 0
    assert "`--data.help CLASS`" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="0"):
        main(["likelihood", "--data.help", "Dequantised"])
    assert "--data.levels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("colect",), ("'colect'", "`collect`")),
        (("collect", "--techer", "x"), ("collect", "`techer`", "`teacher`")),
        (("sample", "--grid", "karas"), ("sample", "grid", "`karas`", "`karras`")),
        (
            (*TEACHER, "--trainer.max_stepz", "3"),
            ("`trainer.max_stepz`", "`trainer.max_steps`"),
        ),
        (
            (*TEACHER, "--model.denoiser.interpolant", "Linaer"),
            ("denoiser.interpolant", "`Linaer`", "`Linear`"),
        ),
        ((*TEACHER, "--data.source.pth", "x"), ("data.source", "Latents", "`pth`", "`path`")),
        ((*TEACHER, "--optimizer.lrr", "1"), ("AdamW", "`lrr`", "`lr`")),
        ((*TEACHER, "--model.objectiv.times", "x"), ("Generator", "`objectiv`", "`objective`")),
    ],
    ids=[
        *("verb", "option", "choice"),
        *("nested option", "class", "class argument", "optimizer argument", "nested argument"),
    ],
)
def test_a_misspelt_word_is_refused_with_the_nearest(refused, words, named):
    refused(words, *named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--sampler", "Leapfrog"), ("sampler", "`Leapfrog`", "DDIM", "Renoising")),
        (("--edges", "1,0.5,0"), ("edges", "1,0.5,0", "[1,2]")),
        (("--samples", "two"), ("samples", "two", "int")),
    ],
    ids=["choice", "list", "number"],
)
def test_a_value_of_another_type_is_refused_with_the_right_kind(refused, words, named):
    refused(("evaluate", *words), "evaluate", *named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("toy", "pictur", "--out", "x"), ("'toy pictur'", "`toy picture`")),
        (("report", "sedes"), ("'report sedes'", "`report seeds`")),
        (("toy",), ("'toy'", "toy picture", "toy benchmark")),
        (("xyzzy",), ("'xyzzy'", "rectify --help")),
    ],
    ids=["second word", "second word of a verb", "no second word", "unlike any"],
)
def test_an_unknown_verb_is_refused_with_the_nearest(refused, words, named):
    refused(words, *named)


def test_help_of_a_first_word_names_its_verbs(capsys):
    assert main(["toy", "--help"]) == 0
    text = capsys.readouterr().out
    assert "toy picture" in text
    assert "toy benchmark" in text


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("x.yaml --smoke", "x.yaml --smoke true"),
        ("x.yaml --smoke --jobs 2", "x.yaml --smoke true --jobs 2"),
        ("--smoke x.yaml", "--smoke true x.yaml"),
        ("x.yaml --smoke true", "x.yaml --smoke true"),
        ("x.yaml --smoke False", "x.yaml --smoke False"),
        ("x.yaml --smoke=false", "x.yaml --smoke=false"),
        ("x.yaml --jobs", "x.yaml --jobs"),
    ],
)
def test_a_boolean_option_without_a_value_means_true(words, completed):
    assert complete_flags(words.split(), ["smoke"], positional=True) == completed.split()


def test_help_explains_boolean_options(capsys):
    assert main(["run", "--help"]) == 0
    assert BOOL_HELP in " ".join(capsys.readouterr().out.split())


def test_a_boolean_option_of_fit_may_have_no_value(capsys, workspace, monkeypatch):
    monkeypatch.chdir(workspace.path)
    with pytest.raises(SystemExit, match="0"):
        main([*map(str, TEACHER), "--trainer.enable_progress_bar", "--print_config"])
    assert "enable_progress_bar: true" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("fit", "--config", "nowhere.yaml"), ("nowhere.yaml",)),
        (("run", "nowhere.yaml"), ("nowhere.yaml",)),
        (("pack", "--out", "x", "--images", "nowhere"), ("nowhere",)),
        (("encode", "--images", "nowhere", *CODEC, "--out", "x"), ("nowhere",)),
        (
            ("encode", "--images", "runs/demo/images/train", "--codec", "nowhere", "--out", "x"),
            ("nowhere", "codec"),
        ),
        (("collect", "--teacher", "nowhere", "--out", "x"), ("nowhere",)),
        (("export", "--run", "nowhere", "--out", "x"), ("nowhere",)),
        ((*TEACHER, "--out", "x", "--model.codec", "nowhere"), ("fit", "nowhere", "codec")),
    ],
    ids=["fit", "run", "pack", "encode", "encode codec", "collect", "export", "fit codec"],
)
def test_a_missing_file_is_refused_by_name(refused, words, named):
    refused(words, *named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ("encode", "--images", "runs/demo/latents", *CODEC, "--out", "x"),
            ("runs/demo/latents", "images", "latents"),
        ),
        (
            ("collect", "--teacher", "runs/demo/images", "--out", "x"),
            ("runs/demo/images", "checkpoint"),
        ),
        (
            ("collect", "--teacher", "runs/demo/autoencoder", "--out", "x"),
            ("runs/demo/autoencoder", "denoiser"),
        ),
        (("report", "--run", "runs/demo/images"), ("runs/demo/images", "evaluation.json")),
    ],
    ids=["latents as images", "images as run", "autoencoder as teacher", "images as pipeline"],
)
def test_a_folder_of_another_kind_is_refused(refused, words, named):
    refused(words, *named)


SAMPLE = ("sample", "--run", "runs/demo/student", "--out", "x.png")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ((*SAMPLE, "--steps", "0"), ("steps", "0")),
        ((*SAMPLE, "--count", "7"), ("count", "7")),
        ((*STUDENT, "--out", "x", "--data.source.guidance", "5"), ("guidance", "1.0", "5")),
        (
            (*TEACHER, "--out", "x", "--model.denoiser.net.channels", "3"),
            ("model.denoiser.net", "(4, 8, 8)", "(3, 8, 8)"),
        ),
        (
            (*TEACHER, "--out", "x", "--model.condition.classes", "3"),
            ("model.denoiser.net.classes", "10", "model.condition", "3"),
        ),
        (
            (*TEACHER, "--out", "x", "--model.denoiser.net.heads", "5"),
            ("fit", "Attention", "width", "64", "heads", "5"),
        ),
        (
            (*TEACHER, "--out", "x", "--model.condition.dropout", "2"),
            ("fit", "ClassLabel", "dropout", "2.0", "[0, 1]"),
        ),
        ((*TEACHER, "--out", "x", "--model.codec", "null"), ("model.codec", "latents")),
        ((*TEACHER, "--out", "x", "--trainer.max_steps", "-1"), ("trainer.max_steps", "-1")),
    ],
    ids=[
        *("steps", "count", "guidance", "channels", "classes"),
        *("heads", "dropout", "codec", "max_steps"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(refused, words, named):
    refused(words, *named)


def test_a_pipeline_finished_with_other_settings_is_refused(refused):
    refused(("run", "configs/digits/pipeline.yaml"), "runs/demo", "stage", "--out")


def test_pairs_of_another_teacher_are_refused(refused, tmp_path):
    other = ("--model.initial", "runs/demo/student", "--out", tmp_path / "x")
    collected = read_manifest("runs/demo/pairs")["teacher"]
    configured = fingerprint(load_checkpoint(Path("runs/demo/student"))[0])
    hashes = (collected[:20], configured[:20])
    refused((*STUDENT, *other, "--trainer.max_steps", "2"), "runs/demo/pairs", "teacher", *hashes)


TRIGONOMETRIC = ("--model.denoiser.interpolant", "Trigonometric")


def test_pairs_of_another_interpolant_are_refused(refused, tmp_path):
    words = (*STUDENT, "--model.initial", "null", *TRIGONOMETRIC, "--out", tmp_path / "x")
    refused(
        (*words, "--trainer.max_steps", "2"),
        *(
            "interpolant",
            "Linear(sigma_min=0.0)",
            "Trigonometric()",
            "data.source.allow_conversion",
        ),
    )


def test_pairs_of_another_interpolant_are_converted_with_an_option(
    workspace, tmp_path, monkeypatch
):
    monkeypatch.chdir(workspace.path)
    words = (*TRIGONOMETRIC, "--data.source.allow_conversion", "true")
    run = train(study_config("digits", "student"), tmp_path / "x", *words, steps=2)
    assert repr(load_checkpoint(run)[0].interpolant) == "Trigonometric()"


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.fixture
def copied_run(workspace, tmp_path):
    """Return a copy of the demo's teacher."""
    return shutil.copytree(workspace.path / "runs/demo/teacher", tmp_path / "run")


def damage_file(path: Path, damage: str, target: Path) -> None:
    """Damage a checkpoint; a pickle's code would create `target`."""
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-5000])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        torch.save({"rectify": Bomb(target)}, path)


@pytest.mark.parametrize("damage", ["torn", "foreign", "pickle", "empty"])
def test_a_damaged_weights_file_is_named_and_its_code_never_runs(
    refused, copied_run, tmp_path, damage
):
    path = sorted((copied_run / "checkpoints").glob("*.ckpt"))[-1]
    damage_file(path, damage, tmp_path / "owned")
    refused(("collect", "--teacher", copied_run, "--out", tmp_path / "pairs"), path.name)
    # Training refuses it, too: it never restarts silently.
    refused((*TEACHER, "--out", copied_run, "--trainer.max_steps", "30"), path.name)
    assert not (tmp_path / "owned").exists()


def test_a_run_of_another_model_is_not_resumed(refused, copied_run):
    before = (copied_run / "config.yaml").read_bytes()
    deeper = ("--trainer.max_steps", "30", "--model.denoiser.net.depth", "2")
    refused((*TEACHER, "--out", copied_run, *deeper), copied_run, "depth")
    assert (copied_run / "config.yaml").read_bytes() == before


@pytest.fixture(scope="module")
def singular_run(workspace, tmp_path_factory):
    """Return a run that predicts noise on Linear, which is singular at t = 1."""
    run = tmp_path_factory.mktemp("singular") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.path)
        noise = ("--model.denoiser.prediction", "NoisePrediction")
        return train(study_config("digits", "teacher"), run, *noise, steps=1)


def test_a_teacher_that_is_singular_at_noise_writes_no_pairs(refused, singular_run, tmp_path):
    pairs = tmp_path / "pairs"
    words = ("--pairs", "64", "--steps", "2")
    refused(
        ("collect", "--teacher", singular_run, "--out", pairs, *words),
        *("NoisePrediction", "Linear", "t = 1"),
    )
    assert not list(pairs.glob("*.tar"))


def test_a_teacher_that_is_singular_at_noise_draws_no_image(refused, singular_run, tmp_path):
    refused(
        ("sample", "--run", singular_run, "--out", tmp_path / "x.png"),
        *("NoisePrediction", "Linear", "t = 1"),
    )


def test_a_folder_that_holds_other_files_is_never_replaced(refused, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(("export", "--run", "runs/demo/student", "--out", tmp_path), tmp_path, "--out")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "text",
    [
        "stages: [a: {b",
        "{out: x, stages: [pack]}",
        "{out: x, stages: 3}",
        "{out: x, stages: [{name: a}]}",
    ],
    ids=["no YAML", "stage is a word", "stages is a number", "stage without verb"],
)
def test_a_bad_pipeline_file_is_named(refused, tmp_path, text):
    (tmp_path / "pipeline.yaml").write_text(text)
    refused(("run", tmp_path / "pipeline.yaml"), "pipeline.yaml: ")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--data.batch", "64"), ("data.batch", "256", "64")),
        (("--seed_everything", "9"), ("data.seed", "0", "9")),
    ],
    ids=["batch", "seed"],
)
def test_another_seed_or_batch_is_not_resumed(refused, copied_run, words, named):
    refused((*TEACHER, "--out", copied_run, "--trainer.max_steps", "30", *words), *named)


def test_latents_of_another_codec_are_refused(workspace, refused, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(workspace.path / "runs/demo/autoencoder/codec", other)
    codec = KL(str(other))
    codec.vae.decoder.conv_out.bias.data += 1
    codec.save(other)
    words = ("--out", tmp_path / "x", "--model.codec", other, "--trainer.max_steps", "1")
    refused((*TEACHER, *words), other, "codec", "runs/demo/latents")
