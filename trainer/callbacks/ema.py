"""Exponential moving average of the denoiser's weights."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class EMA(Callback):
    """Averages the float32 weights of `module.denoiser` after every optimizer step; checkpoints carry it as `ema`.

    Args:
        decay: weight of the past in one step, in [0, 1); early on (1 + step) / (10 + step) is used if smaller.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay is {decay}, it must lie in [0, 1)")
        self.decay, self.step = decay, -1
        self.average: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, unless a checkpoint brought an average."""
        fresh = {k: v.detach().clone() for k, v in pl_module.denoiser.state_dict().items()}  # type: ignore[union-attr]
        self.average = {k: self.average[k].to(v.device) if self.average else v for k, v in fresh.items()}
        self.step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the average towards the weights, once an optimizer step."""
        if trainer.global_step == self.step:
            return  # gradients are still accumulating
        self.step = trainer.global_step
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        now = pl_module.denoiser.state_dict()  # type: ignore[union-attr]
        torch._foreach_lerp_(list(self.average.values()), [now[k] for k in self.average], 1 - decay)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the average to the checkpoint."""
        checkpoint["ema"] = self.average

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the average up where it was."""
        self.average = dict(checkpoint["ema"])
