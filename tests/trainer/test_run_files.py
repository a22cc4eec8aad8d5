"""Files of a run: which run they are of, their order, and what is damaged in them."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from PIL import Image

from data.files import files_by_step
from data.pack import pack
from deploy import fit
from models.checkpoint import load_checkpoint, newest_checkpoint, read_checkpoint
from models.tensors import read_metadata, read_safetensors, to_safetensors
from tests.helpers.commands import succeed
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.training import fit_words, log_lines, small_config, spec, train
from trainer.callbacks.metrics_log import MetricsLog
from trainer.run_log import read_log

AVERAGES = spec("EMA", decay=0.9, widths=[0.05, 0.1])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A set of 16 tiny images, and 2 held out."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(18):
        Image.new("L", (8, 8), 14 * i).save(folder / f"{i:02d}.png")
    pack(folder / "set", folder, size=8, grey=True)
    return folder / "set"


@pytest.fixture(scope="module")
def make_config(images):
    """Return a function that makes a configuration with a log line and a checkpoint per step."""

    def make(lr=0.01, callbacks=(AVERAGES,), **trainer):
        config = small_config(spec("Images", path=str(images / "train")), lr=lr)
        config["data"]["heldout"] = spec("Images", path=str(images / "heldout"))
        config["trainer"] |= {"callbacks": list(callbacks), "val_check_interval": 2, **trainer}
        config["metrics"] = {"every": 1}
        config["checkpoints"] = {"every": 1, "keep": 9}
        return config

    return make


def delete_checkpoints(run):
    """Delete the checkpoints of a run."""
    for path in (run / "checkpoints").iterdir():
        path.unlink()


# Which run a file is of


def test_every_file_of_a_run_has_its_identity(make_config, tmp_path):
    run = train(make_config(), tmp_path / "run", steps=2)
    identity = read_checkpoint(newest_checkpoint(run))["run"]
    assert len(identity) == 8
    assert {line["run"] for line in log_lines(run)} == {identity}
    for path in files_by_step(run / "ema", ".safetensors"):
        assert read_metadata(path)["run"] == identity
    train(make_config(), run, steps=3)
    assert read_checkpoint(newest_checkpoint(run))["run"] == identity
    other = train(make_config(lr=0.02), tmp_path / "other", steps=1)
    assert read_checkpoint(newest_checkpoint(other))["run"] != identity


def test_what_a_deleted_run_left_is_renamed_and_not_mixed_in(make_config, tmp_path, capfd):
    run = train(make_config(), tmp_path / "run", steps=5)
    log = (run / "metrics.jsonl").read_bytes()
    delete_checkpoints(run)
    capfd.readouterr()
    train(make_config(lr=0.1), run, steps=3)
    err = capfd.readouterr().err
    assert "metrics.jsonl.earlier-1" in err
    assert "5 snapshots" in err

    # The log is kept, and the average is that of the new run alone.
    assert (run / "metrics.jsonl.earlier-1").read_bytes() == log
    assert max(line["step"] for line in log_lines(run)) == 3
    alone = train(make_config(lr=0.1), tmp_path / "alone", steps=3)
    found = {}
    for folder in (run, alone):
        succeed("ema", "--run", folder, "--width", 0.08)
        found[folder] = load_checkpoint(folder / "ema/width=0.08.ckpt").denoiser.state_dict()
    for name, value in found[alone].items():
        assert torch.equal(value, found[run][name]), name


def test_the_log_of_the_same_command_is_kept_too_if_its_checkpoints_were_deleted(
    make_config, tmp_path
):
    run = train(make_config(), tmp_path / "run", steps=5)
    delete_checkpoints(run)
    train(make_config(), run, steps=1)
    assert max(values["step"] for _, values in read_log(run / "metrics.jsonl.earlier-1")) == 5


def test_a_command_that_was_killed_before_its_first_checkpoint_is_the_same_run(
    make_config, tmp_path
):
    run = train(make_config(), tmp_path / "run", steps=2)
    delete_checkpoints(run)
    train(make_config(), run, steps=2)
    assert not list(run.glob("*.earlier-*"))
    assert [line["step"] for line in log_lines(run) if "loss" in line] == [1, 2]


def test_a_snapshot_of_another_run_is_refused(make_config, tmp_path, capfd):
    run = train(make_config(), tmp_path / "run", steps=3)
    path = run / "ema/step=000000002.safetensors"
    tensors, metadata = read_safetensors(path)
    path.write_bytes(to_safetensors(tensors, {"step": "2", "run": "12345678"}))
    assert_refused(capfd, ("ema", "--run", run, "--width", 0.08), path, "another run")


# Their order


def test_checkpoints_are_ordered_by_step(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    names = ("step=9.ckpt", "step=000000010.ckpt", "step=100.ckpt", "step=epoch.ckpt")
    for name in names:
        (folder / name).touch()
    assert [path.name for path in files_by_step(folder, ".ckpt")] == list(names[:3])
    assert newest_checkpoint(tmp_path).name == "step=100.ckpt"


def test_checkpoints_of_lightnings_callback_replace_none_of_ours(make_config, tmp_path):
    run = tmp_path / "run"
    theirs = spec(
        "lightning.pytorch.callbacks.ModelCheckpoint",
        dirpath=str(run / "checkpoints"),
        filename="{step}",
        every_n_train_steps=1,
        save_top_k=-1,
    )
    config = make_config(callbacks=[theirs])
    config["checkpoints"] = {"every": 1, "keep": 1}
    train(config, run, steps=3)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert {"step=000000003.ckpt", "step=1.ckpt", "step=2.ckpt", "step=3.ckpt"} <= names
    assert "step=000000002.ckpt" not in names


# What is damaged


def test_a_damaged_checkpoint_is_refused_with_the_older_one(make_config, tmp_path, capfd):
    run = train(make_config(), tmp_path / "run", steps=3)
    newest = newest_checkpoint(run)
    newest.write_bytes(newest.read_bytes()[:-100])
    words = fit_words(make_config(), run, steps=4)
    older = run / "checkpoints/step=000000002.ckpt"
    assert_refused(capfd, words, newest, f"--resume {older}")

    # The way out. What came after the older one is renamed, and the run is as it would have been.
    capfd.readouterr()
    succeed(*words, "--resume", older)
    assert f"{newest.name}.earlier-1" in capfd.readouterr().err
    names = sorted(path.name for path in (run / "ema").iterdir())
    assert "step=000000003.safetensors.earlier-1" in names
    assert [line["step"] for line in log_lines(run) if "loss" in line] == [1, 2, 3, 4]
    assert yaml.safe_load((run / "config.yaml").read_text())["resume"] is None
    found = read_checkpoint(newest_checkpoint(run))
    expected = read_checkpoint(newest_checkpoint(train(make_config(), tmp_path / "whole", steps=4)))
    assert found["global_step"] == 4
    for key, value in expected["ema"].items():
        assert torch.equal(found["ema"][key], value)


def test_a_student_goes_on_without_its_teacher(make_config, tmp_path, capfd):
    teacher = train(make_config(), tmp_path / "teacher", steps=1)
    words = ("--model.initial", teacher)
    whole = read_checkpoint(
        newest_checkpoint(train(make_config(), tmp_path / "whole", *words, steps=3))
    )
    train(make_config(), tmp_path / "run", *words, steps=2)
    teacher.rename(tmp_path / "elsewhere")
    found = read_checkpoint(
        newest_checkpoint(train(make_config(), tmp_path / "run", *words, steps=3))
    )
    for key, value in whole["state_dict"].items():
        assert torch.equal(found["state_dict"][key], value)

    # another student cannot begin
    capfd.readouterr()
    assert_refused(capfd, fit_words(make_config(), tmp_path / "new", *words, steps=1), teacher)
    assert not (tmp_path / "new").exists()


def test_a_run_goes_on_from_no_other_runs_checkpoint(make_config, tmp_path, capfd):
    run = train(make_config(), tmp_path / "run", steps=1)
    other = tmp_path / "other"
    words = fit_words(make_config(), other, "--resume", newest_checkpoint(run), steps=2)
    assert_refused(capfd, words, "resume", newest_checkpoint(run), other, "--model.initial")
    assert not other.exists()


def test_a_folder_for_a_checkpoint_is_refused_with_a_way_out(make_config, tmp_path, capfd):
    folder = tmp_path / "run/checkpoints/step=000000003.ckpt"
    folder.mkdir(parents=True)
    assert_refused(capfd, fit_words(make_config(), tmp_path / "run", steps=4), folder, "move it")


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"step": 3, "lo'])
def test_a_last_line_without_an_end_is_kept_if_it_is_complete(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}' + end)
    assert [values["step"] for _, values in read_log(path)] == [1, 2]


@pytest.mark.parametrize("line", [b"", b'{"step": 2, "lo', b"\xff", b"[1]", b"3"])
def test_a_damaged_line_of_a_log_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 0.5}\n'
    path.write_bytes(good + good + line + b"\n" + good)
    with refused(f"{path}: line 3"):
        read_log(path)


def write_line(folder, values, loggers=()):
    """Let MetricsLog write a line of step 3; return the log's path."""
    log = MetricsLog()
    log.path = folder / "metrics.jsonl"
    log.began = 0.0
    log.run_id = "12345678"
    log.attempt = 1
    trainer = SimpleNamespace(loggers=loggers, is_global_zero=True, global_step=3, world_size=1)
    log._write(trainer, values)
    return log.path


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_with_a_value_that_is_not_finite_is_json(tmp_path, value):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = write_line(tmp_path, {"loss": 0.5, "fd_1": value})
    assert json.loads(path.read_text(), parse_constant=refuse)["fd_1"] is None
    [(_, values)] = read_log(path)
    assert values["loss"] == 0.5
    assert math.isnan(values["fd_1"])


# Loggers


def test_a_row_is_on_the_disk_at_once_in_all_loggers(tmp_path):
    """A run that is killed keeps its rows."""
    loggers = [CSVLogger(str(tmp_path / name), name="log", version="0") for name in ("a", "b")]
    write_line(tmp_path, {"loss": 0.5}, loggers)
    for name in ("a", "b"):
        assert (tmp_path / name / "log/0/metrics.csv").read_text() == "loss,step\n0.5,3\n"


def test_all_loggers_get_the_configuration_and_each_heldout_loss_once(make_config, tmp_path):
    loggers = []
    for name in ("a", "b"):
        folder = str(tmp_path / name)
        loggers.append(spec("lightning.pytorch.loggers.CSVLogger", save_dir=folder, version="x"))
    config = make_config()
    file = tmp_path / "loggers.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"logger": loggers}}))
    words = fit_words(config, tmp_path / "run", steps=4)
    at = words.index("--trainer.logger")
    succeed(*words[:at], "--config", file, *words[at + 2 :])
    for name in ("a", "b"):
        header, *rows = (tmp_path / name / "lightning_logs/x/metrics.csv").read_text().splitlines()
        column = header.split(",").index("heldout_loss")
        assert len([row for row in rows if row.split(",")[column]]) == 2
        assert len(rows) == 6
        logged = yaml.safe_load((tmp_path / name / "lightning_logs/x/hparams.yaml").read_text())
        assert logged["optimizer"]["init_args"]["lr"] == 0.01


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, {"offline": True, "project": "rectify"}),
        ({"WANDB_MODE": "offline", "WANDB_PROJECT": "mine"}, {"offline": True, "project": "mine"}),
        ({"WANDB_MODE": "disabled"}, {"offline": False, "project": "rectify"}),
        ({"WANDB_MODE": "online"}, {"offline": False, "project": "rectify"}),
        ({"WANDB_NAME": "mine", "WANDB_DIR": "there"}, {"name": "mine", "save_dir": "there"}),
    ],
)
def test_wandbs_variables_are_obeyed(make_config, tmp_path, monkeypatch, variables, expected):
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fit, "start_logger", lambda logger: None)
    config = make_config(callbacks=())
    config["trainer"]["logger"] = None
    words = [str(word) for word in fit_words(config, tmp_path / "run", steps=1)[1:]]
    at = words.index("--trainer.logger")
    fit.import_components()
    cli = fit.build([*words[:at], *words[at + 2 :]])
    options = cli.config.trainer.logger.init_args
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(("mode", "lines"), [("online", 1), ("disabled", 0)])
def test_a_command_that_waits_for_wandb_has_a_line(tmp_path, monkeypatch, capfd, mode, lines):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(WandbLogger, "experiment", None)
    fit.start_logger(WandbLogger(save_dir=tmp_path))
    assert capfd.readouterr().err.count("connecting to wandb") == lines


def test_a_rank_left_over_in_the_shell_silences_no_logger(make_config, tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = spec("lightning.pytorch.loggers.CSVLogger", save_dir=str(tmp_path), version="x")
    config = make_config(callbacks=())
    config["trainer"]["logger"] = logger
    words = fit_words(config, tmp_path / "run", steps=1)
    at = words.index("--trainer.logger")
    succeed(*words[:at], *words[at + 2 :])
    assert (tmp_path / "lightning_logs/x/metrics.csv").exists()
