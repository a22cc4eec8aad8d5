"""Speed of `rectify pack` beside a plain loop that writes with webdataset, on the same images.

    python -m tests.benchmarks.pack [IMAGES [ROUNDS]]

Makes IMAGES (20,000) pictures of 256 x 256 pixels, half of them JPEG and half PNG, and packs them
in 64 x 64 pixels. Prints images per second and paired ratios: medians over rounds, in which all
take turns. The peak of memory is that of the first pack, when half of the images are packed and at
the end.

    plain    decodes, resizes and encodes each image, and writes it with webdataset.ShardWriter
    pack     `rectify pack`
    workers  `rectify pack --workers 2`
"""

import io
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image, ImageOps

from data.pack import pack
from data.progress import current

IMAGES = 20_000
ROUNDS = 5
SIDE = 256
SIZE = 64
SHARD = 1024
NOISE = 12  # levels of 255
INTERVAL = 0.01  # seconds between readings of the memory


def write_images(folder: Path, count: int) -> None:
    """Write pictures of smooth colours with noise: odd ones as JPEG, even ones as PNG."""
    folder.mkdir()
    for i in range(count):
        generator = np.random.default_rng(i)
        colours = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = colours.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth) + generator.integers(-NOISE, NOISE + 1, (SIDE, SIDE, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        suffix = "jpg" if i % 2 else "png"
        image.save(folder / f"{i:06d}.{suffix}")


def pack_plainly(images: Path, out: Path) -> None:
    """Pack a folder of images as one would without this project."""
    out.mkdir()
    pattern = str(out / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SHARD, verbose=0) as writer:
        for i, path in enumerate(sorted(images.iterdir())):
            image = Image.open(path).convert("RGB")
            image = ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            image.save(buffer, "png")
            writer.write({"__key__": f"{i:09d}", "png": buffer.getvalue()})


def pack_ours(images: Path, out: Path, workers: int) -> None:
    """Pack a folder of images by `rectify pack`, without its messages."""
    with redirect_stderr(io.StringIO()):
        pack(out, images, size=SIZE, shard=SHARD, workers=workers)


def measure_seconds(work: Callable[[Path], None], out: Path) -> float:
    """Return the seconds that it takes to pack into a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    work(out)
    return time.perf_counter() - began


def read_peak() -> int:
    """Return the largest memory of this process since its start or the last reset, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measure_peaks(work: Callable[[Path], None], out: Path) -> tuple[int, int]:
    """Return the peak of memory, in KiB, when half of the images are packed and at the end."""
    half = []
    ended = threading.Event()
    before = current()  # of earlier work

    def watch() -> None:
        while not half and not ended.wait(INTERVAL):
            meter = current()
            if meter and meter is not before and meter.done >= meter.total / 2:
                half.append(read_peak())

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    watcher = threading.Thread(target=watch)
    watcher.start()
    work(out)
    ended.set()
    watcher.join()
    return half[0], read_peak()


def main() -> None:
    """Print the speeds, their ratios and the peaks of memory."""
    numbers = [int(word) for word in sys.argv[1:]]
    count, rounds = [*numbers, *(IMAGES, ROUNDS)[len(numbers) :]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        write_images(images, count)
        works = {
            "plain": partial(pack_plainly, images),
            "pack": partial(pack_ours, images, workers=1),
            "workers": partial(pack_ours, images, workers=2),
        }
        half, end = measure_peaks(works["pack"], folder / "first")
        results = []
        for _ in range(rounds):
            seconds = {key: measure_seconds(work, folder / key) for key, work in works.items()}
            results.append(seconds)

    for key in works:
        rate = count / statistics.median(seconds[key] for seconds in results)
        print(f"  {key:8} {rate:8,.0f} images/s")
    for key, base in (("pack", "plain"), ("workers", "pack")):
        ratio = statistics.median(seconds[base] / seconds[key] for seconds in results)
        print(f"  {key} is {ratio:.2f} times as fast as {base}")
    print(f"  peak of memory: {half / 1024:.0f} MiB at half, {end / 1024:.0f} MiB at the end")


if __name__ == "__main__":
    main()
