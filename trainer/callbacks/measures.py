"""Whether one step draws what many do: measures of the trained denoiser's own trajectories, in every validation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from data.noise import noises
from trainer.callbacks.ema import EMA
from trainer.collect import asked, told
from trainer.evaluate.measures import trajectories
from trainer.fsdp import local
from trainer.module import Generator


class Measures(Callback):
    """Measures first-orderness, straightness and curvature whenever a run validates, and tells them beside `heldout_loss`.

    They are `rectify evaluate`'s, of the averaged weights where the run has an EMA, along DDIM's walk from always the same
    noises, spread over the ranks, told every condition in turn and not guided. `curvature_t0`, ... are those of equal parts of
    [0, 1], the data's end first; a part of which the walk tells nothing is left out. Each time takes 2 x samples x steps
    evaluations of the network, which do not count as training.

    Args:
        samples: trajectories in all; those of a rank are held in memory together.
        steps: of a walk.
        seed: of the noises; `rectify evaluate` begins with the same.
    """

    def __init__(self, samples: int = 64, steps: int = 32, seed: int = 2):
        if samples < 1:
            raise ValueError(f"Measures: samples is {samples}, it must be at least 1")
        if steps < 2:
            raise ValueError(f"Measures: steps is {steps}, it must be at least 2: one alone is straight")
        if not 0 <= seed < 2**64:
            raise ValueError(f"Measures: seed is {seed}, it must lie in [0, 2^64)")
        self.samples, self.steps, self.seed = samples, steps, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run in which there is nothing to measure, or too little for all ranks."""
        judged(self, trainer, pl_module)
        if self.samples < trainer.world_size:
            raise ValueError(f"Measures: samples ({self.samples}) must be at least the number of processes, {trainer.world_size}")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log them; Metrics writes all that a validation logs into one line."""
        assert isinstance(pl_module, Generator)
        mine, device = range(trainer.global_rank, self.samples, trainer.world_size), pl_module.device
        denoiser, raw = pl_module.denoiser, asked(pl_module.condition, mine)
        cond = told(pl_module.condition, raw, device)
        eps = noises(self.seed, mine, denoiser.shape).to(device)
        ema = next((one for one in trainer.callbacks if isinstance(one, EMA)), None)  # type: ignore[attr-defined]
        with lent(denoiser, ema.averages.get("", {}) if ema else {}):
            found = scalars(trajectories(denoiser, eps, cond, self.steps))
        share = len(mine) * trainer.world_size / self.samples  # of a rank: all count alike in Lightning's mean over them
        pl_module.log_dict({name: share * value for name, value in found.items()}, logger=False, sync_dist=True, batch_size=1)


def judged(callback: Callback, trainer: Trainer, module: LightningModule) -> None:
    """Refuse a callback that judges a generator in validation where there is none of the two."""
    name = type(callback).__name__
    if not isinstance(module, Generator):
        raise ValueError(f"{name}: measures generators, not {type(module).__name__}; leave it out of trainer.callbacks")
    if getattr(getattr(trainer, "datamodule", None), "heldout", None) is None:
        raise ValueError(f"{name}: measures when the run validates, but there is no data.heldout; give one, or leave it out")


def scalars(found: dict[str, Any]) -> dict[str, float]:
    """Return the measures of `trajectories` as numbers by name."""
    curvature = {f"curvature_t{i}": value for i, value in enumerate(found["curvature"]) if value is not None}
    return {"first_orderness": found["first_orderness"], "straightness": found["straightness"], **curvature}


@contextmanager
def lent(net: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Lend a network other weights, none or all, sharded as its own are; these come back bit for bit, also after an error."""
    own = {name: local(value).clone() for name, value in net.state_dict().items() if name in weights}
    try:
        _fill(net, weights)
        yield
    finally:
        _fill(net, own)


@torch.no_grad()
def _fill(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    if not weights:
        return
    for name, value in net.state_dict().items():  # which makes a sharded network drop what it gathered to evaluate
        local(value).copy_(local(weights[name]))
