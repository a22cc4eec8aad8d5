"""The optimizer and the schedule of a configuration: what they optimize, and what is refused."""

from functools import partial

import pytest
import torch
import yaml
from torch.optim import lr_scheduler

from models.checkpoint import newest_checkpoint, read_checkpoint
from tests.helpers.refusals import assert_refused, refused
from tests.helpers.training import fit_words, small_config, spec, train
from trainer.optimization import OptimizedModule, ParameterGroup
from trainer.schedules import WarmUp


class TwoWeights(OptimizedModule):
    """Two weights, the second of which has ten times the learning rate."""

    def __init__(self):
        super().__init__()
        self.slow = torch.nn.Parameter(torch.ones(3))
        self.fast = torch.nn.Parameter(torch.ones(2))

    def training_step(self, batch, _):
        return (self.slow * batch).sum()

    def parameter_groups(self):
        return [ParameterGroup([self.slow]), ParameterGroup([self.fast], 10.0)]


class OneGroup(TwoWeights):
    """The same weights in the group that a module has by default."""

    def parameter_groups(self):
        return OptimizedModule.parameter_groups(self)


def test_by_default_one_group_has_all_parameters_in_order():
    module = OneGroup()
    module.make_optimizer = partial(torch.optim.SGD, lr=0.5)
    (group,) = module.configure_optimizers().param_groups
    assert group["lr"] == 0.5
    assert [id(value) for value in group["params"]] == [id(module.slow), id(module.fast)]


def test_a_schedule_multiplies_the_learning_rate_of_every_group():
    """It is stepped after every optimizer step, and starts at the learning rates of the groups."""
    module = TwoWeights()
    module.make_optimizer = partial(torch.optim.SGD, lr=0.5)
    module.make_lr_scheduler = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    configured = module.configure_optimizers()
    assert configured["lr_scheduler"]["interval"] == "step"
    configured["optimizer"].step()
    configured["lr_scheduler"]["scheduler"].step()
    assert [group["lr"] for group in configured["optimizer"].param_groups] == [0.25, 2.5]


CONFIG = small_config(
    spec("Plane", distribution="two_moons"),
    net=spec("models.nets.mlp.MLP", width=16, depth=1),
    lr=0.01,
)


def test_an_optimizer_on_the_command_line_replaces_that_of_the_configuration(tmp_path):
    run = tmp_path / "run"
    words = ("--optimizer", "SGD", "--optimizer.lr", "0.1", "--optimizer.momentum", "0.5")
    schedule = ("--lr_scheduler", "ExponentialLR", "--lr_scheduler.gamma", "0.5")
    train(CONFIG, run, *words, *schedule, steps=3)
    state = read_checkpoint(newest_checkpoint(run), resume=True)["optimizer_states"][0]
    (group,) = state["param_groups"]
    assert group["momentum"] == 0.5
    assert group["initial_lr"] == 0.1
    assert group["lr"] == pytest.approx(0.1 * 0.5**3)
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["optimizer"]["class_path"] == "torch.optim.SGD"
    assert written["optimizer"]["init_args"]["lr"] == 0.1


def test_a_written_configuration_trains_the_same_run(tmp_path):
    first = train(CONFIG, tmp_path / "first", steps=3)
    second = train(first / "config.yaml", tmp_path / "second", steps=3)
    weights = read_checkpoint(newest_checkpoint(first))["state_dict"]
    again = read_checkpoint(newest_checkpoint(second))["state_dict"]
    assert all(torch.equal(value, again[key]) for key, value in weights.items())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--optimizer", "null"), ("optimizer", "--optimizer AdamW")),
        (("--optimizer", "AdmW"), ("optimizer", "`AdmW`", "`AdamW`")),
        (("--optimizer.lrr", "1"), ("optimizer", "AdamW", "`lrr`", "`lr`")),
        (("--optimizer.lr", "x"), ("optimizer", "lr", "x")),
        (("--optimizer.lr", "-1"), ("optimizer", "learning rate", "-1")),
        (("--optimizer.amsgrad",), ("optimizer.amsgrad", "true")),
        (("--optimizer", "models.denoiser.Denoiser"), ("optimizer", "Denoiser")),
        (("--optimizer", "os.system"), ("optimizer", "os.system")),
        (("--lr_scheduler", "CosinAnnealingLR"), ("lr_scheduler", "`CosineAnnealingLR`")),
        (("--lr_scheduler", "CosineAnnealingLR"), ("lr_scheduler", "T_max")),
        (
            ("--lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"),
            ("lr_scheduler", "ReduceLROnPlateau"),
        ),
        (("--lr_scheduler", "ReduceLROnPlateau"), ("lr_scheduler", "ReduceLROnPlateau")),
        (("--lr_scheduler", "SequentialLR"), ("lr_scheduler", "SequentialLR", "WarmUp")),
        (
            ("--lr_scheduler", "ChainedScheduler", "--lr_scheduler.schedulers", "[]"),
            ("lr_scheduler", "ChainedScheduler", "WarmUp"),
        ),
        (
            ("--lr_scheduler", "WarmUp", "--lr_scheduler.warmup", "9", "--lr_scheduler.steps", "5"),
            ("lr_scheduler.steps is 5", "lr_scheduler.warmup is 9"),
        ),
        (
            ("--lr_scheduler", "WarmUp", "--lr_scheduler.decay", "sine"),
            ("lr_scheduler.decay", "`sine`", "`cosine`"),
        ),
        (("--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "0"), ("lr_scheduler",)),
        (("--optimizer.lr", "true"), ("optimizer.lr", "float")),
        (("--optimizer.capturable", "true"), ("optimizer", "capturable")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else None,
)
def test_a_bad_optimizer_or_schedule_is_refused(capfd, tmp_path, words, named):
    assert_refused(capfd, fit_words(CONFIG, tmp_path / "run", *words, steps=2), *named)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("schedule", "kept"),
    [
        (partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=4), False),
        (partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=1.0), False),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=4, eta_min=0.1), False),
        (partial(lr_scheduler.CosineAnnealingLR, T_max=4), True),
        (partial(WarmUp, warmup=2, floor=0.5, steps=4), True),
    ],
    ids=["OneCycleLR", "CyclicLR", "a floor", "CosineAnnealingLR", "WarmUp"],
)
def test_a_schedule_keeps_the_ratio_of_the_groups(schedule, kept):
    """That of distribution matching's fake is its fake_rate."""
    module = TwoWeights()
    module.make_optimizer = partial(torch.optim.SGD, lr=0.1)
    module.make_lr_scheduler = schedule
    if not kept:
        with refused("lr_scheduler", schedule.func.__name__, "fake_rate", 10):
            module.build_optimization()
        return
    optimizer, built = module.build_optimization()
    for _ in range(3):
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        assert fast == pytest.approx(10 * slow)
        optimizer.step()
        built.step()


def test_a_configuration_without_an_optimizer_is_refused(capfd, tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "optimizer"}
    words = fit_words(config, tmp_path / "run", steps=2)
    assert_refused(capfd, words, "optimizer", "--optimizer AdamW")


def test_a_module_of_another_kind_is_refused(capfd, tmp_path):
    module = "lightning.pytorch.demos.boring_classes.BoringModel"
    words = fit_words({**CONFIG, "model": module}, tmp_path / "run", steps=2)
    assert_refused(capfd, words, "model", "BoringModel", "OptimizedModule")
