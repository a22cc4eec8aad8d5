"""Reading latents: our reader against webdataset's own pipeline and a raw block read, on the same tars, in one run.

    python -m tests.benchmarks.reader

Prints samples per second and paired ratios (median over rounds, sides interleaved).
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import webdataset

from data.latents import Latents, latent_sample
from data.noise import noise
from data.shards import Order, ShardWriter

COUNT, SHARD, SHAPE, BATCH, ROUNDS = 16_384, 2_048, (4, 32, 32), 256, 5


def write(folder: Path) -> None:
    """Write a set of float16 latents."""
    writer = ShardWriter(folder, "latents", {"shape": list(SHAPE)}, COUNT, SHARD)
    for number in writer.missing():
        writer.write(number, [latent_sample(f"{i:09d}", noise(0, i, SHAPE), i % 10) for i in writer.indices(number)])
    writer.finish()


def ours(folder: Path, shuffled: bool) -> float:
    """Read everything once through Latents, the checksum of every shard included; return samples per second."""
    began = time.perf_counter()
    source = Latents(str(folder))
    order = Order([shard["count"] for shard in source.manifest["shards"]], 0)
    for start in range(0, COUNT, BATCH):
        source.read(order.indices(start, BATCH) if shuffled else np.arange(start, start + BATCH))
    return COUNT / (time.perf_counter() - began)


def theirs(folder: Path, shuffled: bool) -> float:
    """Read everything once through webdataset's pipeline."""
    files = [str(path) for path in sorted(folder.glob("*.tar"))]
    began = time.perf_counter()
    pipeline = webdataset.WebDataset(files, shardshuffle=len(files) if shuffled else False)
    pipeline = (pipeline.shuffle(1000) if shuffled else pipeline).decode()
    count = sum(1 for _ in pipeline)
    assert count == COUNT
    return COUNT / (time.perf_counter() - began)


def raw(folder: Path) -> float:
    """Read the tars' bytes in blocks of 1 MB."""
    began = time.perf_counter()
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    return COUNT / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        for shuffled in (False, True):
            rounds = [(ours(folder, shuffled), theirs(folder, shuffled), raw(folder)) for _ in range(ROUNDS + 1)][1:]
            mine, web, blocks = (statistics.median(side) for side in zip(*rounds))
            ratios = [statistics.median(row[0] / row[i] for row in rounds) for i in (1, 2)]
            kind = "shuffled" if shuffled else "sequential"
            print(f"{kind}: ours {mine:,.0f}/s, webdataset {web:,.0f}/s, raw {blocks:,.0f}/s; ", end="")
            print(f"ours / webdataset {ratios[0]:.1f}, ours / raw {ratios[1]:.3f}")


if __name__ == "__main__":
    main()
