"""A leaner loop changes nothing but the time that a step takes."""

import inspect

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call
from torch.utils.data import DataLoader

from trainer.lean import HEARD, OWN, lean

HOOKS = sorted(name for name, _ in inspect.getmembers(Callback, inspect.isfunction) if name.startswith("on_"))


class Told(Callback):
    """Notes every hook that it hears."""

    def __init__(self):
        self.said = []


def hook(name):
    def note(self, trainer, module, *arguments):
        self.said.append((name, trainer.global_step, len(arguments)))

    return note


for name in HOOKS:
    setattr(Told, name, hook(name))


class Plain(LightningModule):
    """One weight, and a hook of its own that logs."""

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

    interval = "step"

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


class Logs(Callback):
    """A callback that logs, as a user's may."""

    def on_train_batch_end(self, trainer, module, outputs, batch, number):
        module.log("loss", outputs["loss"], on_step=True, on_epoch=True, batch_size=len(batch))

    def on_before_backward(self, trainer, module, loss):
        module.log("before", loss.detach())


def trained(tmp_path, leanly, **options):
    """Return what four steps left behind: weights, logged values, hooks heard, and all that Lightning counts."""
    module, told = Plain(), Told()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=4,
        gradient_clip_val=0.5,
        callbacks=[told, Logs()],
        default_root_dir=tmp_path,
        accelerator="cpu",
        **quiet,
        **options,
    )
    batches = DataLoader(torch.arange(48.0).view(16, 3), batch_size=2)
    before = call._call_callback_hooks
    if leanly:
        with lean(trainer):
            assert (call._call_callback_hooks is before) == ("profiler" in options)
            trainer.fit(module, batches, batches)
    else:
        trainer.fit(module, batches, batches)
    assert call._call_callback_hooks is before
    return (
        module.weight.tolist(),
        {name: value.item() for name, value in trainer.callback_metrics.items()},
        told.said,
        trainer.fit_loop.state_dict(),
    )


OPTIONS: list[dict] = [
    {"num_sanity_val_steps": 0},  # a step in each batch: ours throughout
    {"accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 2, "profiler": "simple"},
    {"check_val_every_n_epoch": None, "val_check_interval": 3},
    {"max_epochs": 3, "limit_train_batches": 3, "check_val_every_n_epoch": 2},
    {"limit_val_batches": 0, "gradient_clip_algorithm": "value"},
]


@pytest.mark.parametrize("schedule", ["step", "epoch", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_weights_logged_values_hooks_and_counts_are_the_same(tmp_path, monkeypatch, options, schedule):
    """Of this version of Lightning: all hooks are heard, in the same order, at the same steps."""
    monkeypatch.setattr(Plain, "interval", schedule)
    if schedule == "none":
        monkeypatch.setattr(Plain, "configure_optimizers", lambda self: torch.optim.AdamW(self.parameters(), 0.1))
    plain, quick = trained(tmp_path, False, **options), trained(tmp_path, True, **options)
    assert quick == plain
    assert {name for name, *_ in plain[2]} >= set(HEARD)


def test_the_wrappers_are_what_this_version_of_lightning_has():
    """A new one must be looked at: names and arguments of what is stood in for."""
    given = [list(inspect.signature(getattr(call, f"_call_{kind}")).parameters) for kind in ("callback_hooks", "strategy_hook")]
    assert given == [
        ["trainer", "hook_name", "args", "monitoring_callbacks", "kwargs"],
        ["trainer", "hook_name", "args", "kwargs"],
    ]
    module = list(inspect.signature(call._call_lightning_module_hook).parameters)
    assert module == ["trainer", "hook_name", "args", "pl_module", "kwargs"]
    assert all(hasattr(LightningModule, name) for name in HEARD + OWN) and all(hasattr(Callback, name) for name in HEARD)
