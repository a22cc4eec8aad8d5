"""Captions of a set's samples, added to the batches that training reads."""

from dataclasses import replace

import numpy as np

from data.batch import Batch
from data.captions import captions_from_json, draw_caption
from data.shards import ShardReader
from data.text import TextSource

FIELD = "json"  # of a shard's sample that holds its captions


class CaptionReader:
    """Chooses one caption of each sample, anew in every epoch.

    Args:
        reader: the set.
        text: gives the embeddings of the captions. None: batches have the captions only.

    Raises:
        ValueError: captions are to be embedded, but the set has none.
    """

    def __init__(self, reader: ShardReader, text: TextSource | None):
        self.reader = reader
        self.text = text
        self.has_captions = "captions" in reader.manifest
        if text and not self.has_captions:
            raise ValueError(
                f"{reader.folder}: has no captions, which the option `text` would embed; pack the "
                "images again with captions, or leave out `text`"
            )

    def add_captions(
        self, batch: Batch, indices: np.ndarray, seed: int, epochs: np.ndarray
    ) -> Batch:
        """Return a batch with a caption of each sample; without captions, as it is.

        Args:
            batch: the samples.
            indices: of them.
            seed: of the run.
            epochs: how often each sample was read before.
        """
        if not self.has_captions:
            return batch
        chosen = []
        facts = self.reader.contents(FIELD, indices)
        for data, index, epoch in zip(facts, indices.tolist(), epochs.tolist()):
            captions = captions_from_json(data, f"{self.reader.folder}: sample {index}")
            chosen.append(draw_caption(captions, seed, index, epoch))
        text = self.text.features(chosen) if self.text else None
        return replace(batch, captions=tuple(chosen), text=text)
