"""A training step without Lightning's bookkeeping that it does not need (`--fast_loop true`).

In every step Lightning makes some five hundred checks and calls, most of which have the same result
in every step of a run. This loop decides them once, and calls only the hooks that do something.
Weights, logged values, the order of hooks and all of Lightning's counters are the same. README.md
says what it buys and what it costs.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor

from data.batch import Batch
from data.datamodule import DataModule
from trainer.engine.trainer_parts import parts_of

# Hooks of a step that callbacks and the module have; those of LightningModule do nothing.
STEP_HOOKS: tuple[str, ...] = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)

# Hooks of a step that only the module has.
MODULE_HOOKS: tuple[str, ...] = (
    "optimizer_zero_grad",
    "optimizer_step",
    "configure_gradient_clipping",
    "lr_scheduler_step",
)

# Lightning's functions that call hooks, and the methods of `DirectHooks` that replace them.
REPLACEMENTS = {
    "_call_callback_hooks": "call_callbacks",
    "_call_lightning_module_hook": "call_module",
    "_call_strategy_hook": "call_strategy",
}


@runtime_checkable
class MayBeIdle(Protocol):
    """A callback whose hooks do nothing in this run if it is idle."""

    idle: bool


class DirectHooks:
    """Calls the hooks of a training step without profiler, log messages and hooks that do nothing.

    Args:
        trainer: the trainer whose hooks are called.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.parts = parts_of(trainer)
        self.originals: dict[str, Callable[..., Any]] = {}
        for function, method in REPLACEMENTS.items():
            self.originals[method] = getattr(call, function)

    @cached_property
    def trained_module(self) -> LightningModule:
        """The module that is trained."""
        return self.trainer.lightning_module

    @cached_property
    def callback_hooks(self) -> dict[str, list[Callable[..., None]]]:
        """The hooks of callbacks that do something in this run, by name."""
        hooks: dict[str, list[Callable[..., None]]] = {name: [] for name in STEP_HOOKS}
        for callback in self.parts.callbacks:
            if isinstance(callback, MayBeIdle) and callback.idle:
                continue
            for name in STEP_HOOKS:
                hook = getattr(callback, name)
                if getattr(hook, "__func__", None) is not getattr(Callback, name):
                    hooks[name].append(hook)
        return hooks

    @cached_property
    def default_hooks(self) -> set[str]:
        """The module's hooks that it inherits from LightningModule.

        Others may call `self.log`, which needs Lightning's own function.
        """
        cls = type(self.trained_module)
        names = set()
        for name in STEP_HOOKS + MODULE_HOOKS:
            if getattr(cls, name) is getattr(LightningModule, name):
                names.add(name)
        return names

    def call_callbacks(self, trainer: Trainer, name: str, *args: Any, **options: Any) -> None:
        """Call a hook of all callbacks."""
        if name not in STEP_HOOKS:
            return self.originals["call_callbacks"](trainer, name, *args, **options)
        # `self.log` needs the name of the hook that it is called in.
        attributes = vars(self.trained_module)
        before = attributes["_current_fx_name"]
        attributes["_current_fx_name"] = name
        for hook in self.callback_hooks[name]:
            hook(trainer, self.trained_module, *args)
        attributes["_current_fx_name"] = before

    def call_module(self, trainer: Trainer, name: str, *args: Any, **options: Any) -> Any:
        """Call a hook of the module."""
        if name not in self.default_hooks:
            return self.originals["call_module"](trainer, name, *args, **options)
        if name in STEP_HOOKS:
            return None
        if name == "configure_gradient_clipping":
            # Lightning compares the Trainer's arguments with themselves first.
            limit = trainer.gradient_clip_val or 0.0
            algorithm = trainer.gradient_clip_algorithm or GradClipAlgorithmType.NORM
            return trainer.precision_plugin.clip_gradients(args[0], limit, algorithm)
        return getattr(self.trained_module, name)(*args, **options)

    def call_strategy(self, trainer: Trainer, name: str, *args: Any, **options: Any) -> Any:
        """Call a hook of the strategy; a `Batch` moves itself to the device."""
        datamodule = self.parts.datamodule
        moves_batch = name == "batch_to_device" and isinstance(args[0], Batch)
        if moves_batch and isinstance(datamodule, DataModule):
            batch = args[0].to(trainer.strategy.root_device)
            return datamodule.on_after_batch_transfer(batch, 0)
        return self.originals["call_strategy"](trainer, name, *args, **options)


class FastLoop(_TrainingEpochLoop):
    """Lightning's loop over batches, without checks that have the same result in every step.

    Args:
        trainer: the trainer whose loop it replaces.
        hooks: calls hooks.
    """

    def __init__(self, trainer: Trainer, hooks: DirectHooks):
        super().__init__(trainer, trainer.fit_loop.min_steps, trainer.fit_loop.max_steps)
        self.hooks = hooks

    @cached_property
    def is_simple(self) -> bool:
        """Whether a step has a single optimizer, and the module has no hook that may skip it."""
        automatic = self.hooks.trained_module.automatic_optimization
        return automatic and "on_train_batch_start" in self.hooks.default_hooks

    @cached_property
    def check_interval(self) -> float:
        """Batches between calls of Lightning's `on_advance_end`, which decides whether to validate.

        It is 1 where that depends on more than the number of batches.
        """
        trainer = self.trainer
        if trainer.lr_scheduler_configs or trainer.check_val_every_n_epoch:
            return 1
        if isinstance(trainer.limit_train_batches, int):
            return 1
        if trainer.enable_validation and any(self.val_loop.max_batches):
            return trainer.val_check_batch or 1
        return float("inf")

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        if self.is_simple:
            return self.automatic_optimization.optim_progress.optimizer.step.total.completed
        return super().global_step

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Train on one batch."""
        if self.restarting or not self.is_simple:
            return super().advance(data_fetcher)
        trainer = self.trainer
        hooks = self.hooks
        progress = self.batch_progress

        # 1. Read a batch, and move it to the device.
        batch = trainer.precision_plugin.convert_input(next(data_fetcher)[0])
        if not isinstance(batch, Batch):
            batch = hooks.trained_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = hooks.call_strategy(trainer, "batch_to_device", batch, dataloader_idx=0)
        progress.is_last_batch = data_fetcher.done
        progress.increment_ready()
        batch_idx = progress.current.ready - 1

        # 2. Prepare logging.
        logger_connector = trainer._logger_connector
        results = self._results
        logger_connector._first_loop_iter = logger_connector._first_loop_iter is None
        results.batch = batch
        results.batch_size = None

        # 3. Make the training step.
        hooks.call_callbacks(trainer, "on_train_batch_start", batch, batch_idx)
        progress.increment_started()
        outputs = self._optimize(batch, batch_idx)
        progress.increment_processed()

        # 4. Step the learning rate schedules.
        if trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if self._num_ready_batches_reached():
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)

        # 5. Finish the batch.
        hooks.call_callbacks(trainer, "on_train_batch_end", outputs, batch, batch_idx)
        hooks.call_module(trainer, "on_train_batch_end", outputs, batch, batch_idx)
        if results:
            logger_connector.on_batch_end()
        results.batch = None
        progress.increment_completed()
        if results:
            logger_connector.update_train_step_metrics()

    def _optimize(self, batch: Any, batch_idx: int) -> Any:
        """Make an optimizer step, and return what the module's training step returned."""
        trainer = self.trainer
        hooks = self.hooks
        automatic = self.automatic_optimization
        optimizer = trainer.optimizers[0]
        if trainer.accumulate_grad_batches > 1:
            arguments = OrderedDict(batch=batch, batch_idx=batch_idx)
            return automatic.run(optimizer, batch_idx, arguments)

        strategy = trainer.strategy
        progress = automatic.optim_progress.optimizer
        outputs: dict[str, Any] = {}
        attributes = vars(hooks.trained_module)

        def closure() -> Tensor:
            with torch.enable_grad():
                # Zero the gradients, before the forward pass uses their memory.
                progress.zero_grad.increment_ready()
                hooks.call_callbacks(trainer, "on_before_zero_grad", optimizer)
                hooks.call_module(trainer, "on_before_zero_grad", optimizer)
                progress.zero_grad.increment_started()
                epoch = trainer.current_epoch
                hooks.call_module(trainer, "optimizer_zero_grad", epoch, batch_idx, optimizer)
                progress.zero_grad.increment_completed()

                # Forward pass.
                attributes["_current_fx_name"] = "training_step"
                returned = strategy.training_step(batch, batch_idx)
                attributes["_current_fx_name"] = None

                # Backward pass.
                outputs.update(loss_by_name(returned))
                loss = outputs["loss"]
                outputs["loss"] = loss.detach().clone()
                strategy.backward(loss, optimizer)
                return outputs["loss"]

        # The optimizer calls the closure.
        progress.step.increment_ready()
        if "optimizer_step" in hooks.default_hooks:
            strategy.optimizer_step(optimizer, closure)
        else:
            wrapped = strategy._lightning_optimizers[0]
            epoch = trainer.current_epoch
            hooks.call_module(trainer, "optimizer_step", epoch, batch_idx, wrapped, closure)
        progress.step.increment_completed()
        return outputs

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate, if a validation is due."""
        progress = self.batch_progress
        is_last = progress.is_last_batch or self.trainer.should_stop
        if is_last or self.restarting or not self.is_simple:
            return super().on_advance_end(data_fetcher)
        if progress.total.ready % self.check_interval == 0:
            return super().on_advance_end(data_fetcher)
        if progress.current.ready % self.trainer.accumulate_grad_batches == 0:
            self._batches_that_stepped += 1


def loss_by_name(returned: Any) -> dict[str, Any]:
    """Return what a training step returned, as a dict with the loss."""
    if isinstance(returned, Tensor):
        return {"loss": returned}
    return returned or {}


@contextmanager
def fast_loop(trainer: Trainer) -> Iterator[None]:
    """Use the fast loop for a fit inside the block.

    Raises:
        ValueError: the trainer has a profiler, which measures what this loop leaves out.
    """
    # Set the loop.
    hooks = DirectHooks(trainer)
    if not isinstance(hooks.parts.profiler, PassThroughProfiler):
        raise ValueError(
            "fast_loop: trainer.profiler measures Lightning's own loop; leave out one of the two"
        )
    trainer.fit_loop.epoch_loop = FastLoop(trainer, hooks)

    # Replace Lightning's functions, and restore them at the end.
    for function, method in REPLACEMENTS.items():
        setattr(call, function, getattr(hooks, method))
    try:
        yield
    finally:
        for function, method in REPLACEMENTS.items():
            setattr(call, function, hooks.originals[method])
