"""How straight the denoiser's sampling trajectories are, in every validation."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from data.noise import noises
from trainer.callbacks.ema import find_averages
from trainer.conditions import encode_condition, requested_conditions
from trainer.engine.fsdp import to_local
from trainer.engine.trainer_parts import find_datamodule
from trainer.metrics.trajectories import measure_trajectories
from trainer.module import Generator


class TrajectoryMetrics(Callback):
    """Logs first-orderness, straightness and curvature with `heldout_loss` in every validation.

    They are the metrics of `rectify evaluate`, of the EMA weights if the run has an EMA, along
    DDIM's trajectories from the same noises in every validation, without guidance and with every
    class in turn. Ranks share the trajectories. `curvature_t0`, ... are the curvatures in equal
    parts of [0, 1], starting at the data; a part with too few steps for a difference is not
    logged. A validation takes 2 x samples x steps evaluations of the network, which do not count
    as training.

    Args:
        samples: number of trajectories; those of a rank are held in memory together.
        steps: steps of a trajectory.
        seed: seed of the noises; `rectify evaluate` starts from the same noises by default.
    """

    def __init__(self, samples: int = 64, steps: int = 32, seed: int = 2):
        if samples < 1:
            raise ValueError(f"TrajectoryMetrics: samples is {samples}; it must be at least 1")
        if steps < 2:
            raise ValueError(
                f"TrajectoryMetrics: steps is {steps}; it must be at least 2, since a single step "
                "is always straight"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"TrajectoryMetrics: seed is {seed}; it must lie in [0, 2^64)")
        self.samples = samples
        self.steps = steps
        self.seed = seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the run validates a generator, and that each rank has a trajectory."""
        check_validates_generator(self, trainer, pl_module)
        if self.samples < trainer.world_size:
            raise ValueError(
                f"TrajectoryMetrics: samples is {self.samples}; it must be at least the number of "
                f"processes, {trainer.world_size}"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics; `MetricsLog` writes all that a validation logs into one line."""
        assert isinstance(pl_module, Generator)

        # This rank's noises and conditions.
        mine = range(trainer.global_rank, self.samples, trainer.world_size)
        denoiser = pl_module.denoiser
        raw = requested_conditions(pl_module.condition, mine)
        cond = encode_condition(pl_module.condition, raw, pl_module.device)
        eps = noises(self.seed, mine, denoiser.shape).to(pl_module.device)

        # The metrics of its trajectories.
        with averaged_weights(denoiser, find_averages(trainer)):
            found = name_metrics(measure_trajectories(denoiser, eps, cond, self.steps))

        # Lightning's mean over ranks weighs all of them equally; their numbers of samples differ.
        share = len(mine) * trainer.world_size / self.samples
        metrics = {name: share * value for name, value in found.items()}
        pl_module.log_dict(metrics, logger=False, sync_dist=True, batch_size=1)


def check_validates_generator(
    callback: Callback, trainer: Trainer, module: LightningModule
) -> None:
    """Check that a run trains a generator and has held-out data, which a callback needs."""
    name = type(callback).__name__
    if not isinstance(module, Generator):
        raise ValueError(
            f"{name}: measures generators, not {type(module).__name__}; "
            "remove it from trainer.callbacks"
        )
    datamodule = find_datamodule(trainer)
    if datamodule is None or datamodule.heldout is None:
        raise ValueError(
            f"{name}: measures in validations, but there is no data.heldout; "
            "set it, or remove the callback from trainer.callbacks"
        )


def name_metrics(found: dict[str, Any]) -> dict[str, float]:
    """Return the result of `measure_trajectories` as numbers by name."""
    metrics = {
        "first_orderness": found["first_orderness"],
        "straightness": found["straightness"],
    }
    for i, value in enumerate(found["curvature"]):
        if value is not None:
            metrics[f"curvature_t{i}"] = value
    return metrics


@contextmanager
def averaged_weights(net: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace weights of a network inside the block, and restore them bit for bit after it.

    They are restored after an error, too.

    Args:
        net: the network.
        weights: all of its weights, sharded as they are in the network, or none.
    """
    original = {}
    for name, value in net.state_dict().items():
        if name in weights:
            original[name] = to_local(value).clone()
    try:
        _copy_weights(net, weights)
        yield
    finally:
        _copy_weights(net, original)


@torch.no_grad()
def _copy_weights(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    if not weights:
        return
    # `state_dict` makes a sharded network free the weights that it gathered for evaluation.
    for name, value in net.state_dict().items():
        to_local(value).copy_(to_local(weights[name]))
