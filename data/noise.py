"""Random numbers as a pure function of integers.

The generator is the counter-based Philox4x64 (Salmon et al., SC 2011).
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

GENERATOR = "numpy Philox4x64, key (seed, index), float64 ziggurat rounded to float32"

# A Philox key is (seed, second word). For the noise of a pair the second word is the pair's index,
# below 2^63. Every other use has another second word above that, so no two share a stream.
TRAINING_STREAM = 2**64 - 1
ORDER_STREAM = 2**64 - 2
GUIDANCE_STREAM = 2**64 - 3
SAMPLER_STREAM = 2**64 - 4
CAPTION_STREAM = 2**64 - 5
BUCKET_STREAM = 2**64 - 6
CROP_STREAM = 2**64 - 7


def noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """Return the standard normal noise of one global index, of a shape without a batch axis.

    See `noises` for the arguments.
    """
    return noises(seed, [index], shape)[0]


def noises(seed: int, indices: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Return the standard normal noise of each global index, (n, *shape) float32.

    The bits are the same on every machine, for any number of ranks and in any order.

    Args:
        seed: the set's seed, in [0, 2^64).
        indices: global indices, in [0, 2^63). Each index has another noise.
        shape: of one noise.

    Raises:
        ValueError: the seed or an index is out of range.
    """
    indices = [int(i) for i in indices]
    if not (0 <= seed < 2**64 and all(0 <= i < 2**63 for i in indices)):
        raise ValueError(
            f"noise: seed {seed} must be in [0, 2^64) and all indices in [0, 2^63), got {indices}"
        )
    values = np.empty((len(indices), math.prod(shape)))

    # One generator gets the key of each index in turn: a third of the time of new generators.
    philox = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64))
    normal = np.random.Generator(philox)
    state = philox.state
    for one, index in zip(values, indices):
        state["state"]["key"][1] = index
        philox.state = state
        normal.standard_normal(out=one)
    return torch.from_numpy(values.astype(np.float32)).reshape(-1, *shape)


def generator(seed: int, *counter: int, stream: int = TRAINING_STREAM) -> np.random.Generator:
    """Return a generator for up to three integers, such as (step, chunk, purpose).

    Its numbers are independent of the noise of every pair.
    """
    words = np.array([0, *counter, 0, 0, 0][:4], dtype=np.uint64)
    key = np.array([seed, stream], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=words))


def guidance_scales(seed: int, indices: Sequence[int], low: float, high: float) -> Tensor:
    """Return a guidance scale for each global index, uniform in [low, high], (n,) float32."""
    scales = []
    for index in indices:
        u = generator(seed, index, stream=GUIDANCE_STREAM).random()
        scales.append(low + (high - low) * u)
    return torch.tensor(scales)


def step_noise(seed: int, index: int, step: int, shape: Sequence[int]) -> Tensor:
    """Return the standard normal noise that a stochastic sampler adds in a step (0, 1, ...).

    It belongs to the trajectory that starts from `noise` of the same index.
    """
    values = generator(seed, index, step, stream=SAMPLER_STREAM).standard_normal(tuple(shape))
    return torch.from_numpy(values.astype(np.float32))


def permutation(n: int, seed: int, *counter: int, stream: int = ORDER_STREAM) -> np.ndarray:
    """Return a permutation of range(n).

    It is made from raw Philox words, so that no version of a library can change it.
    """
    words = generator(seed, *counter, stream=stream).bit_generator.random_raw(n)
    return np.argsort(words, kind="stable")
