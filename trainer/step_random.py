"""Random numbers of the training step.

They are a pure function of the seed, the step and the position in the global batch, so that
neither a restart nor the number of processes changes them.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.noise import generator

RANDOM_CHUNK = 32  # consecutive samples of the global batch that share one generator


class StepRandom:
    """The random numbers of one rank's slice of the global batch.

    The numbers of different purposes are independent. They are generated in whole chunks of the
    global batch, from which the slice is cut.

    Args:
        batch: gives the seed, the step, the slice and the device.
    """

    # The index is part of the generator's key: only append.
    PURPOSES = (
        "noise",  # eps, for samples that bring none
        "time",  # t
        "drop",  # which conditions are dropped
        "window",  # unused
        "end_time",  # a second time, or the length of Shortcut's step
        "extra",  # DistributionMatching's noise of samples, the position of Shortcut's step
        "scale",  # unused
        "probe",  # the seed of a normalizing flow's estimate of its likelihood
        "data",  # DistributionMatching's noise of the batch, for its critic
    )

    def __init__(self, batch: Batch):
        self.batch = batch
        self.count = len(batch.x)

    def _generate(
        self, purpose: str, draw_chunk: Callable[[np.random.Generator], np.ndarray]
    ) -> Tensor:
        """Return the slice's numbers, (B, ...), on the batch's device.

        Args:
            purpose: one of PURPOSES.
            draw_chunk: returns the numbers of one chunk, (RANDOM_CHUNK, ...).
        """
        batch = self.batch
        key = self.PURPOSES.index(purpose)
        # The chunks that the slice touches.
        stop = batch.start + self.count
        first_chunk = batch.start // RANDOM_CHUNK
        last_chunk = -(-stop // RANDOM_CHUNK)
        chunks = []
        for chunk in range(first_chunk, last_chunk):
            chunks.append(draw_chunk(generator(batch.seed, batch.step, chunk, key)))
        # The slice within them.
        offset = batch.start - first_chunk * RANDOM_CHUNK
        numbers = np.concatenate(chunks)[offset:][: self.count]
        return torch.from_numpy(numbers).to(batch.x.device, non_blocking=True)

    def noise(self, x: Tensor, purpose: str = "noise") -> Tensor:
        """Return standard normal noise of x's shape (B, ...), float32."""
        shape = (RANDOM_CHUNK, *x.shape[1:])
        return self._generate(purpose, lambda g: g.standard_normal(shape, dtype=np.float32))

    def uniform(self, purpose: str) -> Tensor:
        """Return numbers uniform in [0, 1), (B,), independent between samples."""
        return self._generate(purpose, lambda g: g.random(RANDOM_CHUNK, dtype=np.float32))

    def stratified(self, purpose: str) -> Tensor:
        """Return (i + u_i) / size for each position i in the global batch, (B,).

        Each is uniform in [0, 1), and their mean over the batch varies far less than that of
        independent numbers.
        """
        stop = self.batch.start + self.count
        positions = torch.arange(self.batch.start, stop, device=self.batch.x.device)
        u = (positions + self.uniform(purpose)) / self.batch.size
        return u.clamp(max=1 - 2**-24)

    def seed(self, purpose: str) -> int:
        """Return a seed in [0, 2^63) for a library with a random number generator.

        It belongs to the slice, not to each chunk: another number of processes changes it.
        """
        batch = self.batch
        key = self.PURPOSES.index(purpose)
        return int(generator(batch.seed, batch.step, batch.start, key).integers(2**63))


# Objectives also work without a StepRandom, on torch's global generator.


def draw_stratified(random: StepRandom | None, purpose: str, like: Tensor) -> Tensor:
    """Return stratified uniform numbers, (B,), for a batch `like` (independent if no random)."""
    if random:
        return random.stratified(purpose)
    return torch.rand(len(like), device=like.device)


def draw_uniform(random: StepRandom | None, purpose: str, like: Tensor) -> Tensor:
    """Return independent uniform numbers of the shape of `like`, (B,)."""
    return random.uniform(purpose) if random else torch.rand_like(like)


def draw_normal(random: StepRandom | None, purpose: str, like: Tensor) -> Tensor:
    """Return standard normal noise of the shape of `like`, (B, ...)."""
    return random.noise(like, purpose) if random else torch.randn_like(like)
