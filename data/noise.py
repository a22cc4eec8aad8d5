"""Randomness as a pure function of integers, by the counter-based Philox4x64 (Salmon et al., SC 2011)."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

GENERATOR = "numpy Philox4x64, key (seed, index), float64 ziggurat rounded to float32"
TRAINING = 2**64 - 1  # the key's second word for draws that are not a pair's noise, whose index stays below it
ORDER = 2**64 - 2  # likewise, for permutations
SCALES = 2**64 - 3  # likewise, for scales of guidance
STEPS = 2**64 - 4  # likewise, for the noise that a sampler draws on its way


def noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Return the standard normal noise of a global index, of a shape without a batch axis (see `noises`)."""
    return noises(seed, [index], shape)[0]


def noises(seed: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Return the standard normal noises of global indices, (n, *shape): the same bits on every machine, rank count and order.

    Args:
        seed: the set's seed, in [0, 2^64).
        indices: global indices, in [0, 2^63); one index is one noise.
        shape: of each.
    """
    indices = [int(i) for i in indices]
    if not (0 <= seed < 2**64 and all(0 <= i < 2**63 for i in indices)):
        raise ValueError(f"noise: seed {seed} must lie in [0, 2^64) and indices {indices} in [0, 2^63)")
    drawn = np.empty((len(indices), math.prod(shape)))
    philox = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    normal, start = np.random.Generator(philox), philox.state  # a generator given another key costs a third of a new one
    for row, i in zip(drawn, indices):
        start["state"]["key"][1] = i
        philox.state = start
        normal.standard_normal(out=row)
    return torch.from_numpy(drawn.astype(np.float32)).reshape(-1, *shape)


def generator(seed: int, *counter: int, stream: int = TRAINING) -> np.random.Generator:
    """Return a generator for up to three integers (say step, chunk, purpose), apart from every pair's noise."""
    words = np.array([0, *counter, 0, 0, 0][:4], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=words))


def scales(seed: int, indices: Sequence[int], low: float, high: float) -> Tensor:
    """Return a scale of guidance for each global index, uniform in [low, high], float32, as `noise` its noise."""
    drawn = [generator(seed, i, stream=SCALES).random() for i in indices]
    return torch.tensor([low + (high - low) * u for u in drawn])


def underway(seed: int, index: int, step: int, shape: Sequence[int]) -> Tensor:
    """Return the standard normal noise that a sampler draws in a step (0, 1, ...) of the walk from `noise` of the same index."""
    return torch.from_numpy(generator(seed, index, step, stream=STEPS).standard_normal(tuple(shape)).astype(np.float32))


def permutation(n: int, seed: int, *counter: int) -> np.ndarray:
    """Return a permutation of range(n), from raw Philox words alone, so that no library version can change it."""
    return np.argsort(generator(seed, *counter, stream=ORDER).bit_generator.random_raw(n), kind="stable")
