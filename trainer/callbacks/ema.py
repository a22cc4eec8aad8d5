"""Exponential moving averages of the denoiser's weights."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from data.files import atomic_file, files_by_step, set_aside
from data.progress import print_message
from models.checkpoint import denoiser_weights
from models.tensors import read_metadata, to_safetensors
from trainer.callbacks.checkpoint import SNAPSHOT_SUFFIX, SNAPSHOTS, find_run_id
from trainer.engine.fsdp import to_local
from trainer.engine.trainer_parts import find_callback
from trainer.module import Generator
from trainer.posthoc_ema import exponent


def to_full(value: Tensor) -> Tensor:
    """Return a whole tensor; a sharded one is gathered from all ranks."""
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.contiguous()


def copy_like(value: Tensor, weight: Tensor) -> Tensor:
    """Return a copy of a tensor in float32, on the device of a weight and sharded like it.

    Weights of 16 bits would round small steps away. Those of 64 bits stay so.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    value = value.detach().to(dtype)
    if isinstance(weight, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, weight.device_mesh, weight.placements)
    return value.to(weight.device, copy=True)


def training_weights(module: Generator) -> dict[str, Tensor]:
    """Return the weights of the denoiser that the optimizer updates, by their names in it.

    The module has them in float32, also where the denoiser computes with 16 bits.
    """
    return denoiser_weights({"state_dict": module.state_dict()})


class EMA(Callback):
    """Averages the weights of `module.denoiser` in float32 after every optimizer step.

    Checkpoints contain the averages. The average with `decay` is the one that other commands load,
    export and collect from. Those of `widths` have power-function profiles (EDM2, Karras et al.
    2023, arXiv 2312.02696, section 3). They are also kept in RUN/ema at every checkpoint, from
    which `rectify ema` reconstructs an average of any other width.

    Args:
        decay: weight of the past in one step, in [0, 1); early on (1 + step) / (10 + step) is used
            if it is smaller.
        widths: relative standard deviations of further profiles, in (0, 0.28), e.g. [0.05, 0.1].
    """

    def __init__(self, decay: float = 0.999, widths: list[float] | None = None):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay is {decay}; it must lie in [0, 1)")
        self.decay = decay
        self.widths = widths or []
        self.step = -1
        self.powers = {f"{width:g}": exponent(width) for width in self.widths}
        self.averages: dict[str, dict[str, Tensor]] = {}  # by profile; "" is that with `decay`

    def _compute_decays(self) -> dict[str, float]:
        """Return the weight of the past in this step, by profile."""
        decays = {"": min(self.decay, (1 + self.step) / (10 + self.step))}
        for name, power in self.powers.items():
            decays[name] = (1 - 1 / self.step) ** (power + 1)
        return decays

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the run trains a generator."""
        if not isinstance(pl_module, Generator):
            raise ValueError(
                f"EMA: averages the weights of generators, not of {type(pl_module).__name__}; "
                "remove it from trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with the current weights, or with the averages of a checkpoint."""
        assert isinstance(pl_module, Generator)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir) / SNAPSHOTS
            set_aside_snapshots(folder, find_run_id(trainer), trainer.global_step)
        weights = training_weights(pl_module)
        self.step = trainer.global_step
        for name in ("", *self.powers):
            start = self.averages.get(name) or weights
            averages = {}
            for key, weight in weights.items():
                averages[key] = copy_like(start[key], weight)
            self.averages[name] = averages
        # Some objectives evaluate the denoiser with its averages.
        pl_module.denoiser.averages = self.averages[""]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Move the averages towards the weights, once per optimizer step."""
        if trainer.global_step == self.step:
            return  # gradients are still accumulating
        self.step = trainer.global_step
        assert isinstance(pl_module, Generator)
        weights = []
        for key, value in training_weights(pl_module).items():
            weights.append(to_local(value).to(self.averages[""][key].dtype))
        for name, decay in self._compute_decays().items():
            averages = [to_local(value) for value in self.averages[name].values()]
            torch._foreach_lerp_(averages, weights, 1 - decay)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the averages to the checkpoint, and write a snapshot of the profiles to RUN/ema."""
        # The checkpoint.
        checkpoint["ema"] = self.averages[""]
        checkpoint["ema_profiles"] = {name: self.averages[name] for name in self.powers}

        # The snapshot: all ranks gather its tensors, the first one writes it.
        snapshot = {}
        for name in self.powers:
            for key, value in self.averages[name].items():
                snapshot[f"{name}/{key}"] = to_full(value)
        if snapshot and trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / SNAPSHOTS / f"step={self.step:09d}.safetensors"
            with atomic_file(path) as file:
                metadata = {"step": str(self.step), "run": find_run_id(trainer)}
                file.write(to_safetensors(snapshot, metadata))

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Load the averages of a checkpoint."""
        run = trainer.default_root_dir
        if "ema" not in checkpoint:
            raise ValueError(
                f"{run}: was trained without EMA, which cannot be added later; "
                "remove it from trainer.callbacks, or start another run"
            )
        missing = self.powers.keys() - checkpoint["ema_profiles"].keys()
        if missing:
            raise ValueError(
                f"{run}: EMA widths {sorted(missing)} were not averaged from the start; "
                "remove them, or start another run"
            )
        self.averages = {"": checkpoint["ema"], **checkpoint["ema_profiles"]}


def set_aside_snapshots(folder: Path, run_id: str, step: int) -> None:
    """Rename the snapshots of other runs: `rectify ema` would mix them with those of this run.

    Args:
        folder: of the snapshots.
        run_id: of this run.
        step: at which it starts. At 0 no snapshot is its.
    """
    moved = []
    for path in files_by_step(folder, SNAPSHOT_SUFFIX):
        if step == 0 or read_metadata(path).get("run", "") != run_id:
            moved.append(set_aside(path))
    if moved:
        print_message(
            f"fit: {folder}: {len(moved)} snapshots of another run, renamed, e.g. {moved[0].name}"
        )


def find_averages(trainer: Trainer) -> dict[str, Tensor]:
    """Return the averages, with `decay`, of a run's EMA; none if the run has no EMA."""
    ema = find_callback(trainer, EMA)
    return ema.averages.get("", {}) if ema else {}
