"""Speed of `rectify encode` beside a plain loop over the same batches, on the same images.

    python -m tests.benchmarks.encode [IMAGES [ROUNDS]]

Makes and packs IMAGES (2,000) pictures of 256 x 256 pixels, and encodes them by an AutoencoderKL
of random weights that shrinks them 8 times. Prints images per second and the paired ratio: medians
over rounds, in which both take turns. The peak of memory is that of the first encode, when half of
the images are encoded and at the end.

    plain    decodes the images, calls vae.encode, and writes with webdataset.ShardWriter
    encode   `rectify encode --scale keep`
"""

import io
import statistics
import sys
import tempfile
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset
from diffusers import AutoencoderKL
from PIL import Image

from data.pack import pack
from data.shards import ShardReader
from models.codec import save_codec
from tests.benchmarks.pack import SIDE, measure_peaks, measure_seconds, write_images
from trainer.jobs.encode import encode
from trainer.latent_statistics import CODEC_PIXELS

IMAGES = 2000
ROUNDS = 3
SHARD = 256
BATCH = CODEC_PIXELS // SIDE**2
CHANNELS = (8, 8, 16, 16)


def make_codec() -> AutoencoderKL:
    """Return an autoencoder of 4 channels."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        norm_num_groups=8,
    )


@torch.inference_mode()
def encode_plainly(images: Path, codec: Path, out: Path) -> None:
    """Encode packed images as one would without this project."""
    out.mkdir()
    vae = AutoencoderKL.from_pretrained(codec).eval()
    scale = vae.config.scaling_factor
    reader = ShardReader(images)
    pattern = str(out / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=SHARD, verbose=0) as writer:
        for start in range(0, len(reader), BATCH):
            indices = range(start, min(start + BATCH, len(reader)))
            pictures = [Image.open(io.BytesIO(reader[i]["png"].tobytes())) for i in indices]
            pixels = np.stack([np.asarray(picture) for picture in pictures])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = vae.encode(x).latent_dist.mode() * scale
            for i, latent in zip(indices, latents.half().numpy()):
                writer.write({"__key__": f"{i:09d}", "npy": latent})


def encode_ours(images: Path, codec: Path, out: Path) -> None:
    """Encode packed images by `rectify encode`, without its messages."""
    with redirect_stderr(io.StringIO()):
        encode(images, out, codec, shard=SHARD, scale="keep")


def main() -> None:
    """Print the speeds, their ratio and the peaks of memory."""
    numbers = [int(word) for word in sys.argv[1:]]
    count, rounds = [*numbers, *(IMAGES, ROUNDS)[len(numbers) :]]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "pictures", count)
        with redirect_stderr(io.StringIO()):
            pack(folder / "images", folder / "pictures", size=SIDE, holdout=0.0, shard=SHARD)
        save_codec(make_codec(), folder / "codec")
        works = {
            "plain": partial(encode_plainly, folder / "images/train", folder / "codec"),
            "encode": partial(encode_ours, folder / "images/train", folder / "codec"),
        }
        half, end = measure_peaks(works["encode"], folder / "first")
        results = []
        for _ in range(rounds):
            seconds = {key: measure_seconds(work, folder / key) for key, work in works.items()}
            results.append(seconds)

    for key in works:
        rate = count / statistics.median(seconds[key] for seconds in results)
        print(f"  {key:8} {rate:8,.1f} images/s")
    ratio = statistics.median(seconds["plain"] / seconds["encode"] for seconds in results)
    print(f"  encode is {ratio:.2f} times as fast as plain")
    print(f"  peak of memory: {half / 1024:.0f} MiB at half, {end / 1024:.0f} MiB at the end")


if __name__ == "__main__":
    main()
