"""A resumed run with another configuration: what may change, what is refused, what is in force."""

from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from deploy.changes import list_changes
from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.helpers.commands import run_command
from tests.helpers.refusals import assert_refused
from tests.helpers.training import fit_words, small_config, spec, train

RATE = 0.01
EMA = spec("EMA", decay=0.5)
COSINE = spec("CosineAnnealingLR", T_max=8)


def make_config(**more: Any) -> dict[str, Any]:
    """Return a configuration with an average and clipped gradients, and more entries."""
    source = spec("Plane", distribution="two_moons")
    config = small_config(source, net=spec("models.nets.mlp.MLP", width=16, depth=1), lr=RATE)
    trainer = {**config["trainer"], "callbacks": [EMA], "gradient_clip_val": 1.0}
    return {**config, "trainer": trainer, "metrics": {"every": 1}, **more}


CONFIG = make_config()


@pytest.fixture
def begun(tmp_path) -> Path:
    """Return a run of two steps."""
    return train(CONFIG, tmp_path / "run", steps=2)


def saved(run: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a run."""
    return read_checkpoint(newest_checkpoint(run), resume=True)


def group_of(run: Path) -> dict[str, Any]:
    """Return the options of the optimizer's group in a run's newest checkpoint."""
    (group,) = saved(run)["optimizer_states"][0]["param_groups"]
    return group


def in_force(run: Path) -> dict[str, Any]:
    """Return the configuration in a run's folder."""
    return yaml.safe_load((run / "config.yaml").read_text())


def without_callbacks() -> dict[str, Any]:
    """Return the configuration without its average."""
    return {**CONFIG, "trainer": {**CONFIG["trainer"], "callbacks": []}}


NEEDS_OVERRIDE = {
    "lr": (("--optimizer.lr", "2e-5"), ("optimizer.lr", 2e-05, RATE)),
    "weight decay": (("--optimizer.weight_decay", "0.5"), ("optimizer.weight_decay", 0.5)),
    "betas": (("--optimizer.betas", "[0.5,0.9]"), ("optimizer.betas", 0.5, 0.999)),
    "schedule": (
        ("--lr_scheduler", "ExponentialLR", "--lr_scheduler.gamma", "0.5"),
        ("lr_scheduler", "ExponentialLR", "null"),
    ),
    "objective": (
        ("--model.objective", "Matching", "--model.objective.times", "LogitNormal"),
        ("model.objective.times", "LogitNormal", "null"),
    ),
    "decay": (("--trainer.callbacks.init_args.decay", "0.9"), ("EMA.decay", 0.9, 0.5)),
    "clipping": (("--trainer.gradient_clip_val", "2"), ("trainer.gradient_clip_val", 2, 1)),
    "samples": (("--data.source.seed", "3"), ("data.source.seed", 3, 0)),
}


@pytest.mark.parametrize(("words", "named"), NEEDS_OVERRIDE.values(), ids=NEEDS_OVERRIDE)
def test_a_setting_that_changes_what_is_learned_is_refused(capfd, begun, words, named):
    before = (begun / "config.yaml").read_bytes()
    assert_refused(capfd, fit_words(CONFIG, begun, *words, steps=4), begun, "--override", *named)
    assert (begun / "config.yaml").read_bytes() == before
    assert saved(begun)["global_step"] == 2
    train(CONFIG, begun, steps=4)


def test_an_average_that_is_left_out_is_refused(capfd, begun):
    words = fit_words(without_callbacks(), begun, steps=4)
    assert_refused(capfd, words, begun, "trainer.callbacks.EMA", "null", "--override")
    assert "ema" in saved(train(CONFIG, begun, steps=4))


@pytest.mark.parametrize("override", [(), ("--override",)], ids=["", "override"])
def test_another_class_of_optimizer_is_refused(capfd, begun, override):
    other = {**CONFIG, "optimizer": spec("SGD", lr=RATE)}
    words = fit_words(other, begun, *override, steps=4)
    assert_refused(capfd, words, begun, "optimizer", "SGD", "AdamW", "--model.initial")


def test_settings_that_are_meant_are_in_force(capfd, begun):
    """Learning rate and weight decay are new, the moments go on; the next command needs no word."""
    new = {**CONFIG, "optimizer": spec("AdamW", lr=2e-5, weight_decay=0.5)}
    capfd.readouterr()
    train(new, begun, "--override", steps=4)
    err = capfd.readouterr().err
    assert "optimizer.lr is 2e-05, it was 0.01" in err
    assert "trainer.max_steps is 4, it was 2" in err
    group = group_of(begun)
    assert (group["lr"], group["weight_decay"]) == (2e-5, 0.5)
    state = saved(begun)["optimizer_states"][0]["state"]
    assert {int(value["step"]) for value in state.values()} == {4}
    written = in_force(begun)
    assert written["optimizer"]["init_args"]["lr"] == 2e-5
    assert written["override"] is False
    train(new, begun, steps=5)
    assert "optimizer" not in capfd.readouterr().err


def test_a_new_schedule_goes_on_as_if_the_run_had_begun_with_it(begun):
    train({**CONFIG, "lr_scheduler": COSINE}, begun, "--override", steps=5)
    assert group_of(begun)["lr"] == pytest.approx(RATE * (1 + cos(pi * 5 / 8)) / 2)
    again = train({**CONFIG, "lr_scheduler": COSINE}, begun, steps=6)
    assert group_of(again)["lr"] == pytest.approx(RATE * (1 + cos(pi * 6 / 8)) / 2)


def test_a_schedule_may_be_replaced_by_none(tmp_path):
    run = train({**CONFIG, "lr_scheduler": COSINE}, tmp_path / "run", steps=4)
    assert group_of(run)["lr"] == pytest.approx(RATE / 2)
    train(CONFIG, run, "--override", steps=6)
    assert group_of(run)["lr"] == RATE


def test_a_cosine_that_is_over_does_not_rise_again(capfd, tmp_path):
    short = {**CONFIG, "lr_scheduler": spec("CosineAnnealingLR", T_max=2)}
    run = train(short, tmp_path / "run", steps=2)
    words = fit_words(short, run, steps=4)
    assert_refused(capfd, words, "lr_scheduler.T_max", 2, "trainer.max_steps", 4, "--override")
    long = {**CONFIG, "lr_scheduler": spec("CosineAnnealingLR", T_max=4)}
    assert_refused(capfd, fit_words(long, run, steps=4), run, "lr_scheduler.T_max", 4, 2)
    train(long, run, "--override", steps=3)
    assert group_of(run)["lr"] == pytest.approx(RATE * (1 + cos(pi * 3 / 4)) / 2)


WARM_UP = spec("WarmUp", warmup=2, decay="linear")


def test_a_warm_up_is_resumed_exactly(tmp_path):
    config = {**CONFIG, "lr_scheduler": spec("WarmUp", warmup=2, decay="linear", steps=6)}
    whole = train(config, tmp_path / "whole", steps=6)
    for steps in (1, 4, 6):
        resumed = train(config, tmp_path / "resumed", steps=steps)
    expected, found = saved(whole), saved(resumed)
    assert found["lr_schedulers"] == expected["lr_schedulers"]
    for key, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][key], value)


def test_a_warm_up_decays_until_the_last_step(tmp_path):
    run = train({**CONFIG, "lr_scheduler": WARM_UP}, tmp_path / "run", steps=5)
    assert group_of(run)["lr"] == pytest.approx(0)
    run = train({**CONFIG, "lr_scheduler": WARM_UP}, tmp_path / "longer", steps=8)
    assert saved(run)["lr_schedulers"][0]["steps"] == 8
    assert in_force(run)["lr_scheduler"]["init_args"]["steps"] is None


def test_more_steps_change_a_decay_only_if_that_is_meant(capfd, tmp_path):
    config = {**CONFIG, "lr_scheduler": WARM_UP}
    run = train(config, tmp_path / "run", steps=4)
    assert_refused(capfd, fit_words(config, run, steps=6), run, "lr_scheduler.steps", 6, 4)
    train(config, run, "--lr_scheduler.steps", "4", steps=5)
    assert group_of(run)["lr"] == 0
    train(config, run, "--override", steps=6)
    train(config, run, "--override", steps=10)
    assert group_of(run)["lr"] == 0
    assert in_force(run)["trainer"]["max_steps"] == 10


def test_a_constant_rate_goes_on_with_more_steps(tmp_path):
    config = {**CONFIG, "lr_scheduler": spec("WarmUp", warmup=2, decay="constant")}
    run = train(config, tmp_path / "run", steps=2)
    train(config, run, steps=3)
    assert group_of(run)["lr"] == RATE


def test_other_settings_may_change_and_are_shown(capfd, begun):
    words = ("--metrics.every", "2", "--checkpoints.keep", "1", "--data.workers", "0")
    capfd.readouterr()
    train(CONFIG, begun, *words, "--trainer.val_check_interval", "7", steps=4)
    err = capfd.readouterr().err
    assert "metrics.every is 2, it was 1" in err
    assert "checkpoints.keep is 1, it was 2" in err
    assert "trainer.val_check_interval is 7, it was 500" in err
    assert "data.workers" not in err


def test_a_finished_run_with_other_settings_is_refused(capfd, begun):
    words = ("--optimizer.lr", "0.5")
    assert_refused(capfd, fit_words(CONFIG, begun, *words, steps=2), begun, "optimizer.lr", 0.5)
    words = (*words, "--override")
    assert_refused(capfd, fit_words(CONFIG, begun, *words, steps=2), begun, "trainer.max_steps")


def test_a_run_of_another_denoiser_cannot_be_overridden(capfd, begun):
    words = ("--model.denoiser.net.width", "32", "--override")
    assert_refused(capfd, fit_words(CONFIG, begun, *words, steps=4), begun, "width", "--out")


def test_an_argument_of_another_version_is_no_change():
    before = {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 1, "removed": 2}}}
    now = {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 1, "added": 3}}, "more": 4}
    assert list_changes(before, now) == []


def test_parts_of_a_mixture_are_compared_one_by_one():
    def mixture(path):
        sources = [spec("Pairs", path=path, guidance=2.0), spec("Pairs", path="b", guidance=1.0)]
        return {"data": {"source": spec("Mixed", sources=sources)}}

    (change,) = list_changes(mixture("a"), mixture("c"))
    assert change == ("data.source.sources[0].path", "a", "c")


def test_a_runs_configuration_has_no_logger_that_was_derived(tmp_path, monkeypatch):
    """Given to another run, it does not log into the first one's folder, name and id."""
    folders = []
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("deploy.fit.start_logger", lambda logger: folders.append(logger.save_dir))
    config = {**CONFIG, "trainer": {"accelerator": "cpu", "max_steps": 1}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    assert run_command("fit", "--config", tmp_path / "x.yaml", "--out", tmp_path / "first") == 0
    assert in_force(tmp_path / "first")["trainer"]["logger"] is None
    words = ("fit", "--config", tmp_path / "first/config.yaml", "--out", tmp_path / "second")
    assert run_command(*words) == 0
    assert folders == [str(tmp_path / "first"), str(tmp_path / "second")]


def test_a_runs_configuration_trains_it_on(begun):
    """What was written means the same when it is read."""
    words = ("fit", "--config", begun / "config.yaml", "--trainer.max_steps", 3)
    assert run_command(*words) == 0
    assert saved(begun)["global_step"] == 3
