"""Lightning's loop asks some five hundred small questions in a training step. Ours asks those that a plain step has."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor

from data.batch import Batch
from data.stream import Stream

HEARD: tuple[str, ...] = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward")
HEARD += ("on_before_optimizer_step", "on_train_batch_end")  # by callbacks, and by the module: LightningModule's do nothing
OWN = ("optimizer_zero_grad", "optimizer_step", "configure_gradient_clipping", "lr_scheduler_step")  # of the module
WRAPPERS = {"_call_callback_hooks": "callbacks", "_call_lightning_module_hook": "module", "_call_strategy_hook": "strategy"}


class Direct:
    """Stands in for Lightning's wrappers of hooks in a training step: no profiler, no log line, no hooks that do nothing.

    Args:
        trainer: whose hooks are called, of a module that is a LightningModule.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.kept = trainer, {name: getattr(call, wrapper) for wrapper, name in WRAPPERS.items()}

    @cached_property
    def told(self) -> LightningModule:
        """The module that is trained."""
        return self.trainer.lightning_module

    @cached_property
    def heard(self) -> dict[str, list[Callable[..., None]]]:
        """The callbacks' hooks that do something in this run."""
        callbacks = [one for one in self.trainer.callbacks if not getattr(one, "idle", False)]  # type: ignore[attr-defined]
        hooks = {name: [getattr(callback, name) for callback in callbacks] for name in HEARD}
        empty = {name: getattr(Callback, name) for name in HEARD}
        return {name: [hook for hook in of if getattr(hook, "__func__", None) is not empty[name]] for name, of in hooks.items()}

    @cached_property
    def plain(self) -> set[str]:
        """The module's hooks that are LightningModule's own: those that are not may call `self.log`, which needs the wrapper."""
        return {name for name in HEARD + OWN if getattr(type(self.told), name) is getattr(LightningModule, name)}

    def callbacks(self, trainer: Trainer, name: str, *args: Any, **options: Any) -> None:
        """Call a hook of all callbacks."""
        if name not in HEARD:
            return self.kept["callbacks"](trainer, name, *args, **options)
        about = vars(self.told)
        about["_current_fx_name"], before = name, about["_current_fx_name"]  # for `self.log`, which must know where it is called
        for hook in self.heard[name]:
            hook(trainer, self.told, *args)
        about["_current_fx_name"] = before

    def module(self, trainer: Trainer, name: str, *args: Any, **options: Any) -> Any:
        """Call a hook of the module."""
        if name not in self.plain:
            return self.kept["module"](trainer, name, *args, **options)
        if name == "configure_gradient_clipping":  # past its comparisons of the Trainer's arguments with themselves
            limit, kind = trainer.gradient_clip_val or 0.0, trainer.gradient_clip_algorithm or GradClipAlgorithmType.NORM
            return trainer.precision_plugin.clip_gradients(args[0], limit, kind)
        return None if name in HEARD else getattr(self.told, name)(*args, **options)

    def strategy(self, trainer: Trainer, name: str, *args: Any, **options: Any) -> Any:
        """Call a hook of the strategy; a batch of ours moves by itself."""
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if name == "batch_to_device" and isinstance(args[0], Batch) and isinstance(stream, Stream):
            return stream.on_after_batch_transfer(args[0].to(trainer.strategy.root_device), 0)
        return self.kept["strategy"](trainer, name, *args, **options)


class Loop(_TrainingEpochLoop):
    """Lightning's loop over batches, without the questions whose answers are the same in every step.

    Args:
        trainer: whose loop it stands in for.
        direct: calls hooks.
    """

    def __init__(self, trainer: Trainer, direct: Direct):
        super().__init__(trainer, trainer.fit_loop.min_steps, trainer.fit_loop.max_steps)
        self.direct = direct

    @cached_property
    def plain(self) -> bool:
        """Whether a step is that of one optimizer, which no hook of the module can skip."""
        return self.direct.told.automatic_optimization and "on_train_batch_start" in self.direct.plain

    @cached_property
    def interval(self) -> float:
        """Batches after which Lightning is asked what follows one: 1 where that depends on more than their number."""
        trainer = self.trainer
        if trainer.lr_scheduler_configs or trainer.check_val_every_n_epoch or isinstance(trainer.limit_train_batches, int):
            return 1
        return trainer.val_check_batch or 1 if trainer.enable_validation and any(self.val_loop.max_batches) else float("inf")

    @property
    def global_step(self) -> int:
        """Optimizer steps so far."""
        return self.automatic_optimization.optim_progress.optimizer.step.total.completed if self.plain else super().global_step

    def advance(self, data_fetcher: _DataFetcher) -> None:
        """Work through one batch."""
        if self.restarting or not self.plain:
            return super().advance(data_fetcher)
        trainer, direct, progress = self.trainer, self.direct, self.batch_progress
        batch = trainer.precision_plugin.convert_input(next(data_fetcher)[0])
        if not isinstance(batch, Batch):
            batch = direct.told._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = direct.strategy(trainer, "batch_to_device", batch, dataloader_idx=0)
        progress.is_last_batch = data_fetcher.done
        progress.increment_ready()
        logged, results, number = trainer._logger_connector, self._results, progress.current.ready - 1
        logged._first_loop_iter = logged._first_loop_iter is None
        results.batch, results.batch_size = batch, None
        direct.callbacks(trainer, "on_train_batch_start", batch, number)
        progress.increment_started()
        said = self._optimize(batch, number)
        progress.increment_processed()
        if trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if self._num_ready_batches_reached():
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        direct.callbacks(trainer, "on_train_batch_end", said, batch, number)
        direct.module(trainer, "on_train_batch_end", said, batch, number)
        if results:
            logged.on_batch_end()
        results.batch = None
        progress.increment_completed()
        if results:
            logged.update_train_step_metrics()

    def _optimize(self, batch: Any, number: int) -> Any:
        """Return what the module's step says of a batch, after the optimizer's step."""
        trainer, direct, automatic = self.trainer, self.direct, self.automatic_optimization
        if trainer.accumulate_grad_batches > 1:
            return automatic.run(trainer.optimizers[0], number, OrderedDict(batch=batch, batch_idx=number))
        strategy, optimizer, progress = trainer.strategy, trainer.optimizers[0], automatic.optim_progress.optimizer
        said, about = dict[str, Any](), vars(direct.told)

        def closure() -> Tensor:
            with torch.enable_grad():
                progress.zero_grad.increment_ready()  # before the forward pass, which may have the gradients' memory
                direct.callbacks(trainer, "on_before_zero_grad", optimizer)
                direct.module(trainer, "on_before_zero_grad", optimizer)
                progress.zero_grad.increment_started()
                direct.module(trainer, "optimizer_zero_grad", trainer.current_epoch, number, optimizer)
                progress.zero_grad.increment_completed()
                about["_current_fx_name"] = "training_step"
                out = strategy.training_step(batch, number)
                about["_current_fx_name"] = None
                said.update({"loss": out} if isinstance(out, Tensor) else out or {})
                loss, said["loss"] = said["loss"], said["loss"].detach().clone()
                strategy.backward(loss, optimizer)
                return said["loss"]

        progress.step.increment_ready()
        if "optimizer_step" in direct.plain:
            strategy.optimizer_step(optimizer, closure)
        else:
            direct.module(trainer, "optimizer_step", trainer.current_epoch, number, strategy._lightning_optimizers[0], closure)
        progress.step.increment_completed()
        return said

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Validate when it is time to."""
        progress = self.batch_progress
        last = progress.is_last_batch or self.trainer.should_stop
        if last or self.restarting or not self.plain or progress.total.ready % self.interval == 0:
            return super().on_advance_end(data_fetcher)
        self._batches_that_stepped += progress.current.ready % self.trainer.accumulate_grad_batches == 0


@contextmanager
def lean(trainer: Trainer) -> Iterator[None]:
    """Run the steps of a fit so, unless a profiler was asked for."""
    direct = Direct(trainer)
    if isinstance(trainer.profiler, PassThroughProfiler):  # type: ignore[attr-defined]
        trainer.fit_loop.epoch_loop = Loop(trainer, direct)
        for wrapper, name in WRAPPERS.items():
            setattr(call, wrapper, getattr(direct, name))
    try:
        yield
    finally:
        for wrapper, name in WRAPPERS.items():
            setattr(call, wrapper, direct.kept[name])
