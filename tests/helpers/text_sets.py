"""Sets with captions, and caches of embeddings, written without `rectify`."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.captions import Caption, captions_to_json
from data.files import canonical, digest
from data.shards import ShardWriter
from data.text import text_sample


def write_captions(
    folder: Path, captions: Sequence[Sequence[str]], kind: str = "images", shard: int = 4
) -> Path:
    """Write a set whose samples have these captions and nothing else; return its folder."""
    plan = {"captions": digest(canonical([list(texts) for texts in captions]))}
    writer = ShardWriter(folder, kind, plan, len(captions), shard)
    for number in writer.numbers():
        samples = []
        for i in writer.indices(number):
            entry = {"captions": captions_to_json([Caption(text) for text in captions[i]])}
            data = json.dumps(entry, ensure_ascii=False, sort_keys=True).encode()
            samples.append({"__key__": f"{i:09d}", "json": data})
        writer.write(number, samples)
    writer.finish()
    return folder


def write_cache(folder: Path, texts: Sequence[str], shard: int = 4) -> Path:
    """Write a cache of embeddings that follow from the texts' lengths; return its folder.

    A text of n characters has n + 1 tokens (n, n, n), and the pooled embedding (n, 1).
    """
    writer = ShardWriter(folder, "text", {"encoder": {"class": "Length"}}, len(texts), shard)
    for number in writer.numbers():
        samples = []
        longest = 0
        for i in writer.indices(number):
            length = len(texts[i])
            tokens = np.full((length + 1, 3), length, np.float32)
            samples.append(text_sample(f"{i:09d}", texts[i], tokens, np.array([length, 1.0])))
            longest = max(longest, length + 1)
        writer.write(number, samples, longest=longest)
    writer.finish(tokens_channels=3, pooled_channels=2)
    return folder
