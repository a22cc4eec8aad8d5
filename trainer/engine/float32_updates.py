"""Training with weights of 16 bits (`--trainer.precision bf16-true`), updated in float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from models.nets import Net
from trainer.engine.fsdp import FSDP2
from trainer.module import Generator

TIME_ARGUMENT = 1  # of a network: net(x_t, time, cond)


class Float32Updates(HalfPrecision):
    """Computes with weights of 16 bits, and optimizes copies of them in float32.

    An update that is smaller than 1/256 of a weight is lost in bfloat16 (Micikevicius et al. 2017,
    arXiv 1710.03740, section 3.1). Checkpoints contain the copies: a run may be resumed with
    another precision.
    """

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert a module to 16 bits, after copying its weights.

        Raises:
            ValueError: it is not a generator, whose networks alone get states of 16 bits.
        """
        if not isinstance(module, Generator):
            raise ValueError(
                f"trainer.precision is {self.precision}: it trains generators, not "
                f"{type(module).__name__}; use bf16-mixed"
            )
        self.copies: dict[Tensor, nn.Parameter] = {}
        names = {}
        for name, value in module.named_parameters(remove_duplicate=False):
            if value not in self.copies:
                copy = value.detach().float().clone()
                self.copies[value] = nn.Parameter(copy, value.requires_grad)
            names[name] = value
        converted = super().convert_module(module)
        for part in converted.modules():
            if isinstance(part, Net):
                part.register_forward_pre_hook(self._convert_states)

        # The weights of a checkpoint are the copies.
        def use_copies(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
            for key, value in state.items():
                if value.is_floating_point():
                    state[key] = value.float()
            for name, value in names.items():
                state[prefix + name] = self.copies[value].detach()

        converted.register_state_dict_post_hook(use_copies)
        return converted

    def _convert_states(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Convert the states and the condition of a network; its time stays float32."""
        converted = list(arguments)
        for i, value in enumerate(arguments):
            if i != TIME_ARGUMENT and isinstance(value, Tensor) and value.is_floating_point():
                converted[i] = value.to(self._desired_input_dtype)
        return tuple(converted)

    def convert_input(self, data: Any) -> Any:
        """Return data as they are: noise, times and losses are float32."""
        return data

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Leave torch's default dtype as it is."""
        yield

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Give the optimizers the copies."""
        for value, copy in self.copies.items():
            if copy.requires_grad:
                copy.data = copy.data.to(value.device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self.copies[value] for value in group["params"]]
        return super().connect(model, optimizers, lr_schedulers)

    def _clip_gradients(self, model: Any, optimizer: Any, *args: Any, **options: Any) -> None:
        """Move the gradients to the copies, before they are clipped."""
        for value, copy in self.copies.items():
            if copy.requires_grad:
                copy.grad = None if value.grad is None else value.grad.float()
                value.grad = None
        super()._clip_gradients(model, optimizer, *args, **options)

    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: Any,
        model: LightningModule,
        closure: Callable[[], Any],
        **options: Any,
    ) -> Any:
        """Make a step of the copies, and round them to the weights."""
        result = super().optimizer_step(optimizer, model=model, closure=closure, **options)
        with torch.no_grad():
            for value, copy in self.copies.items():
                if copy.requires_grad:
                    value.copy_(copy)
        return result


def update_in_float32(trainer: Trainer) -> None:
    """Let a trainer with weights of 16 bits update them in float32.

    Raises:
        ValueError: its strategy shards the weights.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin, HalfPrecision):
        return
    if isinstance(trainer.strategy, FSDP2):
        raise ValueError(
            f"trainer.precision is {plugin.precision}: strategy fsdp2 keeps float32 weights; use "
            "bf16-mixed"
        )
    trainer.strategy.precision_plugin = Float32Updates(plugin.precision)
