"""Randomness as a pure function of integers, by the counter-based Philox4x64 (Salmon et al., SC 2011)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GENERATOR = "numpy Philox4x64, key (seed, index), float64 ziggurat rounded to float32"
TRAINING = 2**64 - 1  # the key's second word for draws that are not a pair's noise, whose index stays below it
ORDER = 2**64 - 2  # likewise, for permutations
SCALES = 2**64 - 3  # likewise, for scales of guidance
STEPS = 2**64 - 4  # likewise, for the noise that a sampler draws on its way


def noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Return the standard normal noise of a global index: the same bits on every machine, rank count and order.

    Args:
        seed: the set's seed, in [0, 2^64).
        index: the global index, in [0, 2^63); one index is one noise.
        shape: of the result, without a batch axis.
    """
    if not (0 <= seed < 2**64 and 0 <= index < 2**63):
        raise ValueError(f"noise: seed {seed} must lie in [0, 2^64) and index {index} in [0, 2^63)")
    philox = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))
    return torch.from_numpy(np.random.Generator(philox).standard_normal(tuple(shape)).astype(np.float32))


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
