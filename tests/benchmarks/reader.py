"""Reading latents: our reader against webdataset's own pipeline and a raw block read, on the same tars, in one run.

    python -m tests.benchmarks.reader

Prints samples per second and paired ratios (median over rounds, sides interleaved). "opened" reads everything once with a
new reader, so that every shard is verified; "read" verifies every sample; "open" reads on with shards that were verified.
"""

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import webdataset

from data.latents import latent_sample
from data.noise import noise
from data.shards import Order, ShardReader, ShardWriter

COUNT, SHARD, SHAPE, BATCH, ROUNDS = 16_384, 2_048, (4, 32, 32), 256, 7


def write(folder: Path) -> None:
    """Write a set of float16 latents."""
    writer = ShardWriter(folder, "latents", {"shape": list(SHAPE)}, COUNT, SHARD)
    for number in writer.missing():
        writer.write(number, [latent_sample(f"{i:09d}", noise(0, i, SHAPE), i % 10) for i in writer.indices(number)])
    writer.finish()


def ours(reader: ShardReader, shuffled: bool) -> None:
    """Read every latent and its class once, in batches."""
    order = Order([shard["count"] for shard in reader.manifest["shards"]], 0)
    for start in range(0, COUNT, BATCH):
        indices = order.indices(start, BATCH) if shuffled else np.arange(start, start + BATCH)
        assert len(reader.arrays("npy", indices)) == len(reader.numbers("cls", indices)) == BATCH


def opened(folder: Path, shuffled: bool) -> None:
    """Read everything once with a new reader."""
    ours(ShardReader(folder), shuffled)


def theirs(folder: Path, shuffled: bool) -> None:
    """Read everything once through webdataset's pipeline."""
    files = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline = webdataset.WebDataset(files, shardshuffle=len(files) if shuffled else False)
    pipeline = (pipeline.shuffle(1000) if shuffled else pipeline).decode()
    assert sum(1 for _ in pipeline) == COUNT


def raw(folder: Path, shuffled: bool) -> None:
    """Read the tars' bytes in blocks of 1 MB."""
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def rate(side) -> float:
    """Return samples per second of one reading."""
    began = time.perf_counter()
    side()
    return COUNT / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        once, always = ShardReader(folder), ShardReader(folder, verify="read")
        for shuffled in (False, True):
            sides = {
                "raw": partial(raw, folder, shuffled),
                "webdataset": partial(theirs, folder, shuffled),
                "opened": partial(opened, folder, shuffled),
                "open": partial(ours, once, shuffled),
                "read": partial(ours, always, shuffled),
            }
            rounds = [{key: rate(side) for key, side in sides.items()} for _ in range(ROUNDS + 1)][1:]
            print("shuffled" if shuffled else "sequential")
            for key in sides:
                web, block = (statistics.median(row[key] / row[base] for row in rounds) for base in ("webdataset", "raw"))
                median = statistics.median(row[key] for row in rounds)
                print(f"  {key:10} {median:12,.0f}/s  {web:7.1f} x webdataset  {block:.3f} of raw")


if __name__ == "__main__":
    main()
