"""Maximum likelihood training of normalizing flows."""

from typing import Any

import torch
from torch import Tensor

from data.batch import Batch, IndexedDataset
from models.checkpoint import FORMAT
from models.description import describe
from models.normalizing_flow import Flow
from trainer.compatibility import check_density_data, check_same_model
from trainer.engine.trainer_parts import find_datamodule
from trainer.optimization import OptimizedModule
from trainer.step_random import StepRandom


class MaximumLikelihood(OptimizedModule):
    """Trains a flow on data with a density: points (Plane), images (Dequantised), latents.

    The loss is -log p(x) in nats per dimension. The random numbers by which a flow estimates it
    are keyed by the seed, the step and the first sample of the rank's slice: a resumed run
    repeats them, another number of processes does not.

    Args:
        flow: the flow.
    """

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow
        self.spec = {"format": FORMAT, "flow": describe(flow)}

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Return the loss of a batch, estimated where the flow estimates."""
        devices = [batch.x.device] if batch.x.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(StepRandom(batch).seed("probe"))
            return self.loss(batch)

    def validation_step(self, batch: Batch, _: int) -> None:
        """Log the exact loss of a held-out batch."""
        self.log_heldout_loss(self.loss(batch, exact=True), batch)

    def loss(self, batch: Batch, exact: bool = False) -> Tensor:
        """Return the mean of -log p(x) in nats per dimension."""
        log_prob = self.flow.log_prob(batch.x, exact)
        return -log_prob.mean() / batch.x[0].numel()

    def on_fit_start(self) -> None:
        """Check that the data have a density and the flow's shape."""
        datamodule = find_datamodule(self.trainer)
        if datamodule:
            for source in datamodule.sources():
                if isinstance(source, IndexedDataset):
                    check_density_data(source, self.flow.shape)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the flow without its configuration (models.normalizing_flow)."""
        checkpoint["rectify"] = self.spec

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the resumed run has this flow."""
        stored = checkpoint["rectify"].get("flow")
        check_same_model(self.trainer.default_root_dir, "model.flow", stored, self.spec["flow"])
