"""Several sources in one sequence, each with its share: real latents among pairs, say."""

from math import gcd

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch, Set, Source
from data.noise import permutation


class Mixed(Source):
    """Interleaves sources in a fixed pattern: every stretch of sum(shares) samples holds each source's share exactly.

    Args:
        sources: what is mixed; all encoded alike, all with conditions or none.
        shares: whole numbers, say [3, 1] for three pairs to one real latent.
    """

    def __init__(self, sources: list[Source], shares: list[int]):
        if len(sources) != len(shares) or not sources or min(shares) < 1:
            raise ValueError(f"Mixed: {len(sources)} sources and shares {shares}; needs a positive share for each source")
        told = [source.manifest.get("guidance", 1.0) for source in sources if isinstance(source, Set)]
        if any(isinstance(scale, list) for scale in told) and any(not isinstance(scale, list) and scale != 1 for scale in told):
            raise ValueError(f"Mixed: guidance of the sources is {told}: beside recorded scales, others must be at 1")
        self.sources, self.shares = sources, shares
        period = sum(shares) // gcd(*shares)
        self.slots = np.repeat(np.arange(len(sources)), [share * period // sum(shares) for share in shares])

    def places(self, seed: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which source each of `count` samples comes from, and its position in that source's own sequence."""
        period = len(self.slots)
        pattern = self.slots[permutation(period, seed, 0, 0)]
        before = np.stack([np.cumsum(pattern == source) - (pattern == source) for source in range(len(self.sources))])
        rounds, slot = np.divmod(np.arange(position, position + count), period)
        which = pattern[slot]
        return which, rounds * np.bincount(self.slots)[which] + before[which, slot]

    def take(self, seed: int, position: int, count: int) -> Batch:
        which, places = self.places(seed, position, count)
        parts = {}
        for source in np.unique(which):
            mine = places[which == source]  # consecutive: a source's sequence is walked without gaps
            parts[int(source)] = self.sources[source].take(seed, int(mine[0]), len(mine))
        back = torch.from_numpy(np.argsort(np.argsort(which, kind="stable"), kind="stable"))
        batches = list(parts.values())
        if len({batch.latent for batch in batches}) > 1 or len({batch.condition is None for batch in batches}) > 1:
            raise ValueError("Mixed: some sources are encoded or conditioned and others are not; make them alike")
        paired = torch.cat([torch.full((len(b.x),), b.noise is not None) for b in batches])[back]
        noise = _joined([torch.zeros_like(b.x) if b.noise is None else b.noise for b in batches], back)
        condition = _joined([b.condition for b in batches if b.condition is not None], back)
        whole = Batch(torch.cat([b.x for b in batches])[back], batches[0].latent, condition)
        whole.noise, whole.paired = (noise, paired) if paired.any() else (None, None)
        if any(b.scale is not None for b in batches):  # data, and what was drawn unguided, are at 1
            whole.scale = torch.cat([torch.ones(len(b.x)) if b.scale is None else b.scale for b in batches])[back]
        return whole


def _joined(parts: list[Tensor], back: Tensor) -> Tensor | None:
    return torch.cat(parts)[back] if parts else None
