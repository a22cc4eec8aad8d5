"""Time of a training step on pairs, whose noise is computed from its index, relative to data.

    python -m tests.benchmarks.pairs runs/demo

The folder is one in which the demo has run. Three loops take turns step by step: on pairs, on
data, and on data again (the control: its ratio must be 1.00). Each reads its batch, draws its
noise and times, and updates a network. Prints the median of pairs / data with its 95 % interval.
"""

import sys
import time
from pathlib import Path

import torch

from data.batch import IndexedDataset, RankBatches
from data.latents import Latents
from data.pairs import Pairs
from models.checkpoint import load_checkpoint
from tests.benchmarks.step import format_ratio
from trainer.module import couple_noise
from trainer.objectives import Matching
from trainer.step_random import StepRandom

BATCH = 256
STEPS = 120


class Loop:
    """A training loop that only reads, draws and updates.

    Args:
        source: source of its batches.
        run: folder of the run that the network comes from.
    """

    def __init__(self, source: IndexedDataset, run: Path):
        denoiser, *_ = load_checkpoint(run)
        self.denoiser = denoiser.train().requires_grad_(True)
        self.objective = Matching()
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-4)
        self.batches = iter(RankBatches(source, BATCH, 0))
        self.seconds: list[float] = []

    def step(self) -> None:
        """Make one step, and time it."""
        began = time.perf_counter()
        batch = next(self.batches)
        draws = StepRandom(batch)
        self.optimizer.zero_grad()
        noise = couple_noise(batch, draws, batch.x)
        self.objective(self.denoiser, batch.x, noise, batch.condition, draws).total.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - began)


def main(run: Path) -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    latents = Latents(str(run / "latents"))
    pairs = Pairs(str(run / "pairs"))
    loops = [Loop(source, run / "teacher") for source in (pairs, latents, latents)]

    # the order alternates
    for i in range(STEPS):
        turns = loops if i % 2 else loops[::-1]
        for loop in turns:
            loop.step()

    on_pairs, on_data, control = (loop.seconds for loop in loops)
    milliseconds = 1000 * sorted(on_data)[len(on_data) // 2]
    ratio = format_ratio(on_pairs, on_data)
    control_ratio = format_ratio(control, on_data)
    print(
        f"{milliseconds:.1f} ms a step on data: pairs / data {ratio}, data / data {control_ratio}"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
