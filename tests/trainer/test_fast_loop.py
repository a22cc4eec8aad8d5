"""The fast loop changes nothing but the time of a step."""

import inspect

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer import call
from torch.utils.data import DataLoader

from models.condition import Unconditional
from models.denoiser import Denoiser
from models.interpolant import Linear
from models.nets.mlp import MLP
from models.prediction import Velocity
from tests.distributed.runs import equal, final_state
from tests.helpers.refusals import refused
from tests.helpers.results import result_lines
from tests.helpers.teachers import save_teacher
from tests.helpers.training import small_config, spec, train
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
            assert call._call_callback_hooks is not before
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


def test_a_profiler_is_refused(tmp_path):
    with refused("fast_loop", "profiler"):
        train_four_steps(tmp_path, True, "none", profiler="simple")


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """Return the run of a student and the fake network of its objective, by its options."""
    folder = tmp_path_factory.mktemp("distilled")
    net = spec("models.nets.mlp.MLP", width=16, depth=1)
    teacher = Denoiser(MLP(width=16, depth=1), Linear(), Velocity())
    save_teacher(folder / "teacher", teacher, Unconditional())
    frozen = spec("FrozenTeacher", run=str(folder / "teacher"))
    objective = spec("DistributionMatching", teacher=frozen, student_every=2, fake_rate=3.0)
    source = spec("Plane", distribution="two_moons")
    config = small_config(source, net, objective=objective)
    config["trainer"]["callbacks"] = ["EMA"]
    config["metrics"] = {"every": 1}

    def run(name, *words):
        return train(config, folder / name, *words, steps=6)

    return run


def logged(run):
    """Return a run's log without the circumstances and the configuration's checksum."""
    return [{**line, "run": None} for line in result_lines(run)]


@pytest.mark.parametrize("words", [(), ("--trainer.accumulate_grad_batches", "2")])
def test_a_run_has_the_same_checkpoint_and_log(distilled, words):
    """In half of the steps only the fake network is trained."""
    name = "accumulated" if words else "plain"
    plain = distilled(name, *words)
    fast = distilled(f"{name}-fast", "--fast_loop", *words)
    assert equal(final_state(fast, 6), final_state(plain, 6))
    assert logged(fast) == logged(plain)


def test_a_run_may_be_resumed_with_the_other_loop(distilled):
    distilled("resumed", "--trainer.max_steps", "3")
    resumed = distilled("resumed", "--fast_loop", "true")
    uninterrupted = distilled("uninterrupted")
    assert equal(final_state(resumed, 6), final_state(uninterrupted, 6))


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
