"""What conversions and sampler arithmetic add to the network's own time, for a DiT of 30 million weights at batch 16.

    python -m tests.benchmarks.sampler

A walk is timed with the network (against as many bare calls of it, taking turns) and with one that returns a ready tensor at
once: what is left is all ours. Prints the latter over the former, for every sampler, on the plainest and the costliest forms.
Not a CI check.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from models.denoiser import Denoiser
from models.guidance import Guided
from models.interpolant import Discrete, Interpolant, Linear
from models.nets.dit import DiT
from models.prediction import Noise, Prediction, Velocity
from models.retimed import Retimed
from models.sampler import DenoiserLike, Sampler

STEPS, ROUNDS, BATCH = 4, 15, 16
FORMS: list[tuple[Interpolant, Prediction]] = [(Linear(), Velocity()), (Discrete.scaled_linear(), Noise())]


class Ready(nn.Module):
    """Answers at once."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, x_t: Tensor, clock: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the same tensor."""
        return self.answer


def median(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median of the seconds that some work takes."""
    seconds = []
    for _ in range(rounds + 2):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[2:]))


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    net = DiT(size=16, channels=4, patch=2, width=384, depth=11, heads=6, classes=10).eval()
    eps, cond = torch.randn(BATCH, 4, 16, 16), torch.arange(BATCH) % 10
    times, millions = torch.full((BATCH,), 500.0), sum(p.numel() for p in net.parameters()) / 1e6
    bare = median(lambda: net(eps, times, cond), 5)
    print(f"the network, {millions:.1f} million weights, batch {BATCH}: {1000 * bare:.0f} ms a call")
    ready = Ready(net(eps, times, cond))
    for interpolant, prediction in FORMS:
        quick: DenoiserLike = Denoiser(ready, interpolant, prediction)
        for sampler in Sampler.__subclasses__():
            _print(sampler(STEPS), quick, bare, eps, cond)
        _print(sampler(STEPS), Guided(quick, 2.0, rescale=0.7), bare, eps, cond)
        _print(sampler(STEPS), Retimed(quick, Linear(), gap=0.2), bare, eps, cond)


def _print(sampler: Sampler, denoiser: DenoiserLike, bare: float, eps: Tensor, cond: Tensor) -> None:
    noise = torch.Generator().manual_seed(0)
    spent = median(lambda: sampler(denoiser, eps, cond, noise=noise)) / sampler.nfe(denoiser)
    name = f"{type(sampler).__name__} of {type(denoiser).__name__} on {type(denoiser.interpolant).__name__}"  # type: ignore[attr-defined]
    print(f"{name:45} {1e6 * spent:8.0f} us an evaluation, {100 * spent / bare:.2f} % of the network's")


if __name__ == "__main__":
    main()
