"""Speed of reading latents: our reader, webdataset's pipeline and raw blocks, on the same tars.

    python -m tests.benchmarks.reader

Prints samples per second and paired ratios: medians over rounds, in which all readers take turns.

    raw         the bytes in blocks of 1 MB
    webdataset  webdataset's pipeline
    opened      everything once with a new reader, which verifies every shard
    open        the same again with a reader whose shards are verified already
    read        the same with a reader that verifies every sample
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import webdataset

from data.latents import latent_sample
from data.noise import noise
from data.shards import Order, ShardReader, ShardWriter

SAMPLES = 16_384
SHARD = 2_048
SHAPE = (4, 32, 32)
BATCH = 256
ROUNDS = 7


def write_latents(folder: Path) -> None:
    """Write a set of float16 latents."""
    writer = ShardWriter(folder, "latents", {"shape": list(SHAPE)}, SAMPLES, SHARD)
    for number in writer.missing():
        samples = []
        for i in writer.indices(number):
            samples.append(latent_sample(f"{i:09d}", noise(0, i, SHAPE), i % 10))
        writer.write(number, samples)
    writer.finish()


def read_batches(reader: ShardReader, shuffled: bool) -> None:
    """Read every latent and its class once, in batches."""
    order = Order([shard["count"] for shard in reader.manifest["shards"]], 0)
    for start in range(0, SAMPLES, BATCH):
        indices = np.arange(start, start + BATCH)
        if shuffled:
            indices = order.indices(start, BATCH)
        latents = reader.arrays("npy", indices)
        classes = reader.numbers("cls", indices)
        assert len(latents) == len(classes) == BATCH


def read_with_new_reader(folder: Path, shuffled: bool) -> None:
    """Read everything once with a new reader."""
    read_batches(ShardReader(folder), shuffled)


def read_with_webdataset(folder: Path, shuffled: bool) -> None:
    """Read everything once through webdataset's pipeline."""
    files = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline = webdataset.WebDataset(files, shardshuffle=len(files) if shuffled else False)
    if shuffled:
        pipeline = pipeline.shuffle(1000)
    pipeline = pipeline.decode()
    assert sum(1 for _ in pipeline) == SAMPLES


def read_blocks(folder: Path, shuffled: bool) -> None:
    """Read the tars' bytes in blocks of 1 MB."""
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def measure_speed(read: Callable[[], None]) -> float:
    """Return the samples per second of one reading."""
    began = time.perf_counter()
    read()
    return SAMPLES / (time.perf_counter() - began)


def print_speeds(rounds: list[dict[str, float]]) -> None:
    """Print each reader's median speed, and the median of its ratio to two others."""

    def median_ratio(name: str, base: str) -> float:
        return statistics.median(speeds[name] / speeds[base] for speeds in rounds)

    for name in rounds[0]:
        speed = statistics.median(speeds[name] for speeds in rounds)
        to_webdataset = median_ratio(name, "webdataset")
        to_raw = median_ratio(name, "raw")
        print(
            f"  {name:10} {speed:12,.0f}/s  {to_webdataset:7.1f} x webdataset  {to_raw:.3f} of raw"
        )


def main() -> None:
    """Print a table for each order."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_latents(folder)
        verified_once = ShardReader(folder)
        verified_always = ShardReader(folder, verify="read")
        for shuffled in (False, True):
            readings = {
                "raw": partial(read_blocks, folder, shuffled),
                "webdataset": partial(read_with_webdataset, folder, shuffled),
                "opened": partial(read_with_new_reader, folder, shuffled),
                "open": partial(read_batches, verified_once, shuffled),
                "read": partial(read_batches, verified_always, shuffled),
            }
            rounds = []
            for _ in range(ROUNDS + 1):
                rounds.append({name: measure_speed(read) for name, read in readings.items()})
            print("shuffled" if shuffled else "sequential")
            print_speeds(rounds[1:])  # the first one warms up


if __name__ == "__main__":
    main()
