"""Time that samplers and conversions add to the network's, for a DiT of 30 million weights.

    python -m tests.benchmarks.sampler

A network that returns a ready tensor takes no time, so that all the time of sampling with it is
ours. Prints this time for each evaluation, and its ratio to a call of the DiT at batch 16: for
every sampler, with the simplest and with the costliest interpolant and prediction. Not a CI check.
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
from models.prediction import NoisePrediction, Prediction, Velocity
from models.retimed import Retimed
from models.sampler import DenoiserLike, Sampler

STEPS = 4
ROUNDS = 15
WARM_UP = 2  # rounds that are not counted
BATCH = 16
FORMULATIONS: list[tuple[Interpolant, Prediction]] = [
    (Linear(), Velocity()),
    (Discrete.scaled_linear(), NoisePrediction()),
]


class ConstantNet(nn.Module):
    """A network that returns the same tensor at once.

    Args:
        output: the tensor.
    """

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Return the tensor."""
        return self.output


def median_seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median of the seconds that a function takes."""
    seconds = []
    for _ in range(rounds + WARM_UP):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[WARM_UP:]))


class Benchmark:
    """Prints the time that samplers add, relative to the network's.

    Args:
        network_seconds: time of a call of the network.
        eps: noise to sample from.
        cond: condition of each sample.
    """

    def __init__(self, network_seconds: float, eps: Tensor, cond: Tensor):
        self.network_seconds = network_seconds
        self.eps = eps
        self.cond = cond

    def print_time(self, sampler: Sampler, denoiser: DenoiserLike) -> None:
        """Print the time of an evaluation without the network's."""
        generator = torch.Generator().manual_seed(0)
        seconds = median_seconds(lambda: sampler(denoiser, self.eps, self.cond, noise=generator))
        seconds /= sampler.nfe(denoiser)
        interpolant = type(denoiser.interpolant).__name__  # type: ignore[attr-defined]
        name = f"{type(sampler).__name__} of {type(denoiser).__name__} on {interpolant}"
        percent = 100 * seconds / self.network_seconds
        print(f"{name:45} {1e6 * seconds:8.0f} us an evaluation, {percent:.2f} % of the network's")


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    # the network
    torch.set_num_threads(1)
    net = DiT(size=16, channels=4, patch=2, width=384, depth=11, heads=6, classes=10).eval()
    eps = torch.randn(BATCH, 4, 16, 16)
    cond = torch.arange(BATCH) % 10
    times = torch.full((BATCH,), 500.0)
    seconds = median_seconds(lambda: net(eps, times, cond), 5)
    millions = sum(p.numel() for p in net.parameters()) / 1e6
    network = f"{millions:.1f} million weights, batch {BATCH}"
    print(f"the network, {network}: {1000 * seconds:.0f} ms a call")

    # all samplers without it, the last one also with guidance and on another interpolant
    benchmark = Benchmark(seconds, eps, cond)
    constant = ConstantNet(net(eps, times, cond))
    samplers = [sampler(STEPS) for sampler in Sampler.__subclasses__()]
    for interpolant, prediction in FORMULATIONS:
        denoiser: DenoiserLike = Denoiser(constant, interpolant, prediction)
        for sampler in samplers:
            benchmark.print_time(sampler, denoiser)
        last = samplers[-1]
        benchmark.print_time(last, Guided(denoiser, 2.0, rescale=0.7))
        benchmark.print_time(last, Retimed(denoiser, Linear(), gap=0.2))


if __name__ == "__main__":
    main()
