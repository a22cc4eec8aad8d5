"""Several sources in one sequence, in fixed shares: real latents among pairs, for example."""

from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, IndexedDataset, RandomAccessSource, check_one_size
from data.noise import permutation


class Locations(NamedTuple):
    """Where consecutive samples of a mixture come from, (n,) each."""

    source: np.ndarray  # number of each sample's source
    position: np.ndarray  # its position in that source


class JoinedNoise(NamedTuple):
    """The noise of a batch from several sources; both are None if no source brings any."""

    noise: Tensor | None  # zero for samples that bring none, (B, ...)
    paired: Tensor | None  # which samples bring it, (B,) bool


class Mixed(RandomAccessSource):
    """Interleaves sources in a fixed pattern with exact shares.

    Every period of sum(shares) consecutive samples holds exactly its share of each source.

    Args:
        sources: the sources to mix. All hold images or all hold latents, of one size; all have
            conditions or none has. None gives embeddings of captions.
        shares: whole numbers, for example [3, 1] for three pairs to one real latent.
    """

    def __init__(self, sources: list[RandomAccessSource], shares: list[int]):
        if len(sources) != len(shares) or not sources or min(shares) < 1:
            raise ValueError(
                f"Mixed: {len(sources)} sources with shares {shares}; "
                "give one positive share for each source"
            )
        for source in sources:
            if isinstance(source, IndexedDataset):
                check_one_size(source, "Mixed")
        _check_scales(sources)
        _check_alike([source.take(0, 0, 1) for source in sources])
        self.sources = sources
        self.shares = shares
        period = sum(shares) // gcd(*shares)
        counts = [share * period // sum(shares) for share in shares]
        self.slots = np.repeat(np.arange(len(sources)), counts)

    def locate(self, seed: int, position: int, count: int) -> Locations:
        """Return where `count` samples from a position on come from."""
        # Shuffle one period; it repeats for ever.
        period = len(self.slots)
        pattern = self.slots[permutation(period, seed, 0, 0)]

        # For each source and slot: the samples of that source in earlier slots of the period.
        earlier = []
        for source in range(len(self.sources)):
            matches = pattern == source
            earlier.append(np.cumsum(matches) - matches)
        before = np.stack(earlier)

        periods, slot = np.divmod(np.arange(position, position + count), period)
        source_of = pattern[slot]
        positions = periods * np.bincount(self.slots)[source_of] + before[source_of, slot]
        return Locations(source_of, positions)

    def take(self, seed: int, position: int, count: int) -> Batch:
        # Read the samples of each source at once: their positions in it are consecutive.
        source_of, positions = self.locate(seed, position, count)
        batches = []
        for source in np.unique(source_of):
            its_positions = positions[source_of == source]
            first = int(its_positions[0])
            batches.append(self.sources[source].take(seed, first, len(its_positions)))

        # Put them back into the order of the sequence.
        by_source = np.argsort(source_of, kind="stable")
        back = torch.from_numpy(np.argsort(by_source, kind="stable"))
        joined = _join_noise(batches, back)
        return Batch(
            x=torch.cat([batch.x for batch in batches])[back],
            latent=batches[0].latent,
            condition=_join_conditions(batches, back),
            captions=_join_captions(batches, back),
            noise=joined.noise,
            paired=joined.paired,
            guidance=_join_scales(batches, back),
        )


def _check_scales(sources: list[RandomAccessSource]) -> None:
    """Check that a source with one fixed scale is unguided if another one records its scales."""
    recorded = []
    fixed = []
    for source in sources:
        if isinstance(source, IndexedDataset):
            scale = source.manifest.get("guidance", 1.0)
            if isinstance(scale, list):
                recorded.append(scale)
            elif scale != 1:
                fixed.append(scale)
    if recorded and fixed:
        raise ValueError(
            f"Mixed: one source records guidance scales in {recorded[0]}, another one has the "
            f"fixed guidance {fixed[0]}; beside recorded scales it must be 1"
        )


def _check_alike(batches: list[Batch]) -> None:
    """Check that all sources hold images or all latents, of one shape and all with conditions.

    Args:
        batches: one of each source.
    """
    first = batches[0]
    for batch in batches:
        same_condition = (batch.condition is None) == (first.condition is None)
        if batch.latent != first.latent or not same_condition:
            raise ValueError(
                "Mixed: only some of the sources hold latents, or only some have conditions; "
                "use sources of the same kind"
            )
        if batch.text is not None:
            raise ValueError(
                "Mixed: one of the sources gives embeddings of captions, which are not mixed; "
                "leave out its option `text`"
            )
        if batch.x.shape != first.x.shape:
            shapes = [tuple(part.x.shape[1:]) for part in (first, batch)]
            raise ValueError(
                f"Mixed: the samples of one source are {shapes[0]}, those of another {shapes[1]}; "
                "they must have one shape (channels, height, width)"
            )


def _join_conditions(batches: list[Batch], back: Tensor) -> Tensor | None:
    conditions = [batch.condition for batch in batches if batch.condition is not None]
    if not conditions:
        return None
    return torch.cat(conditions)[back]


def _join_captions(batches: list[Batch], back: Tensor) -> tuple[str, ...] | None:
    """Return the captions of all samples: "" for those of sources without captions."""
    if all(batch.captions is None for batch in batches):
        return None
    captions: list[str] = []
    for batch in batches:
        captions.extend(batch.captions or [""] * len(batch.x))
    return tuple(captions[i] for i in back.tolist())


def _join_noise(batches: list[Batch], back: Tensor) -> JoinedNoise:
    """Return the noise of all samples, and which of them bring it."""
    noise = []
    paired = []
    for batch in batches:
        noise.append(torch.zeros_like(batch.x) if batch.noise is None else batch.noise)
        paired.append(torch.full((len(batch.x),), batch.noise is not None))
    which = torch.cat(paired)[back]
    if not which.any():
        return JoinedNoise(None, None)
    return JoinedNoise(torch.cat(noise)[back], which)


def _join_scales(batches: list[Batch], back: Tensor) -> Tensor | None:
    """Return the guidance scales of all samples: 1 for data and unguided samples."""
    if all(batch.guidance is None for batch in batches):
        return None
    scales = []
    for batch in batches:
        unguided = torch.ones(len(batch.x))
        scales.append(unguided if batch.guidance is None else batch.guidance)
    return torch.cat(scales)[back]
