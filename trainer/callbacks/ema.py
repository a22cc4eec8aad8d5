"""Exponential moving averages of the denoiser's weights."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from data.files import atomic
from models.tensors import packed
from trainer.fsdp import local
from trainer.posthoc import exponent


def full(value: Tensor) -> Tensor:
    """Return a whole weight, gathered from all ranks if need be."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).contiguous()


def alike(value: Tensor, weight: Tensor) -> Tensor:
    """Return a copy of a value, placed as a weight is."""
    if isinstance(weight, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.detach(), weight.device_mesh, weight.placements)
    return value.detach().to(weight.device, copy=True)


class EMA(Callback):
    """Averages the float32 weights of `module.denoiser` after every optimizer step; checkpoints carry them.

    The average with `decay` is what is loaded, exported and collected from. Those of `widths` have power-function profiles
    (EDM2, 2312.02696) and are also kept in RUN/ema at every checkpoint: `rectify ema` makes any other width of them.

    Args:
        decay: weight of the past in one step, in [0, 1); early on (1 + step) / (10 + step) is used if smaller.
        widths: relative standard deviations of further profiles, in (0, 0.28), say [0.05, 0.1].
    """

    def __init__(self, decay: float = 0.999, widths: list[float] | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay is {decay}, it must lie in [0, 1)")
        self.decay, self.widths, self.step = decay, widths or [], -1
        self.powers = {f"{width:g}": exponent(width) for width in self.widths}
        self.averages: dict[str, dict[str, Tensor]] = {}

    def _decays(self) -> dict[str, float]:
        """Return every profile's weight of the past at this step."""
        plain = min(self.decay, (1 + self.step) / (10 + self.step))
        return {"": plain} | {name: (1 - 1 / self.step) ** (power + 1) for name, power in self.powers.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, unless a checkpoint brought averages."""
        now = pl_module.denoiser.state_dict()  # type: ignore[union-attr]
        self.step = trainer.global_step
        for name in ("", *self.powers):
            kept = self.averages.get(name)
            self.averages[name] = {k: alike(kept[k] if kept else v, v) for k, v in now.items()}
        pl_module.denoiser.averages = self.averages[""]  # type: ignore[union-attr]  # for objectives that ask them

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the averages towards the weights, once an optimizer step."""
        if trainer.global_step == self.step:
            return  # gradients are still accumulating
        self.step = trainer.global_step
        now = [local(value) for value in pl_module.denoiser.state_dict().values()]  # type: ignore[union-attr]
        for name, decay in self._decays().items():
            torch._foreach_lerp_([local(value) for value in self.averages[name].values()], now, 1 - decay)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the averages to the checkpoint, and keep the profiles' own snapshot."""
        checkpoint["ema"] = self.averages[""]
        checkpoint["ema_profiles"] = {name: self.averages[name] for name in self.powers}
        flat = {f"{name}/{key}": full(value) for name in self.powers for key, value in self.averages[name].items()}
        if flat and trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "ema" / f"step={self.step:09d}.safetensors"
            with atomic(path) as file:
                file.write(packed(flat, {"step": str(self.step)}))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the averages up where they were."""
        if "ema" not in checkpoint:
            raise ValueError(f"{trainer.default_root_dir}: was trained without EMA; it cannot be added half-way")
        if missing := self.powers.keys() - checkpoint["ema_profiles"].keys():
            raise ValueError(f"{trainer.default_root_dir}: EMA widths {sorted(missing)} were not averaged from the start")
        self.averages = {"": checkpoint["ema"], **checkpoint["ema_profiles"]}
