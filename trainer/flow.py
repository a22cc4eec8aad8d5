"""Maximum likelihood: how a flow learns."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from data.batch import Batch, Set
from models import teacher
from models.flow import Flow
from trainer.draws import Draws


class MaximumLikelihood(LightningModule):
    """Trains a flow on data that have a density: points of the plane (Plane), dequantised images (Dequantised), latents.

    The loss is -log p(x) in nats per dimension. What a flow draws to estimate it is keyed by (seed, step, first sample of the
    rank's slice): a resumed run repeats it, another number of processes does not.

    Args:
        flow: what is trained.
    """

    def __init__(self, flow: Flow):
        super().__init__()
        self.flow = flow
        self.spec = {"format": teacher.FORMAT, "flow": teacher.describe(flow)}

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """One step."""
        with torch.random.fork_rng([batch.x.device] if batch.x.is_cuda else []):
            torch.manual_seed(Draws(batch).seed("probe"))
            return self.loss(batch)

    def validation_step(self, batch: Batch, _: int) -> None:
        """The same on held-out samples, not estimated."""
        self.log("heldout_loss", self.loss(batch, exact=True), sync_dist=True, batch_size=len(batch.x))

    def loss(self, batch: Batch, exact: bool = False) -> Tensor:
        """Return the mean of -log p(x) in nats per dimension."""
        return -self.flow.log_prob(batch.x, exact).mean() / batch.x[0].numel()

    def on_fit_start(self) -> None:
        """Refuse data without a density, or of another shape."""
        stream = getattr(self.trainer, "datamodule", None)
        for source in (getattr(stream, "source", None), getattr(stream, "heldout", None)):
            if isinstance(source, Set):
                agree(source, self.flow.shape)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the flow without this configuration (models.flow.load)."""
        checkpoint["rectify"] = self.spec

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a run with another model."""
        here, there = self.spec["flow"], checkpoint["rectify"].get("flow")
        if there != here:
            raise ValueError(f"{self.trainer.default_root_dir}: holds a run of another model ({there}); this one is {here}")


def agree(source: Set, shape: tuple[int, int, int]) -> None:
    """Refuse a set whose samples have no density, or not the shape (C, H, W) that a model was built for."""
    one = source.sample()
    if not one.latent:
        raise ValueError(f"data: {type(source).__name__} gives images of whole bytes, which have no density; give Dequantised")
    if tuple(one.x.shape[1:]) != shape:
        raise ValueError(f"data: a sample has the shape (channels, size, size) = {tuple(one.x.shape[1:])}, the model {shape}")
