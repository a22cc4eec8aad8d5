"""Random draws of the training step: a pure function of (seed, step, chunk of the global batch), never of the rank."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.noise import generator

CHUNK = 32  # samples of the global batch that share one generator


class Draws:
    """What one rank draws for its slice of the global batch.

    Whole chunks are drawn and the slice is cut from them, so that neither a restart nor the number of ranks changes it.

    Args:
        batch: says seed, step and slice, and carries the device.
    """

    PURPOSES = (
        "noise",
        "time",
        "drop",
        "window",
        "until",
        "again",
        "scale",
        "probe",
        "data",
    )  # append only: the place is part of the key

    def __init__(self, batch: Batch):
        self.batch, self.count = batch, len(batch.x)

    def _rows(self, purpose: str, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
        batch, kind = self.batch, self.PURPOSES.index(purpose)
        first, last = batch.start // CHUNK, -(-(batch.start + self.count) // CHUNK)
        rows = np.concatenate([draw(generator(batch.seed, batch.step, chunk, kind)) for chunk in range(first, last)])
        return torch.from_numpy(rows[batch.start - first * CHUNK :][: self.count]).to(batch.x.device, non_blocking=True)

    def noise(self, x: Tensor, purpose: str = "noise") -> Tensor:
        """Return standard normal noise of x's shape (B, ...), float32."""
        return self._rows(purpose, lambda g: g.standard_normal((CHUNK, *x.shape[1:]), dtype=np.float32))

    def uniform(self, purpose: str) -> Tensor:
        """Return numbers uniform in [0, 1), (B,), independent between samples."""
        return self._rows(purpose, lambda g: g.random(CHUNK, dtype=np.float32))

    def stratified(self, purpose: str) -> Tensor:
        """Return (i + u_i) / size for each place i in the global batch, (B,): uniform, with far lower variance."""
        places = torch.arange(self.batch.start, self.batch.start + self.count, device=self.batch.x.device)
        return ((places + self.uniform(purpose)) / self.batch.size).clamp(max=1 - 2**-24)

    def seed(self, purpose: str) -> int:
        """Return a seed, in [0, 2^63), for a library that draws on its own: one for this slice, not for each chunk."""
        batch = self.batch
        return int(generator(batch.seed, batch.step, batch.start, self.PURPOSES.index(purpose)).integers(2**63))


def uniform(draws: Draws | None, purpose: str, like: Tensor) -> Tensor:
    """Return stratified uniform numbers, (B,), for a batch `like`; without draws from torch's global generator."""
    return draws.stratified(purpose) if draws else torch.rand(len(like), device=like.device)


def normal(draws: Draws | None, purpose: str, like: Tensor) -> Tensor:
    """Return standard normal noise of the shape of `like`; without draws from torch's global generator."""
    return draws.noise(like, purpose) if draws else torch.randn_like(like)
