"""A training step of Matching on pairs, whose noise is computed from its index, against the same step on data.

    python -m tests.benchmarks.pairs runs/demo

on a folder in which the demo has run. Single steps take turns: pairs, data, data again (the control, which must read 1.00);
each reads its batch, draws, and steps a network of its own. Prints the median of pairs / data with its 95 % interval.
"""

import sys
import time
from pathlib import Path

import torch

from data.batch import Set, Steps
from data.latents import Latents
from data.pairs import Pairs
from models import teacher
from tests.benchmarks.step import ratio
from trainer.draws import Draws
from trainer.module import coupled
from trainer.objectives import Matching

BATCH, STEPS = 256, 120


class Side:
    """A run that only reads, draws and steps.

    Args:
        source: of its batches.
        run: whose network it trains on.
    """

    def __init__(self, source: Set, run: Path):
        self.denoiser, self.objective = teacher.load(run)[0].train().requires_grad_(True), Matching()
        self.optimizer, self.batches = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-4), iter(Steps(source, BATCH, 0))
        self.times: list[float] = []

    def step(self) -> None:
        """Make one step, and time it."""
        began = time.perf_counter()
        batch = next(self.batches)
        draws = Draws(batch)
        self.optimizer.zero_grad()
        self.objective(self.denoiser, batch.x, coupled(batch, draws, batch.x), batch.condition, draws).backward()
        self.optimizer.step()
        self.times.append(time.perf_counter() - began)


def main(run: Path) -> None:
    """Print the ratios."""
    torch.set_num_threads(1)
    latents, pairs = Latents(str(run / "latents")), Pairs(str(run / "pairs"))
    sides = [Side(source, run / "teacher") for source in (pairs, latents, latents)]
    for i in range(STEPS):
        for side in sides if i % 2 else sides[::-1]:
            side.step()
    ours, data, control = (side.times for side in sides)
    step = 1000 * sorted(data)[len(data) // 2]
    print(f"{step:.1f} ms a step on data: pairs / data {ratio(ours, data)}, data / data {ratio(control, data)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
