"""Lightning's options do what it documents, or are refused with the option to use instead."""

import csv
import json
import logging

import pytest

from data.files import read_json
from deploy.run import run
from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.helpers.commands import run_command
from tests.helpers.refusals import assert_refused
from tests.helpers.training import fit_words, log_lines, small_config, spec, train

MOONS = spec("Plane", distribution="two_moons")
CONFIG = small_config(MOONS, net=spec("models.nets.mlp.MLP", width=16, depth=1), lr=0.01)


def with_trainer(**options):
    """Return a configuration with options of the Trainer, and data to validate on."""
    heldout = spec("Plane", distribution="two_moons", count=64, seed=1)
    data = {**CONFIG["data"], "heldout": heldout, "heldout_batches": 1}
    return {**CONFIG, "data": data, "trainer": {**CONFIG["trainer"], **options}}


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("max_epochs", "3", "trainer.max_steps"),
        ("min_epochs", "3", "trainer.max_steps"),
        ("min_steps", "3", "trainer.max_steps"),
        ("limit_train_batches", "3", "trainer.max_steps"),
        ("limit_train_batches", "0.5", "trainer.max_steps"),
        ("limit_train_batches", "1", "trainer.max_steps"),
        ("overfit_batches", "1", "data.source"),
        ("overfit_batches", "0.1", "data.source"),
        ("fast_dev_run", "true", "trainer.max_steps 1"),
        ("fast_dev_run", "1", "trainer.max_steps 1"),
        ("check_val_every_n_epoch", "1", "trainer.val_check_interval"),
        ("reload_dataloaders_every_n_epochs", "1", "epochs"),
        ("limit_test_batches", "1", "rectify evaluate"),
        ("limit_predict_batches", "1", "rectify evaluate"),
        ("log_every_n_steps", "1", "metrics.every"),
        ("enable_progress_bar", "true", "progress"),
        ("enable_progress_bar", "null", "progress"),
        ("enable_checkpointing", "false", "checkpoints.every"),
        ("barebones", "true", "fast_loop"),
        ("model_registry", "x", "leave it out"),
        ("limit_val_batches", "0.5", "data.heldout_batches"),
        ("accumulate_grad_batches", "0", "at least 1"),
        ("gradient_clip_val", "-1", "null"),
        ("gradient_clip_algorithm", "value", "trainer.gradient_clip_val"),
        ("precision", "64-true", "32-true"),
        ("max_time", "00:00:00:00", "00:01:00:00"),
        ("max_time", "{'seconds': 0}", "00:01:00:00"),
        ("max_time", "{'second': 9}", "minutes"),
        ("val_check_interval", "0.5", "val_check_interval"),
        ("strategy", "ddp_spawn", "ddp"),
        ("strategy", "ddp_fork", "ddp"),
        ("strategy", "ddp_notebook", "ddp"),
    ],
)
def test_an_option_without_a_meaning_is_refused_by_name(capfd, tmp_path, option, value, instead):
    words = fit_words(CONFIG, tmp_path / "run", f"--trainer.{option}", value, steps=2)
    assert_refused(capfd, words, f"trainer.{option}", value, instead)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("callback", "named"),
    [
        (spec("StochasticWeightAveraging", swa_lrs=0.1), ("StochasticWeightAveraging", "EMA")),
        (spec("WeightAveraging"), ("WeightAveraging", "EMA")),
        (
            spec("GradientAccumulationScheduler", scheduling={1: 2}),
            ("GradientAccumulationScheduler", "trainer.accumulate_grad_batches"),
        ),
        (spec("BatchSizeFinder"), ("BatchSizeFinder", "data.batch")),
        (spec("LearningRateFinder"), ("LearningRateFinder", "optimizer.lr")),
        (spec("LearningRateMonitor"), ("LearningRateMonitor", "trainer.logger")),
        (spec("EarlyStopping", monitor="heldout_loss"), ("EarlyStopping", "data.heldout")),
        (spec("Timer", duration="00:01:00:00", interval="epoch"), ("Timer", "interval", "epoch")),
        (spec("Timer", duration="00:01:00:00"), ("Timer", "trainer.max_time")),
        (spec("TQDMProgressBar"), ("TQDMProgressBar", "progress")),
        (spec("OnExceptionCheckpoint", dirpath="x"), ("OnExceptionCheckpoint", "checkpoints")),
        (spec("MetricsLog"), ("MetricsLog", "metrics.every")),
        (spec("ModelCheckpoint"), ("ModelCheckpoint", "every_n_train_steps")),
        (spec("ModelCheckpoint", every_n_epochs=1), ("every_n_epochs", "every_n_train_steps")),
    ],
    ids=lambda value: value.get("class_path") if isinstance(value, dict) else "",
)
def test_a_callback_that_cannot_work_is_refused(capfd, tmp_path, callback, named):
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": [callback]}}
    assert_refused(capfd, fit_words(config, tmp_path / "run", steps=2), *named)
    assert not (tmp_path / "run").exists()


def test_an_average_is_not_configured_twice(capfd, tmp_path):
    averages = [spec("EMA", decay=0.5), spec("EMA", decay=0.9)]
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": averages}}
    assert_refused(capfd, fit_words(config, tmp_path / "run", steps=2), "EMA", "twice")


@pytest.mark.parametrize(
    ("mode", "batches", "named"),
    [("min", 0, ("EarlyStopping", "trainer.limit_val_batches")), ("mx", 1, ("`mode`", "mx"))],
)
def test_early_stopping_that_cannot_work_is_refused(capfd, tmp_path, mode, batches, named):
    stopping = spec("EarlyStopping", monitor="heldout_loss", mode=mode)
    config = with_trainer(callbacks=[stopping], limit_val_batches=batches)
    assert_refused(capfd, fit_words(config, tmp_path / "run", steps=2), *named)


def test_a_run_that_does_not_validate_has_a_line(capfd, tmp_path):
    train(with_trainer(val_check_interval=3), tmp_path / "run", steps=2)
    err = capfd.readouterr().err
    assert "trainer.val_check_interval is 3" in err
    assert "data.heldout" in err


@pytest.mark.parametrize("key", ["out", "model.initial", "model.codec"])
def test_a_path_without_a_value_is_refused(capfd, tmp_path, key, monkeypatch):
    """It would be the current folder, or be ignored."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    words = fit_words(CONFIG, tmp_path / "run", f"--{key}", "", steps=2)
    assert_refused(capfd, words, key, "empty")
    assert list((tmp_path / "work").iterdir()) == []


def test_an_optimizer_that_cannot_make_a_step_is_refused(capfd, tmp_path):
    words = fit_words({**CONFIG, "optimizer": spec("SparseAdam")}, tmp_path / "run", steps=2)
    assert_refused(capfd, words, "optimizer", "dense gradients")


def test_a_callback_that_watches_an_unknown_value_is_refused(capfd, tmp_path):
    stopping = spec("EarlyStopping", monitor="loss_of_nobody")
    config = with_trainer(callbacks=[stopping], val_check_interval=1)
    words = fit_words(config, tmp_path / "run", steps=2)
    assert_refused(capfd, words, "trainer.callbacks", "loss_of_nobody", "heldout_loss")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("OneCycleLR", "--lr_scheduler.max_lr", "0.1", "--lr_scheduler.total_steps", "2"), "2"),
        (("CosineAnnealingLR", "--lr_scheduler.T_max", "3"), "T_max"),
    ],
    ids=["OneCycleLR", "CosineAnnealingLR"],
)
def test_a_schedule_that_ends_before_training_is_refused(capfd, tmp_path, words, named):
    command = fit_words(CONFIG, tmp_path / "run", "--lr_scheduler", *words, steps=4)
    assert_refused(capfd, command, "lr_scheduler", named, "trainer.max_steps", 4)


def test_a_schedule_may_end_with_training(tmp_path):
    words = ("--lr_scheduler", "OneCycleLR", "--lr_scheduler.max_lr", "0.1")
    train(CONFIG, tmp_path / "run", *words, "--lr_scheduler.total_steps", "3", steps=3)


def test_a_profiler_prints_its_report(tmp_path):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    source = logging.getLogger("lightning.pytorch.profilers")
    source.addHandler(handler)
    train(CONFIG, tmp_path / "run", "--trainer.profiler", "simple", steps=2)
    source.removeHandler(handler)
    assert "run_training_batch" in "\n".join(lines)


# A run that ends before trainer.max_steps


def end(config, run_folder, **options) -> int:
    """Train, and return the exit code."""
    try:
        return run_command(*fit_words(config, run_folder, **options))
    except SystemExit as ended:
        return int(ended.code or 0)


def step_of(run_folder) -> int:
    """Return the step of a run's newest checkpoint."""
    return read_checkpoint(newest_checkpoint(run_folder))["global_step"]


def test_a_limit_of_time_ends_the_command_not_the_run(tmp_path, capfd):
    """Each command has the time again: it makes at least a step. The last one ends with code 0."""
    config = with_trainer(max_time={"milliseconds": 1})
    for step in (1, 2):
        assert end(config, tmp_path / "run", steps=3) == 75
        assert step_of(tmp_path / "run") == step
        err = capfd.readouterr().err
        assert f"step {step} of 3" in err
        assert str(tmp_path / "run") in err
    assert end(config, tmp_path / "run", steps=3) == 0
    assert step_of(tmp_path / "run") == 3
    whole = train(CONFIG, tmp_path / "whole", "--metrics.every", "1", steps=3)
    expected = read_checkpoint(newest_checkpoint(whole))["state_dict"]
    found = read_checkpoint(newest_checkpoint(tmp_path / "run"))["state_dict"]
    assert all((value == found[key]).all() for key, value in expected.items())


def test_a_stage_that_was_stopped_is_not_recorded_as_done(tmp_path, inside):
    config = with_trainer(max_time={"milliseconds": 1}, max_steps=3)
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    stage = {"name": "fit", "fit": {"config": str(tmp_path / "config.yaml"), "out": "{out}/run"}}
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(json.dumps({"out": str(tmp_path / "out"), "stages": [stage]}))
    for code in (75, 75):
        with pytest.raises(SystemExit) as ended:
            run(pipeline)
        assert ended.value.code == code
        assert not (tmp_path / "out/stages/01-fit.json").exists()
    run(pipeline)
    assert (tmp_path / "out/stages/01-fit.json").exists()


def stopping_config(patience, **more):
    """Return a configuration that does not learn, and stops after some validations."""
    stopping = spec("EarlyStopping", monitor="heldout_loss", patience=patience, **more)
    config = with_trainer(callbacks=[stopping], val_check_interval=1)
    return {**config, "optimizer": spec("SGD", lr=0.0)}


def test_a_run_that_stops_early_is_finished(tmp_path, capfd):
    run_folder = tmp_path / "run"
    assert end(stopping_config(2), run_folder, steps=9) == 0
    assert step_of(run_folder) == 3
    record = read_json(run_folder / "finished.json")
    assert record["step"] == 3
    assert "heldout_loss" in record["reason"]
    assert "step 3 of 9" in capfd.readouterr().err

    # The same command finds it finished; with more patience it goes on.
    assert end(stopping_config(2), run_folder, steps=9) == 0
    assert f"{run_folder} is finished" in capfd.readouterr().err
    assert step_of(run_folder) == 3
    assert end(stopping_config(4), run_folder, steps=9) == 0
    assert "EarlyStopping.patience is 4, it was 2" in capfd.readouterr().err
    assert step_of(run_folder) == 5


def test_a_run_that_diverges_is_not_finished(tmp_path, capfd):
    config = stopping_config(5, divergence_threshold=1e-9)
    assert end(config, tmp_path / "run", steps=9) == 3
    assert "heldout_loss" in capfd.readouterr().err
    assert not (tmp_path / "run/finished.json").exists()


def test_callbacks_log_at_the_steps_of_the_log(tmp_path):
    """LearningRateMonitor writes to the logger with every line of the log."""
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(tmp_path), "name": "csv"},
    }
    config = with_trainer(callbacks=[spec("LearningRateMonitor", logging_interval="step")])
    (tmp_path / "x.yaml").write_text(
        json.dumps({**config, "trainer": {**config["trainer"], "logger": logger}})
    )
    out = ("--out", tmp_path / "run", "--metrics.every", 2, "--trainer.max_steps", 4)
    assert run_command("fit", "--config", tmp_path / "x.yaml", *out) == 0
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [2, 4]
    (found,) = (tmp_path / "csv").rglob("metrics.csv")
    with found.open() as file:
        rates = [line["lr-AdamW"] for line in csv.DictReader(file)]
    assert [float(rate) for rate in rates if rate] == [0.01, 0.01]
