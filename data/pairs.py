"""Pairs: (noise index, the sample that a teacher drew from that noise, condition). The noise itself is a function."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, Set
from data.files import digest
from data.form import COUNT, NUMBER, SHA256, conform
from data.images import labels
from data.latents import latent_sample
from data.noise import GENERATOR, noise, noises
from data.shards import ShardReader, ShardWriter, decode_array, encode_array

INVERTED = "inverted"  # said of noises that a teacher carried real latents to: they are stored, no seed gives them
FORM = {
    "count": COUNT,
    "noise": ({"seed": range(2**64), "checksums": {NUMBER: SHA256}}, re.compile(INVERTED)),
    "shape": [range(1, 2**16)],
    "store_noise": bool,
}  # of what a pair set's manifest says beside that of any set


def noise_checksums(seed: int, count: int, shape: Sequence[int]) -> dict[str, str]:
    """Return sha256 of the bits of a few noises of a set: a reader whose generator differs must not go on."""
    return {str(i): digest(noise(seed, i, shape).numpy().tobytes()) for i in sorted({0, count // 2, count - 1})}


def distances(x: Tensor, eps: Tensor) -> list[float]:
    """Return the root mean square of x - eps of each pair, both (B, C, H, W), to six digits; x as it is stored, in float16."""
    gaps = (x.half().double() - eps.double()).square().flatten(1).mean(1).sqrt()
    return [round(gap, 6) for gap in gaps.tolist()]


class PairWriter:
    """Writes a pair set, shard by shard, by any number of processes (see ShardWriter).

    Args:
        folder: where the set goes.
        provenance: plain values: teacher (hash), sampler, steps, guidance, interpolant, prediction, dtype, and so on.
        count: pairs in the set.
        seed: of the noises; None: they are found by inversion, given to `write`, and stored.
        shape: of one sample, (C, H, W).
        shard: pairs in one shard.
        store_noise: keep each noise (float32) beside its sample too, for readers without our generator.
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
        self.seed, self.shape, self.store_noise = seed, tuple(shape), store_noise or seed is None
        bits: dict[str, Any] | str = INVERTED
        if seed is not None:
            bits = {"seed": seed, "generator": GENERATOR, "checksums": noise_checksums(seed, count, shape)}
        plan = {**provenance, "noise": bits, "shape": list(shape), "store_noise": self.store_noise}
        self.shards = ShardWriter(folder, "pairs", plan, count, shard)

    def noise(self, number: int) -> Tensor:
        """Return the noises of a shard, (n, C, H, W), as the set's seed gives them."""
        assert self.seed is not None
        return noises(self.seed, self.shards.indices(number), self.shape)

    def write(
        self,
        number: int,
        samples: Tensor,
        conditions: Tensor | None,
        noises: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        """Write a shard of samples (n, C, H, W), with their conditions (n,), noises, and scales of guidance (n,) if they differ.

        Noises are by default `noise(number)`.
        """
        if not samples.half().isfinite().all():
            raise ValueError(
                f"{self.shards.folder}: samples of shard {number} are not finite in float16; does the teacher's "
                "prediction solve at t = 1 (Noise and Score do not where alpha = 0)?"
            )
        classes = [None] * len(samples) if conditions is None else conditions.tolist()
        keys = [f"{i:09d}" for i in self.shards.indices(number)]
        rows = [latent_sample(key, x, klass) for key, x, klass in zip(keys, samples, classes, strict=True)]
        noises = self.noise(number) if noises is None else noises
        for row, eps in zip(rows, noises) if self.store_noise else ():
            row["noise.npy"] = encode_array(eps.numpy())
        for row, scale in zip(rows, scales) if scales is not None else ():
            row["scale.npy"] = encode_array(scale.numpy())
        self.shards.write(number, rows, distances=distances(samples, noises))


class PairSet:
    """Random access to a finished pair set: `len`, `[i] -> {"noise", "sample", "condition", "index"}`.

    Args:
        folder: the set, made by `rectify collect` or `rectify invert`.
    """

    def __init__(self, folder: str | Path):
        self.reader = ShardReader(folder, "pairs")
        self.manifest = self.reader.manifest
        conform(self.manifest, FORM, f"{folder}/manifest.json")
        bits, self.shape = self.manifest["noise"], tuple(self.manifest["shape"])
        self.seed = None if bits == INVERTED else bits["seed"]
        if self.manifest["count"] != len(self.reader):
            raise ValueError(f"{folder}: {len(self.reader)} pairs of {self.manifest['count']}; collect them again")
        here = {}
        if self.seed is not None and not self.manifest["store_noise"]:
            here = noise_checksums(self.seed, len(self.reader), self.shape)
        for index, found in here.items():
            if bits["checksums"].get(index) != found:
                raise ValueError(f"{folder}: noise {index} has other bits here than where the pairs were collected")

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row, indices = self.reader[i], np.array([i])
        sample = torch.from_numpy(decode_array(row["npy"]).astype(np.float32))
        condition = int(row["cls"].tobytes()) if "cls" in row else None
        return {"noise": self.noise(indices)[0], "sample": sample, "condition": condition, "index": int(row["__key__"])}

    def noise(self, indices: np.ndarray) -> Tensor:
        """Return the noises that these pairs' samples were drawn from, (B, C, H, W): a pair's place is its noise's index."""
        if self.seed is None or self.manifest["store_noise"]:
            return torch.from_numpy(self.reader.arrays("noise.npy", indices))
        return noises(self.seed, indices, self.shape)

    def distances(self) -> np.ndarray:
        """Return the root mean square of sample - noise of every pair, (n,): as recorded, or measured in sets of old."""
        return np.concatenate([self._distances(number) for number in range(len(self.reader.ends))])

    def _distances(self, number: int) -> list[float]:
        count, record = self.manifest["shards"][number]["count"], self.reader.record(number)
        if "distances" in record:
            conform(record, {"distances": [float]}, f"{self.reader.folder}: record {number}")
            if len(record["distances"]) == count:
                return record["distances"]
        indices = np.arange(self.reader.ends[number] - count, self.reader.ends[number])
        return distances(torch.from_numpy(self.reader.arrays("npy", indices)), self.noise(indices))


class Pairs(Set):
    """Pairs as a source of training batches that bring their own noise.

    Args:
        path: the set, made by `rectify collect` or `rectify invert`.
        guidance: the scale that the set must have been collected at, or the [low, high] of scales that it records; training
            refuses another.
        keep: share of the pairs, in (0, 1], that are trained on; those with the largest |sample - noise| are left out, as they
            bend most. 2511.23342 drops a tenth (FID 3.50 to 3.03).
        convert: train a student of another interpolant or prediction than the teacher's on them: conversion, to rectified flow
            from a diffusion teacher, say (2309.06380). Otherwise such a student is refused: keeping the teacher's own form is
            what 2410.07303 advises.
    """

    def __init__(self, path: str, guidance: float | list[float] = 1.0, keep: float = 0.9, convert: bool = False):
        if not 0 < keep <= 1:
            raise ValueError(f"Pairs: keep is {keep}, it must lie in (0, 1]; 1 keeps all pairs")
        self.path, self.guidance, self.keep, self.convert = path, guidance, keep, convert
        self.pairs = PairSet(path)
        self.manifest = self.pairs.manifest
        self.agree("guidance", guidance)
        if keep < 1:
            nearest = np.argsort(self.pairs.distances(), kind="stable")
            self.kept = np.sort(nearest[: round(keep * len(nearest))])

    def __len__(self) -> int:
        return len(self.pairs) if self.kept is None else len(self.kept)

    def agree(self, key: str, wanted: Any, remedy: str = "") -> None:
        """Refuse to go on when the set's provenance says otherwise than the configuration."""
        if (found := self.manifest.get(key)) != wanted:
            raise ValueError(f"{self.path}: collected with {key} {found}, the configuration says {wanted}{remedy}")

    def read(self, indices: np.ndarray) -> Batch:
        reader, pairs = self.pairs.reader, self.pairs
        x = torch.from_numpy(reader.arrays("npy", indices)).float()
        batch = Batch(x, latent=True, condition=labels(reader, indices), noise=pairs.noise(indices))
        if isinstance(self.guidance, list):
            batch.scale = torch.from_numpy(reader.arrays("scale.npy", indices))
        return batch
