"""Pairs of noise and the sample that a teacher made from it, with the condition.

The noise of a pair is not stored: it is a function of the set's seed and the pair's index.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, IndexedDataset
from data.files import digest
from data.images import read_labels
from data.latents import latent_sample, read_latents
from data.noise import GENERATOR, noise, noises
from data.schema import COUNT, NUMBER, SHA256, check_schema, shorten
from data.shards import ShardReader, ShardWriter, array_to_npy, npy_to_array

# The entry `noise` of a manifest whose noises were found by inverting real latents. They are
# stored, since no seed gives them.
INVERTED = "inverted"

# Entries of a pair set's manifest, in addition to those of any set.
PAIR_SCHEMA = {
    "count": COUNT,
    "noise": ({"seed": range(2**64), "checksums": {NUMBER: SHA256}}, re.compile(INVERTED)),
    "shape": [range(1, 2**16)],
    "store_noise": bool,
}


def checksum_noises(seed: int, count: int, shape: Sequence[int]) -> dict[str, str]:
    """Return the sha256 of a few noises of a set, by their index.

    A reader compares them, and so notices a generator with other bits.
    """
    checksums = {}
    for i in sorted({0, count // 2, count - 1}):
        checksums[str(i)] = digest(noise(seed, i, shape).numpy().tobytes())
    return checksums


def measure_distances(x: Tensor, eps: Tensor) -> list[float]:
    """Return the root mean square of x - eps for each pair, to six digits.

    Args:
        x: samples, (B, C, H, W). They are rounded to float16, as they are stored.
        eps: noises, (B, C, H, W).
    """
    squares = (x.half().double() - eps.double()).square()
    distances = squares.flatten(1).mean(1).sqrt().tolist()
    return [round(distance, 6) for distance in distances]


class PairWriter:
    """Writes a set of pairs shard by shard, from any number of processes (see ShardWriter).

    Args:
        folder: where the set is written.
        provenance: plain values: teacher (hash), sampler, steps, guidance, descriptions of
            interpolant and prediction, dtype and so on.
        count: pairs in the set.
        seed: of the noises. None: they were found by inversion, are given to `write`, and stored.
        shape: of one sample, (C, H, W).
        shard: pairs in one shard.
        store_noise: store each noise (float32) beside its sample, for readers that lack our
            generator.
    """

    def __init__(
        self,
        folder: str | Path,
        provenance: dict[str, Any],
        count: int,
        seed: int | None,
        shape: Sequence[int],
        shard: int = 512,
        store_noise: bool = False,
    ):
        self.seed = seed
        self.shape = tuple(shape)
        self.store_noise = store_noise or seed is None
        noise_entry: dict[str, Any] | str = INVERTED
        if seed is not None:
            noise_entry = {
                "seed": seed,
                "generator": GENERATOR,
                "checksums": checksum_noises(seed, count, shape),
            }
        plan = {
            **provenance,
            "noise": noise_entry,
            "shape": list(shape),
            "store_noise": self.store_noise,
        }
        self.shards = ShardWriter(folder, "pairs", plan, count, shard)

    def noise(self, number: int) -> Tensor:
        """Return the noises of a shard, (n, C, H, W), from the set's seed."""
        assert self.seed is not None
        return noises(self.seed, self.shards.indices(number), self.shape)

    def write(
        self,
        number: int,
        samples: Tensor,
        conditions: Tensor | None,
        noises: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> None:
        """Write a shard.

        Args:
            number: of the shard.
            samples: (n, C, H, W).
            conditions: class of each sample, (n,), or None.
            noises: noise of each sample, (n, C, H, W). By default `noise(number)`.
            guidance: guidance scale of each sample, (n,), if they differ.

        Raises:
            ValueError: a sample is not finite in float16.
        """
        if not samples.half().isfinite().all():
            raise ValueError(
                f"{self.shards.folder}: samples of shard {number} are not finite in float16; can "
                "the teacher's prediction be solved at t = 1 (NoisePrediction and Score cannot "
                "where alpha = 0)?"
            )
        if noises is None:
            noises = self.noise(number)
        labels = [None] * len(samples) if conditions is None else conditions.tolist()

        # Make the samples of the shard: latent and class, then the optional fields.
        entries = []
        for i, latent, label in zip(self.shards.indices(number), samples, labels, strict=True):
            entries.append(latent_sample(f"{i:09d}", latent, label))
        if self.store_noise:
            for entry, eps in zip(entries, noises):
                entry["noise.npy"] = array_to_npy(eps.numpy())
        if guidance is not None:
            for entry, scale in zip(entries, guidance):
                entry["scale.npy"] = array_to_npy(scale.numpy())
        self.shards.write(number, entries, distances=measure_distances(samples, noises))


class PairSet:
    """Random access to a finished set of pairs.

    `len(pairs)` is the number of pairs, `pairs[i]` is {"noise", "sample", "condition", "index"}.

    Args:
        folder: the set, made by `rectify collect` or `rectify invert`.

    Raises:
        ValueError: the manifest is damaged, or this machine's generator gives other noises.
    """

    def __init__(self, folder: str | Path):
        self.reader = ShardReader(folder, "pairs")
        self.manifest = self.reader.manifest
        check_schema(self.manifest, PAIR_SCHEMA, f"{folder}/manifest.json")
        noise_entry = self.manifest["noise"]
        self.seed = None if noise_entry == INVERTED else noise_entry["seed"]
        self.shape = tuple(self.manifest["shape"])

        count = self.manifest["count"]
        if count != len(self.reader):
            raise ValueError(f"{folder}: has {len(self.reader)} pairs of {count}; collect it again")
        if self.seed is not None and not self.manifest["store_noise"]:
            checksums = checksum_noises(self.seed, count, self.shape)
            for index, found in checksums.items():
                if noise_entry["checksums"].get(index) != found:
                    raise ValueError(
                        f"{folder}: noise {index} has other bits on this machine than where the "
                        "pairs were collected; collect them again, with store_noise"
                    )

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> dict[str, Any]:
        fields = self.reader[i]
        sample = npy_to_array(fields["npy"]).astype(np.float32)
        condition = int(fields["cls"].tobytes()) if "cls" in fields else None
        return {
            "noise": self.noise(np.array([i]))[0],
            "sample": torch.from_numpy(sample),
            "condition": condition,
            "index": int(fields["__key__"]),
        }

    def noise(self, indices: np.ndarray) -> Tensor:
        """Return the noises of the pairs at these indices, (B, C, H, W)."""
        if self.seed is None or self.manifest["store_noise"]:
            return torch.from_numpy(self.reader.arrays("noise.npy", indices))
        return noises(self.seed, indices, self.shape)

    def distances(self) -> np.ndarray:
        """Return the root mean square of sample - noise of every pair, (n,).

        It is read from the shards' records, or measured if they lack it.
        """
        shards = range(len(self.reader.ends))
        return np.concatenate([self._shard_distances(number) for number in shards])

    def _shard_distances(self, number: int) -> list[float]:
        count = self.manifest["shards"][number]["count"]
        record = self.reader.record(number)
        if "distances" in record:
            check_schema(record, {"distances": [float]}, f"{self.reader.folder}: record {number}")
            if len(record["distances"]) == count:
                return record["distances"]
        end = self.reader.ends[number]
        indices = np.arange(end - count, end)
        x = torch.from_numpy(self.reader.arrays("npy", indices))
        return measure_distances(x, self.noise(indices))


class Pairs(IndexedDataset):
    """Pairs as training data: batches with the noise of each sample.

    Args:
        path: the set, made by `rectify collect` or `rectify invert`.
        guidance: guidance scale of the set, or [low, high] if it was collected with a scale for
            each pair. A set with another scale is refused.
        keep_fraction: fraction of the pairs, in (0, 1], to train on. Pairs with the largest
            |sample - noise| are left out, because their trajectories are curved most. Leaving out
            a tenth improved FID from 3.50 to 3.03 (arXiv 2511.23342).
        allow_conversion: allow a student with another interpolant or prediction than the teacher,
            for example to convert a diffusion teacher to rectified flow (Liu et al. 2023,
            arXiv 2309.06380). By default this is refused: Wang et al. 2024 (arXiv 2410.07303)
            advise to keep those of the teacher.

    Raises:
        ValueError: keep_fraction is out of range, or the set has another guidance scale.
    """

    def __init__(
        self,
        path: str,
        guidance: float | list[float] = 1.0,
        keep_fraction: float = 0.9,
        allow_conversion: bool = False,
    ):
        if not 0 < keep_fraction <= 1:
            raise ValueError(
                f"Pairs: keep_fraction is {keep_fraction}; it must lie in (0, 1], 1 keeps all pairs"
            )
        self.path = path
        self.guidance = guidance
        self.keep_fraction = keep_fraction
        self.allow_conversion = allow_conversion
        self.pairs = PairSet(path)
        self.manifest = self.pairs.manifest
        self.check_provenance("guidance", guidance)
        if keep_fraction < 1:
            nearest = np.argsort(self.pairs.distances(), kind="stable")
            count = round(keep_fraction * len(nearest))
            self.kept = np.sort(nearest[:count])

    def __repr__(self) -> str:
        return self.path

    def __len__(self) -> int:
        if self.kept is None:
            return len(self.pairs)
        return len(self.kept)

    def check_provenance(self, key: str, configured: Any) -> None:
        """Check that the set was collected with the configured value.

        Args:
            key: entry of the manifest, for example teacher.
            configured: plain value that it must have.
        """
        collected = self.manifest.get(key)
        if collected != configured:
            raise ValueError(
                f"{self.path}: collected with {key} {shorten(collected)}, but the configuration "
                f"has {shorten(configured)}; change it, or collect the pairs again"
            )

    def read(self, indices: np.ndarray) -> Batch:
        reader = self.pairs.reader
        x = read_latents(reader, indices)
        condition = read_labels(reader, indices)
        eps = self.pairs.noise(indices)
        guidance = None
        if isinstance(self.guidance, list):
            guidance = torch.from_numpy(reader.arrays("scale.npy", indices))
        return Batch(x, latent=True, condition=condition, noise=eps, guidance=guidance)
