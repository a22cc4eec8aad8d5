"""The faster training loop changes nothing but the time of a step."""

import inspect

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call
from torch.utils.data import DataLoader

from trainer.engine.fast_loop import MODULE_HOOKS, STEP_HOOKS, fast_loop

FUNCTIONS = inspect.getmembers(Callback, inspect.isfunction)
HOOKS = sorted(name for name, _ in FUNCTIONS if name.startswith("on_"))


class HookRecorder(Callback):
    """Records every call of a hook."""

    def __init__(self):
        self.calls = []


def recording_hook(name):
    def record(self, trainer, module, *arguments):
        self.calls.append((name, trainer.global_step, len(arguments)))

    return record


for name in HOOKS:
    setattr(HookRecorder, name, recording_hook(name))


class Model(LightningModule):
    """One weight; a hook of the module logs."""

    interval = "step"

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def training_step(self, batch, _):
        self.log("mean", batch.mean(), on_step=True, on_epoch=True)
        return (self.weight * batch).square().sum()

    def validation_step(self, batch, _):
        self.log("heldout", (self.weight * batch).sum())

    def on_train_batch_end(self, *_):
        self.log("sum", self.weight.sum())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.1)
        if self.interval == "none":
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        lr_scheduler = {"scheduler": schedule, "interval": self.interval}
        return {"optimizer": optimizer, "lr_scheduler": lr_scheduler}


class LoggingCallback(Callback):
    """A callback of the user's that logs."""

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        loss = outputs["loss"]
        module.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch))

    def on_before_backward(self, trainer, module, loss):
        module.log("before", loss.detach())


def train_four_steps(folder, fast, interval, **options):
    """Train four steps and return the results that must not depend on the loop.

    Returns weights, logged values, calls of hooks, and all progress that Lightning counts.
    """
    module = Model()
    module.interval = interval
    recorder = HookRecorder()
    trainer = Trainer(
        max_steps=4,
        gradient_clip_val=0.5,
        callbacks=[recorder, LoggingCallback()],
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    batches = DataLoader(torch.arange(48.0).view(16, 3), batch_size=2)
    before = call._call_callback_hooks
    if fast:
        with fast_loop(trainer):
            replaced = call._call_callback_hooks is not before
            assert replaced == ("profiler" not in options)
            trainer.fit(module, batches, batches)
    else:
        trainer.fit(module, batches, batches)
    assert call._call_callback_hooks is before
    return {
        "weights": module.weight.tolist(),
        "logged": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "calls": recorder.calls,
        "progress": trainer.fit_loop.state_dict(),
    }


OPTIONS: list[dict] = [
    {"num_sanity_val_steps": 0},  # one step for each batch: the fast loop makes every step
    {"accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 2, "profiler": "simple"},
    {"check_val_every_n_epoch": None, "val_check_interval": 3},
    {"max_epochs": 3, "limit_train_batches": 3, "check_val_every_n_epoch": 2},
    {"limit_val_batches": 0, "gradient_clip_algorithm": "value"},
]


@pytest.mark.parametrize("interval", ["step", "epoch", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_weights_logged_values_hooks_and_counts_are_the_same(tmp_path, options, interval):
    """All hooks of this version of Lightning are called, in the same order, at the same steps."""
    plain = train_four_steps(tmp_path, False, interval, **options)
    fast = train_four_steps(tmp_path, True, interval, **options)
    assert fast == plain
    assert {name for name, *_ in plain["calls"]} >= set(STEP_HOOKS)


@pytest.mark.parametrize(
    ("wrapper", "parameters"),
    [
        (
            "_call_callback_hooks",
            ["trainer", "hook_name", "args", "monitoring_callbacks", "kwargs"],
        ),
        ("_call_strategy_hook", ["trainer", "hook_name", "args", "kwargs"]),
        ("_call_lightning_module_hook", ["trainer", "hook_name", "args", "pl_module", "kwargs"]),
    ],
)
def test_the_replaced_functions_of_lightning_have_the_expected_parameters(wrapper, parameters):
    """If a new version of Lightning changes them, the faster loop must be revised."""
    assert list(inspect.signature(getattr(call, wrapper)).parameters) == parameters


def test_the_replaced_hooks_exist_in_lightning():
    assert all(hasattr(LightningModule, name) for name in STEP_HOOKS + MODULE_HOOKS)
    assert all(hasattr(Callback, name) for name in STEP_HOOKS)
