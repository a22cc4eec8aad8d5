"""Lightning calls every hook through wrappers that cost more than most hooks do. In a training step we call them directly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call

from data.batch import Batch
from data.stream import Stream

HEARD: tuple[str, ...] = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward")
HEARD += ("on_before_optimizer_step", "on_train_batch_end")  # by callbacks and by the module
OWN = ("optimizer_zero_grad", "optimizer_step", "configure_gradient_clipping", "lr_scheduler_step")  # of the module
WRAPPERS = {"_call_callback_hooks": "callbacks", "_call_lightning_module_hook": "module", "_call_strategy_hook": "strategy"}


class Direct:
    """Stands in for Lightning's wrappers in a training step: no profiler, no log line, no hooks that do nothing.

    Args:
        trainer: whose hooks are called, of a module that is a LightningModule.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.kept = trainer, {name: getattr(call, wrapper) for wrapper, name in WRAPPERS.items()}

    @cached_property
    def heard(self) -> dict[str, list[Callable[..., None]]]:
        """The callbacks' hooks that do something."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        hooks = {name: [getattr(callback, name) for callback in callbacks] for name in HEARD}
        empty = {name: getattr(Callback, name) for name in HEARD}
        return {name: [hook for hook in of if getattr(hook, "__func__", None) is not empty[name]] for name, of in hooks.items()}

    @cached_property
    def plain(self) -> set[str]:
        """The module's hooks that are LightningModule's own: those that are not may call `self.log`, which needs the wrapper."""
        cls = type(self.trainer.lightning_module)
        return {name for name in HEARD + OWN if getattr(cls, name) is getattr(LightningModule, name)}

    def callbacks(self, trainer: Trainer, name: str, *args: Any, **options: Any) -> None:
        """Call a hook of all callbacks."""
        if name not in HEARD:
            return self.kept["callbacks"](trainer, name, *args, **options)
        for hook in self.heard[name]:
            hook(trainer, trainer.lightning_module, *args)

    def module(self, trainer: Trainer, name: str, *args: Any, **options: Any) -> Any:
        """Call a hook of the module."""
        if name not in self.plain:
            return self.kept["module"](trainer, name, *args, **options)
        return getattr(trainer.lightning_module, name)(*args, **options)

    def strategy(self, trainer: Trainer, name: str, *args: Any, **options: Any) -> Any:
        """Call a hook of the strategy; a batch of ours moves by itself."""
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if name == "batch_to_device" and isinstance(args[0], Batch) and isinstance(stream, Stream):
            return stream.on_after_batch_transfer(args[0].to(trainer.strategy.root_device), 0)
        return self.kept["strategy"](trainer, name, *args, **options)


@contextmanager
def lean(trainer: Trainer) -> Iterator[None]:
    """Call the hooks of training steps directly, unless a profiler was asked for."""
    direct = Direct(trainer)
    if isinstance(trainer.profiler, PassThroughProfiler):  # type: ignore[attr-defined]
        for wrapper, name in WRAPPERS.items():
            setattr(call, wrapper, getattr(direct, name))
    try:
        yield
    finally:
        for wrapper, name in WRAPPERS.items():
            setattr(call, wrapper, direct.kept[name])
